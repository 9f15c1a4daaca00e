"""Batches of training pixels in the order of a plan, made ahead while the last one is used.

    images = Images(manifest.root, manifest.paths, spec, AugmentationConfig(), options, num_workers)
    stream = images.stream(plan, (seed, epoch), spares=train_rows)
    for pixels, which in stream: ...
    print(f"{stream.rows / seconds:.0f} images/s, {stream.waited / seconds:.0%} of it waited for")

What comes out depends on the plan and (seed, epoch) only: not on the number of workers, and a
plan that starts later gives the same batches from there on. Decoding is done by worker processes
(`num_workers` > 0), which leave the training's own process alone, or by threads of this process.
"""

import math
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Self

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor

from featcache.backbones.base import PixelSpec
from featcache.config import Config
from featcache.errors import UnreadableImagesError
from featcache.storage import Where
from finetune.images.augmentation import AugmentationConfig, Key
from finetune.images.decoding import DecodingThreads, DecodingWorkers, Source

IntArray = npt.NDArray[np.int64]

MOST_WORKERS = 16
"""Workers that are started without being asked for."""


class LoadingConfig(Config):
    """How images become batches of pixels; nothing here changes what is in them but `decode`."""

    num_workers: NonNegativeInt | None = None
    """Decoding processes of each training process; 0 = threads of its own. Unset = as many as CPU
    cores are left (16 at most) if a GPU trains, otherwise 0."""
    num_readers: PositiveInt = 4
    """Decoding threads of a training without such processes."""
    ram_budget_gib: float = Field(default=4.0, ge=0.0)
    """Pixels that every epoch sees alike are kept in memory up to this size, GiB: those of
    measured splits, and of training images whose crops are made on the device."""
    decode: Literal["fast", "scaled"] = "scaled"
    """fast = as in extraction; scaled = JPEG files are decoded no larger than twice what is
    needed, faster for photographs of several megapixels."""
    max_unreadable: float = Field(default=0.01, ge=0.0, le=1.0)
    """Share of the images, 0..1, that may be unreadable; they are listed, and others take their
    places."""

    def workers_for(self, device: torch.device) -> int:
        """Number of decoding processes of a training on `device`."""
        if self.num_workers is not None:
            return self.num_workers
        if device.type == "cpu":
            return 0
        trainings = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # of torchrun, on this machine
        return max(1, min(MOST_WORKERS, len(os.sched_getaffinity(0)) // trainings - 1))


@dataclass
class _Pending:
    """A batch on its way.

    Attributes:
        which: (n,) rows.
        pixels: (n, 3, H, W) uint8, filled as they come.
        left: rows that are not there yet.
        bad: places of unreadable ones.
    """

    which: IntArray
    pixels: Tensor
    left: int
    bad: list[int] = field(default_factory=list)


class Images:
    """Images of a list of files, decoded on demand; plain pixels are kept up to a stated size.

    Attributes:
        problems: path to reason, of every image found unreadable so far.
        waited: seconds that the consumers of its streams spent in waiting.
    """

    def __init__(
        self,
        root: Where,
        paths: Sequence[str],
        spec: PixelSpec,
        augmentation: AugmentationConfig | None,
        options: LoadingConfig,
        num_workers: int = 0,
        pinned: bool = False,
        plain: Literal["fast", "scaled"] = "fast",
    ) -> None:
        """Starts the workers.

        Args:
            root: folder or address that `paths` start from.
            paths: N images; those of all splits, so that one set of workers serves all streams.
            spec: size, resize and crop of the pixels.
            augmentation: how the images of a stream with a key are varied.
            options: how they are decoded, and how many may be unreadable.
            num_workers: processes; 0 = threads.
            pinned: whether batches are in page-locked memory, from where a GPU copies faster.
            plain: how JPEG files are decoded for streams without a key; fast = as in extraction.
        """
        self.problems: dict[str, str] = {}
        self.waited = 0.0
        self._paths, self._size, self._pinned = paths, spec.size, pinned
        self._allowed = math.floor(options.max_unreadable * len(paths))
        source = Source(root, paths, spec, plain, options.decode, augmentation)
        self._varied = augmentation is not None
        self._decoders: DecodingWorkers | DecodingThreads
        if num_workers > 0:
            self._decoders = DecodingWorkers(source, num_workers)
        else:
            self._decoders = DecodingThreads(source, options.num_readers)
        self._unsent: deque[tuple[_Pending, IntArray, Key | None]] = deque()
        self._sent: dict[int, tuple[_Pending, IntArray, Key | None]] = {}
        room = int(options.ram_budget_gib * 2**30) // (3 * math.prod(spec.size))
        # Memory that is never written takes no space.
        self._kept = torch.empty((min(room, len(paths)), 3, *spec.size), dtype=torch.uint8)
        self._slots = np.full(len(paths), -1, np.int64)
        self._num_kept = 0

    @property
    def in_memory(self) -> bool:
        """Whether there is room to keep the plain pixels of all images."""
        return len(self._kept) == len(self)

    def __len__(self) -> int:
        return len(self._paths)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the workers."""
        self._decoders.close()

    def take(self, which: IntArray) -> tuple[Tensor, IntArray]:
        """Plain pixels of the readable ones of some images.

        Args:
            which: (n,) int64 indices into the paths.

        Returns:
            (k, 3, H, W) uint8, and the (k,) indices they belong to; k <= n, order kept.

        Raises:
            UnreadableImagesError: if more images than allowed cannot be read.
        """
        return next(self.stream([which]))

    def stream(
        self,
        plan: Iterable[IntArray],
        key: Key | None = None,
        spares: IntArray | None = None,
    ) -> "Stream":
        """The batches of a plan; decoding starts at once.

        Several streams may be open at a time. One for the next epoch that is opened before a
        validation has its first batches ready behind it.

        Args:
            plan: row indices of one batch after the other.
            key: seed and epoch that fix how each row is varied; None = plain pixels.
            spares: sorted rows of which one takes the place of an unreadable one, so that every
                batch is full: the next one behind it that is readable and not in the batch. None =
                unreadable rows are left out.

        Raises:
            ValueError: if there is a key but no augmentation.
        """
        if key is not None and not self._varied:
            raise ValueError("a stream with a key needs images that were opened with augmentation")
        return Stream(self, iter(plan), key, spares)

    def _expect(self, which: IntArray, key: Key | None) -> _Pending:
        """Asks for a batch, as far as it is not in memory."""
        shape = (len(which), 3, *self._size)
        pixels = torch.empty(shape, dtype=torch.uint8, pin_memory=self._pinned)
        slots = self._slots[which] if key is None else np.full(len(which), -1, np.int64)
        held, missing = np.flatnonzero(slots >= 0), np.flatnonzero(slots < 0)
        if len(missing) == 0:
            torch.index_select(self._kept, 0, torch.from_numpy(slots), out=pixels)
        elif len(held):
            pixels[torch.from_numpy(held)] = self._kept[torch.from_numpy(slots[held])]
        batch, step = _Pending(which, pixels, len(missing)), self._decoders.rows_at_once
        for first in range(0, len(missing), step):
            self._unsent.append((batch, missing[first : first + step], key))
        self._send()
        return batch

    def _send(self) -> None:
        while self._unsent and self._decoders.has_room:
            task = self._unsent.popleft()
            batch, places, key = task
            self._sent[self._decoders.send(batch.which[places], key)] = task

    def _receive(self, wait: bool) -> None:
        """Copies what is decoded into the batches that wait for it."""
        for ticket, pixels, reasons in self._decoders.receive(wait):
            batch, places, key = self._sent.pop(ticket)
            target = batch.pixels.numpy()
            for place, item, reason in zip(places.tolist(), pixels, reasons, strict=True):
                row = int(batch.which[place])
                if reason:
                    batch.bad.append(place)
                    self.problems[self._paths[row]] = reason
                    continue
                np.copyto(target[place], item)
                if key is None:
                    self._keep(row, item)
            batch.left -= len(reasons)
        self._send()
        if len(self.problems) > self._allowed:
            path, reason = next(iter(self.problems.items()))
            raise UnreadableImagesError(
                f"{len(self.problems)} images are unreadable, at most {self._allowed} of "
                f"{len(self._paths)} are allowed: first {path} ({reason}); repair them or raise "
                "loading.max_unreadable"
            )

    def _keep(self, row: int, pixels: npt.NDArray[np.uint8]) -> None:
        if self._num_kept < len(self._kept) and self._slots[row] < 0:
            np.copyto(self._kept[self._num_kept].numpy(), pixels)
            self._slots[row] = self._num_kept
            self._num_kept += 1

    def _wait_for(self, batch: _Pending) -> None:
        if self._sent or self._unsent:
            self._receive(wait=False)
        while batch.left:
            self._receive(wait=True)

    def _substitute(self, batch: _Pending, key: Key | None, spares: IntArray) -> None:
        """Fills the places of unreadable rows with others."""
        used = set(batch.which.tolist())
        while batch.bad:
            places, batch.bad = sorted(batch.bad), []
            chosen = []
            for place in places:
                start = int(np.searchsorted(spares, batch.which[place], side="right"))
                for step in range(len(spares)):
                    row = int(spares[(start + step) % len(spares)])
                    if row not in used and self._paths[row] not in self.problems:
                        break
                else:
                    raise UnreadableImagesError(
                        f"fewer images than the batch of {len(batch.which)} can be read; repair "
                        "them or lower batch_size"
                    )
                used.add(row)
                chosen.append(row)
            found = self._expect(np.asarray(chosen, np.int64), key)
            self._wait_for(found)
            batch.pixels[places] = found.pixels
            batch.which[places] = found.which
            batch.bad = [places[place] for place in found.bad]


class Stream(Iterator[tuple[Tensor, IntArray]]):
    """Batches in the order of a plan: (n, 3, H, W) uint8 pixels and their (n,) int64 rows.

    Attributes:
        rows: images handed out so far.
        waited: seconds that the consumer spent in waiting for them.
    """

    def __init__(
        self,
        images: Images,
        plan: Iterator[IntArray],
        key: Key | None,
        spares: IntArray | None,
    ) -> None:
        """See `Images.stream`."""
        self.rows, self.waited = 0, 0.0
        self._images, self._plan = images, plan
        self._key, self._spares = key, spares
        self._pending: deque[_Pending] = deque()
        decoders = images._decoders
        self._ahead = 4 * decoders.num_workers * decoders.rows_at_once
        self._fill()

    def __next__(self) -> tuple[Tensor, IntArray]:
        began = time.perf_counter()
        images = self._images
        self._fill()
        if not self._pending:
            raise StopIteration
        images._wait_for(self._pending[0])
        batch = self._pending.popleft()
        self._fill()
        if batch.bad and self._spares is not None:
            images._substitute(batch, self._key, self._spares)
        pixels, which = batch.pixels, batch.which
        if batch.bad:
            kept = np.ones(len(which), np.bool_)
            kept[batch.bad] = False
            pixels, which = pixels[torch.from_numpy(kept)], which[kept]
        self.rows += len(which)
        seconds = time.perf_counter() - began
        self.waited += seconds
        images.waited += seconds
        return pixels, which

    def close(self) -> None:
        """Takes back what is not yet decoded; for a stream that is left before its end."""
        self._plan = iter(())
        mine = {id(batch) for batch in self._pending}
        unsent = self._images._unsent
        kept = [task for task in unsent if id(task[0]) not in mine]
        unsent.clear()
        unsent.extend(kept)
        self._pending.clear()

    def _fill(self) -> None:
        """Asks for the next batches: two at least, and as many as keep all workers busy."""
        asked = sum(len(batch.which) for batch in self._pending)
        while len(self._pending) < 2 or asked < self._ahead:
            which = next(self._plan, None)
            if which is None:
                return
            rows = np.array(which, np.int64)
            self._pending.append(self._images._expect(rows, self._key))
            asked += len(rows)
