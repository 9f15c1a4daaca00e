"""From rows to training pixels, in worker processes: decode, crop, resize, vary.

One process imports what decoding needs (not the job's own modules, and never CUDA) and forks the
workers. Rows go in and pixels come out through memory that all of them share; two pipes with
records of a fixed size say which part of it is ready. Whatever way the job ends, its end of the
task pipe closes, and the workers leave.
"""

import contextlib
import json
import mmap
import os
import pickle
import select
import signal
import struct
import subprocess
import sys
import tempfile
import traceback
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from featcache.backbones.base import PixelSpec
from featcache.errors import DatasetError, UserError
from featcache.image_bytes import read_many
from featcache.images import load_pixels, load_view
from featcache.storage import Where
from finetune.images.augmentation import AugmentationConfig, Key, Variation

Decoded = tuple[int, npt.NDArray[np.uint8] | list[npt.NDArray[np.uint8]], list[str]]
"""Ticket of a task, (3, H, W) uint8 pixels of its rows, and "" or why a row is unreadable."""

_REASON_BYTES = 512
_RING_BYTES = 2**30
"""Upper limit of the shared memory; what is not used of it takes no space."""

_TASK = struct.Struct("<qqqqqq")
"""Buffer, number of rows, whether they are varied, seed, epoch, ticket."""
_DONE = struct.Struct("<qqq")
"""Buffer, ticket, and 0, or 1 = a worker failed, or 2 = a worker died."""


@dataclass(frozen=True)
class Source:
    """How a row becomes pixels.

    Attributes:
        root: folder or address that `paths` start from.
        paths: images, as `featcache.image_bytes.read_bytes` takes them.
        spec: size, resize and crop of the pixels.
        plain, varied: how JPEG files are decoded for either, see `featcache.images`.
        augmentation: how training images are varied.
    """

    root: Where
    paths: Sequence[str]
    spec: PixelSpec
    plain: Literal["fast", "scaled"]
    varied: Literal["fast", "scaled"]
    augmentation: AugmentationConfig | None

    def variation(self) -> Variation:
        """The draws of its augmentation.

        Raises:
            ValueError: if it has none.
        """
        if self.augmentation is None:
            raise ValueError("these images were opened without augmentation")
        return Variation(self.augmentation, self.spec.mean)

    def decode(
        self, rows: Sequence[int], key: Key | None, variation: Variation | None
    ) -> list[Tensor | ValueError]:
        """Cropped and resized pixels of some rows, colours as they are; or why there are none.

        Args:
            rows: indices into `paths`.
            key: fixes crop and flip of every row; None = the plain view.
            variation: of `variation()`; needed with `key`.

        Returns:
            (3, H, W) uint8 a row. Safe to be called by several threads.
        """
        found: list[Tensor | ValueError] = []
        files = read_many(self.root, [self.paths[row] for row in rows])
        for row, data in zip(rows, files, strict=True):
            try:
                if isinstance(data, ValueError):
                    raise data
                if key is None or variation is None:
                    found.append(load_pixels(data, self.spec, self.plain)[0])
                    continue
                draw = partial(variation.box_and_flip, (*key, row))
                found.append(load_view(data, self.spec, self.varied, draw))
            except ValueError as reason:
                found.append(reason)
        return found


class _Ring:
    """Shared memory as equal buffers: per row an index, a reason of failure, and pixels."""

    def __init__(self, descriptor: int, num_buffers: int, rows: int, shape: tuple[int, ...]):
        self.num_buffers, self.rows = num_buffers, rows
        row_bytes = int(np.prod(shape))
        size = self.size(num_buffers, rows, row_bytes)
        self._map = mmap.mmap(descriptor, size)
        head = num_buffers * rows
        self.indices = np.frombuffer(self._map, np.int64, head).reshape(num_buffers, rows)
        self.reasons = np.frombuffer(
            self._map, np.uint8, head * _REASON_BYTES, offset=head * 8
        ).reshape(num_buffers, rows, _REASON_BYTES)
        start = head * (8 + _REASON_BYTES)
        self.pixels = np.frombuffer(self._map, np.uint8, head * row_bytes, offset=start).reshape(
            num_buffers, rows, *shape
        )

    def write_reason(self, buffer: int, place: int, error: Exception) -> None:
        """Puts down why a row has no pixels."""
        text = (" ".join(str(error).split()) or type(error).__name__).encode()[:_REASON_BYTES]
        self.reasons[buffer, place, : len(text)] = np.frombuffer(text, np.uint8)

    def reason(self, buffer: int, place: int) -> str:
        """Why a row has no pixels; "" = it has."""
        text: bytes = self.reasons[buffer, place].tobytes()
        return text.rstrip(b"\0").decode("utf-8", "replace")

    @staticmethod
    def size(num_buffers: int, rows: int, row_bytes: int) -> int:
        return num_buffers * rows * (8 + _REASON_BYTES + row_bytes)


class DecodingWorkers:
    """Worker processes that turn rows into pixels, a few rows at a time, in any order.

    Attributes:
        rows_at_once: most rows of one task.
        num_workers: processes.
    """

    rows_at_once = 8

    def __init__(self, source: Source, num_workers: int) -> None:
        """Starts the processes; they are ready some seconds later, tasks may be sent at once.

        Args:
            source: what they decode.
            num_workers: processes, >= 1.
        """
        self.num_workers = num_workers
        shape = (3, *source.spec.size)
        row_bytes = int(np.prod(shape))
        fitting = _RING_BYTES // _Ring.size(1, self.rows_at_once, row_bytes)
        num_buffers = max(2 * num_workers, min(4096, fitting))
        memory = _anonymous_file(_Ring.size(num_buffers, self.rows_at_once, row_bytes))
        tasks, self._tasks = os.pipe()
        self._done, done = os.pipe()
        os.set_blocking(self._tasks, False)
        passed = (memory, tasks, done)
        code = "import sys, json; sys.path[:] = json.loads(sys.argv[1]); "
        code += "from finetune.images.decoding import _serve; _serve(*map(int, sys.argv[2:]))"
        numbers = [*map(str, passed), str(num_workers), str(num_buffers), str(self.rows_at_once)]
        self._process = subprocess.Popen(
            [sys.executable, "-c", code, json.dumps(sys.path), *numbers],
            stdin=subprocess.PIPE,
            pass_fds=passed,
        )
        self._ring = _Ring(memory, num_buffers, self.rows_at_once, shape)
        for descriptor in passed:
            os.close(descriptor)
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError), self._process.stdin as stream:
            pickle.dump(source, stream)
        self._free = list(range(num_buffers - 1, -1, -1))
        self._held: dict[int, tuple[int, int]] = {}
        self._backlog: deque[bytes] = deque()
        self._rest = b""
        self._num_tickets = 0

    @property
    def has_room(self) -> bool:
        """Whether a task can be sent now."""
        return bool(self._free)

    def send(self, rows: npt.NDArray[np.int64], key: Key | None) -> int:
        """Asks for the pixels of up to `rows_at_once` rows; returns the task's ticket.

        Args:
            rows: indices into the source's paths.
            key: see `Source.decode`.
        """
        buffer, ticket = self._free.pop(), self._num_tickets
        self._num_tickets += 1
        self._ring.indices[buffer, : len(rows)] = rows
        self._held[ticket] = (buffer, len(rows))
        seed, epoch = key or (0, 0)
        self._backlog.append(_TASK.pack(buffer, len(rows), key is not None, seed, epoch, ticket))
        self._flush()
        return ticket

    def receive(self, wait: bool) -> list[Decoded]:
        """What is done; pixels are views that are valid until the next call of this object.

        Args:
            wait: until there is at least one.

        Raises:
            DatasetError: what a worker met that ends the run, or that it has died.
        """
        found: list[Decoded] = []
        while True:
            self._flush()
            while _readable(self._done, 0.2 if wait and not found else 0.0):
                data = self._rest + os.read(self._done, 2**16)
                whole = len(data) - len(data) % _DONE.size
                self._rest = data[whole:]
                for buffer, ticket, state in _DONE.iter_unpack(data[:whole]):
                    if state:
                        self._fail(buffer, state)
                    _, count = self._held.pop(ticket)
                    self._free.append(buffer)
                    reasons = [self._ring.reason(buffer, place) for place in range(count)]
                    found.append((ticket, self._ring.pixels[buffer, :count], reasons))
                if whole == 0:
                    self._fail(0, 2)
            if found or not wait:
                return found
            if self._process.poll() is not None:
                self._fail(0, 2)

    def close(self) -> None:
        """Ends the processes."""
        if self._tasks < 0:
            return
        os.close(self._tasks)
        self._tasks = -1
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.terminate()
            self._process.wait()
        os.close(self._done)

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):
            self.close()

    def _flush(self) -> None:
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            while self._backlog:
                os.write(self._tasks, self._backlog[0])
                self._backlog.popleft()

    def _fail(self, buffer: int, state: int) -> None:
        if state == 1:
            raise DatasetError(self._ring.reason(buffer, 0))
        raise DatasetError(
            "a decoding process has died (out of memory, or killed; its own message is above if "
            "it had one); lower num_workers, or start again"
        )


class DecodingThreads:
    """The same as `DecodingWorkers` by threads of this process; colours are varied by the caller.

    Attributes:
        rows_at_once: most rows of one task.
        num_workers: threads.
        has_room: always.
    """

    rows_at_once = 4
    has_room = True

    def __init__(self, source: Source, num_workers: int) -> None:
        """Makes the threads.

        Args:
            source: what they decode.
            num_workers: threads, >= 1.
        """
        self.num_workers = num_workers
        self._source = source
        self._variation = source.variation() if source.augmentation is not None else None
        self._pool = ThreadPoolExecutor(num_workers, thread_name_prefix="reader")
        self._done: SimpleQueue[tuple[int, list[int], Key | None, Future[Any]]] = SimpleQueue()
        self._num_tickets = 0

    def send(self, rows: npt.NDArray[np.int64], key: Key | None) -> int:
        """See `DecodingWorkers.send`."""
        ticket, which = self._num_tickets, rows.tolist()
        self._num_tickets += 1
        work = self._pool.submit(self._source.decode, which, key, self._variation)
        work.add_done_callback(lambda done: self._done.put((ticket, which, key, done)))
        return ticket

    def receive(self, wait: bool) -> list[Decoded]:
        """See `DecodingWorkers.receive`; pixels stay valid.

        Raises:
            UserError: what a thread met that ends the run.
        """
        found: list[Decoded] = []
        with contextlib.suppress(Empty):
            while True:
                ticket, rows, key, work = self._done.get(block=wait and not found)
                found.append((ticket, *self._finished(rows, key, work.result())))
        return found

    def close(self) -> None:
        """Ends the threads."""
        self._pool.shutdown(cancel_futures=True)

    def _finished(
        self, rows: list[int], key: Key | None, decoded: list[Tensor | ValueError]
    ) -> tuple[list[npt.NDArray[np.uint8]], list[str]]:
        pixels, reasons = [], []
        for row, item in zip(rows, decoded, strict=True):
            if isinstance(item, ValueError):
                pixels.append(np.empty(0, np.uint8))
                reasons.append(" ".join(str(item).split()) or type(item).__name__)
                continue
            if key is not None and self._variation is not None:
                item = self._variation.vary_colours((*key, row), item)
            pixels.append(item.numpy())
            reasons.append("")
        return pixels, reasons


def _readable(descriptor: int, seconds: float) -> bool:
    """Whether something can be read, or the other end is closed, within this time."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


def _anonymous_file(size: int) -> int:
    """Descriptor of a file without a name that is gone with its last user."""
    if hasattr(os, "memfd_create"):  # not bounded by what /dev/shm holds
        descriptor = os.memfd_create("featcache-pixels")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.truncate(descriptor, size)
    os.set_inheritable(descriptor, True)
    return descriptor


def _serve(
    memory: int, tasks: int, done: int, num_workers: int, num_buffers: int, rows: int
) -> None:
    """Body of the process that forks the workers: waits for them, and tells if one dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the job's business
    source: Source = pickle.load(sys.stdin.buffer)
    torch.set_num_threads(1)
    # Made before the forks: what it imports is then imported once.
    variation = source.variation() if source.augmentation is not None else None
    if variation is not None:
        variation.vary_colours((0, 0, 0), torch.zeros((3, *source.spec.size), dtype=torch.uint8))
    ring = _Ring(memory, num_buffers, rows, (3, *source.spec.size))
    workers = set()
    for _ in range(num_workers):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                _work(ring, source, variation, tasks, done)
                status = 0
            except BrokenPipeError:  # the job has left
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        workers.add(child)
    while workers:
        child, status = os.wait()
        workers.discard(child)
        if status:
            with contextlib.suppress(BrokenPipeError):
                os.write(done, _DONE.pack(0, 0, 2))
            break
    for child in workers:
        os.kill(child, signal.SIGTERM)
        os.waitpid(child, 0)


def _work(ring: _Ring, source: Source, variation: Variation | None, tasks: int, done: int) -> None:
    """Body of a worker: task after task until the job's end of the pipe is closed."""
    while record := os.read(tasks, _TASK.size):
        buffer, count, varied, seed, epoch, ticket = _TASK.unpack(record)
        rows = ring.indices[buffer, :count].tolist()
        ring.reasons[buffer] = 0
        key = (seed, epoch) if varied else None
        state = 0
        try:
            for place, pixels in enumerate(source.decode(rows, key, variation)):
                if isinstance(pixels, ValueError):
                    ring.write_reason(buffer, place, pixels)
                    continue
                if key is not None and variation is not None:
                    pixels = variation.vary_colours((*key, rows[place]), pixels)
                np.copyto(ring.pixels[buffer, place], pixels.numpy())
        except UserError as error:  # an object store that is gone
            ring.write_reason(buffer, 0, error)
            state = 1
        os.write(done, _DONE.pack(buffer, ticket, state))
