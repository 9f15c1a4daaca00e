"""Reader -> encoder -> writer, overlapping.

Threads decode, the caller encodes, one thread writes chunk files. Each part's time is taken, so a
slow run says which of the three is slow.
"""

import contextlib
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from torch import Tensor

from featcache.backbones.base import PixelSpec
from featcache.image_bytes import read_many
from featcache.image_bytes import stamp as image_stamp
from featcache.images import PixelMode, Views, load_pixels
from featcache.row_block import RowBlock
from featcache.storage import Where, is_url
from featcache.store import Shard, Store

_ROWS_PER_TASK = {False: 4, True: 16}
"""Images that a reader thread decodes per hand-over, from a disk and from an object store: enough
to hide the cost of the hand-over, and of the request that brings neighbours in a tar."""


@dataclass(frozen=True)
class ImageSource:
    """How a row becomes pixels.

    Attributes:
        root: folder or address that the rows' paths start from.
        spec, mode, views, transform: see `images.load_pixels`.
    """

    root: Where
    spec: PixelSpec
    mode: PixelMode
    views: Views
    transform: Callable[[Any], Tensor] | None

    def load(self, data: bytes, row_id: str) -> tuple[Tensor, int]:
        """(V, 3, H, W) pixels and the XXH3-64 of an image file's bytes.

        Raises:
            ValueError: the reason why they cannot be decoded.
        """
        pixels = load_pixels(
            data,
            self.spec,
            self.mode,
            views=self.views,
            row_id=row_id,
            transform=self.transform,
        )
        return pixels, xxhash.xxh3_64_intdigest(data)


@dataclass
class Batch:
    """Rows [start, stop) as pixels; the batch is always full, missing rows are zero.

    Attributes:
        pixels: (B, V, 3, H, W) uint8, or float32 in mode `reference`.
        content: (stop - start,) uint64 XXH3-64 of the files' bytes; 0 where unreadable.
        stamp: (stop - start,) uint64 version marks of the files, taken before they were read.
        reasons: why a row cannot be read, by row.
        busy_seconds: reader threads' time spent on it, summed over the threads.
    """

    start: int
    stop: int
    pixels: Tensor
    content: npt.NDArray[np.uint64]
    stamp: npt.NDArray[np.uint64]
    reasons: dict[int, str] = field(default_factory=dict)
    busy_seconds: float = 0.0

    @property
    def valid(self) -> npt.NDArray[np.bool_]:
        """(stop - start,) rows that could be read."""
        valid = np.ones(self.stop - self.start, np.bool_)
        valid[[row - self.start for row in self.reasons]] = False
        return valid


class BatchReader:
    """Batches in row order, decoded ahead by threads; at most `ahead` batches are in memory.

    Batches are cut at multiples of `batch_size` counted from row 0, whatever range is asked for,
    so a row always sits in the same place of the same batch.
    """

    def __init__(
        self, source: ImageSource, batch_size: int, num_readers: int, pinned: bool = False
    ) -> None:
        self.source = source
        self.batch_size = batch_size
        self.num_readers = num_readers
        self.pinned = pinned
        self._task = min(batch_size, _ROWS_PER_TASK[is_url(source.root)])
        self.ahead = max(3, -(-2 * num_readers * self._task // batch_size) + 1)

    def batches(self, block: RowBlock) -> Iterator[Batch]:
        """The batches of a block, which starts at a multiple of `batch_size`."""
        assert block.start % self.batch_size == 0
        executor = ThreadPoolExecutor(self.num_readers, thread_name_prefix="reader")
        pending: deque[tuple[Batch, list[Future[float]]]] = deque()
        try:
            for first in range(block.start, block.stop, self.batch_size):
                last = min(first + self.batch_size, block.stop)
                pending.append(self._submit(executor, block, first, last))
                if len(pending) >= self.ahead:
                    yield _finished(*pending.popleft())
            while pending:
                yield _finished(*pending.popleft())
        finally:
            executor.shutdown(wait=True, cancel_futures=True)

    def _submit(
        self, executor: ThreadPoolExecutor, block: RowBlock, start: int, stop: int
    ) -> tuple[Batch, list[Future[float]]]:
        source = self.source
        dtype = torch.float32 if source.mode == "reference" else torch.uint8
        shape = (self.batch_size, source.views.count, 3, *source.spec.size)
        pixels = torch.zeros(shape, dtype=dtype, pin_memory=self.pinned)
        content, stamp = np.zeros((2, stop - start), np.uint64)
        batch = Batch(start, stop, pixels, content, stamp)
        rows = range(start, stop)
        return batch, [
            executor.submit(self._read, batch, block, rows[at : at + self._task])
            for at in range(0, len(rows), self._task)
        ]

    def _read(self, batch: Batch, block: RowBlock, rows: range) -> float:
        began = time.perf_counter()
        first, last = rows.start - block.start, rows.stop - block.start
        paths, ids = block.paths[first:last], block.ids[first:last]
        # Before the read: a file that changes meanwhile then has another mark next time.
        for row, path in zip(rows, paths, strict=True):
            batch.stamp[row - batch.start] = image_stamp(self.source.root, path)
        files = read_many(self.source.root, paths)
        for row, row_id, data in zip(rows, ids, files, strict=True):
            try:
                if isinstance(data, ValueError):
                    raise data
                pixels, content = self.source.load(data, row_id)
            except ValueError as reason:
                batch.reasons[row] = str(reason)
                continue
            np.copyto(batch.pixels[row - batch.start].numpy(), pixels.numpy())
            batch.content[row - batch.start] = content
        return time.perf_counter() - began


def _finished(batch: Batch, work: list[Future[float]]) -> Batch:
    batch.busy_seconds = sum(future.result() for future in work)
    return batch


class ShardWriter:
    """Collects a shard's rows into chunks and writes them in a thread of its own.

    Use as a context manager: leaving it writes what is left, or drops it after an error.

    Attributes:
        seconds: time spent writing.
    """

    def __init__(self, store: Store, shard: Shard) -> None:
        self.store = store
        self.shard = shard
        self.seconds = 0.0
        self._chunks: dict[str, tuple[int, npt.NDArray[Any]]] = {}
        self._queue: queue.Queue[tuple[int, Mapping[str, npt.NDArray[Any]]] | None]
        self._queue = queue.Queue(maxsize=4)
        self._error: BaseException | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, name="writer", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self._stopped.set()
        self._send(None)
        self._thread.join()
        if error is None and self._error is not None:
            raise self._error

    def put(self, start: int, rows: Mapping[str, npt.NDArray[Any]]) -> None:
        """Takes rows [start, ...) of each array, in order; arrays are written in this order too.

        Raises:
            CacheError: if the disk is full; raised here once the writing thread has met it.
        """
        self._send((start, rows))
        if self._error is not None:
            raise self._error

    def _send(self, item: tuple[int, Mapping[str, npt.NDArray[Any]]] | None) -> None:
        while self._thread.is_alive():
            with contextlib.suppress(queue.Full):
                self._queue.put(item, timeout=0.2)
                return

    def _work(self) -> None:
        try:
            while (item := self._queue.get()) is not None:
                if self._stopped.is_set():
                    return
                began = time.perf_counter()
                for name, rows in item[1].items():
                    self._add(name, item[0], rows)
                self.seconds += time.perf_counter() - began
        except BaseException as error:  # handed to the thread that waits, which raises it
            self._error = error

    def _add(self, name: str, start: int, rows: npt.NDArray[Any]) -> None:
        chunk_rows = self.store.files(name).chunk_rows
        while len(rows):
            first = start - start % chunk_rows
            last = min(first + chunk_rows, self.shard.stop)
            if name not in self._chunks:
                shape = (last - first, *rows.shape[1:])
                self._chunks[name] = (first, np.empty(shape, rows.dtype))
            part = rows[: last - start]
            self._chunks[name][1][start - first : start - first + len(part)] = part
            start, rows = start + len(part), rows[len(part) :]
            if start == last:
                self.store.write_chunks(name, *self._chunks.pop(name))


@dataclass
class Timings:
    """Rows that went through, and the time each part spent on them.

    Attributes:
        rows: number of rows.
        read_seconds: time of the reader threads, divided by their number.
        encode_seconds, write_seconds: time of the encoder and of the writing thread.
        seconds: wall-clock time.
    """

    rows: int = 0
    read_seconds: float = 0.0
    encode_seconds: float = 0.0
    write_seconds: float = 0.0
    seconds: float = 0.0

    def add(self, other: "Timings") -> None:
        """Adds another part's rows and times."""
        self.rows += other.rows
        self.read_seconds += other.read_seconds
        self.encode_seconds += other.encode_seconds
        self.write_seconds += other.write_seconds
        self.seconds += other.seconds

    def rates(self) -> dict[str, float]:
        """Rows per second of each part alone, and of all of them together."""
        parts = {
            "read": self.read_seconds,
            "encode": self.encode_seconds,
            "write": self.write_seconds,
            "total": self.seconds,
        }
        return {name: round(self.rows / s, 1) if s > 0 else 0.0 for name, s in parts.items()}


class Progress:
    """One line that is rewritten on a terminal, or a plain line every ten seconds elsewhere."""

    def __init__(self, total: int, done: int, unit: str) -> None:
        self.total = total
        self.done = done
        self.unit = unit
        self._first = done
        self._terminal = sys.stdout.isatty()
        self._pause = 0.2 if self._terminal else 10.0
        self._began = self._printed = time.monotonic()

    def update(self, done: int, timings: Timings) -> None:
        """Shows that `done` rows are through, if the last line is old enough."""
        self.done = done
        now = time.monotonic()
        if now - self._printed < self._pause:
            return
        self._printed = now
        rate = (done - self._first) / (now - self._began)
        left = (self.total - done) / rate if rate > 0 else 0.0
        parts = timings.rates()
        line = (
            f"{100 * done / self.total:5.1f} %  {done}/{self.total} {self.unit}  {rate:.1f}/s  "
            f"(read {parts['read']:.0f}, encode {parts['encode']:.0f}, "
            f"write {parts['write']:.0f})  {_duration(left)} left"
        )
        if self._terminal:
            print(f"\r{line:<100}", end="", flush=True)
        else:
            print(line, flush=True)

    def close(self) -> None:
        """Ends the line on a terminal."""
        if self._terminal and self._printed != self._began:
            print()


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
