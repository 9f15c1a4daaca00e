"""Batches of image-caption pairs: which rows every step of a training sees, and their pixels.

The plan is arithmetic: step s is batch s mod (N div B) of epoch s div (N div B), and the order and
captions of an epoch follow from (seed, epoch). So a run can begin at any step, and each of several
processes makes its own rows of the same batches. Every batch has exactly B distinct images, so the
number of negatives never changes: what is left of an epoch is dropped, and another image takes the
place of an unreadable one.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from finetune.data import ImageStore, Pairs, draw_captions, draw_views
from heads.distributed import Group


@dataclass(frozen=True)
class Batch:
    """This process's rows of one step.

    Attributes:
        epoch: pass over the split, from 0.
        pixels: (b, 3, H, W) uint8 of distinct images, not yet cropped.
        views: (b, 2, 3) float32 crop and flip of each, see `finetune.data.draw_views`.
        caption_ids: (b,) int64 one drawn caption an image, as index into `Pairs.texts`.
    """

    epoch: int
    pixels: Tensor
    views: Tensor
    caption_ids: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.caption_ids)

    def chunks(self, count: int) -> list["Batch"]:
        """The rows in `count` pieces, as equal as possible."""
        parts = zip(
            self.pixels.tensor_split(count),
            self.views.tensor_split(count),
            np.array_split(self.caption_ids, count),
            strict=True,
        )
        return [Batch(self.epoch, pixels, views, ids) for pixels, views, ids in parts]


class PairStream(Iterator[Batch]):
    """The batches from one step to the last, in order.

    Attributes:
        batch_size: images a step over all processes.
        steps_per_epoch: full batches in the split.
        waited: seconds that the consumer spent in waiting for pixels.
    """

    def __init__(
        self,
        pairs: Pairs,
        images: ImageStore,
        *,
        batch_size: int,
        min_area: float,
        flip: bool,
        seed: int,
        group: Group,
        first_step: int,
        num_steps: int,
    ) -> None:
        """Begins at `first_step`.

        Args:
            pairs: rows and their captions.
            images: their pixels, larger than the towers take them by a margin for crops.
            batch_size: B, images a step over all processes; a multiple of their number.
            min_area: smallest share of an image's area that a crop keeps.
            flip: whether half of the images are mirrored.
            seed: of order, captions, crops and flips.
            group: the processes.
            first_step: step to begin with, from 0.
            num_steps: where to end.
        """
        assert batch_size % group.size == 0, (batch_size, group.size)
        self.steps_per_epoch = len(pairs) // batch_size
        self.waited = 0.0
        self._pairs, self._images, self._group = pairs, images, group
        self.batch_size, self._own = batch_size, batch_size // group.size
        self._min_area, self._flip, self._seed = min_area, flip, seed
        self._step, self._end = first_step, num_steps
        self._epoch = -1
        self._rows: Iterator[tuple[Tensor, npt.NDArray[np.int64]]] = iter(())
        self._captions = np.empty(0, np.int64)

    def __next__(self) -> Batch:
        if self._step == self._end:
            raise StopIteration
        epoch, place = divmod(self._step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._open(epoch, place)
        began = time.perf_counter()
        pixels, which = next(self._rows)
        self.waited += time.perf_counter() - began
        random = np.random.default_rng([self._seed, 1, self._step])
        views = draw_views(self.batch_size, self._min_area, self._flip, random)
        first = self._group.rank * self._own
        self._step += 1
        return Batch(epoch, pixels, views[first : first + self._own], self._captions[which])

    def _open(self, epoch: int, place: int) -> None:
        """Makes the plan of an epoch from one of its batches on."""
        self._epoch = epoch
        random = np.random.default_rng([self._seed, epoch])
        order = random.permutation(len(self._pairs))
        self._captions = draw_captions(self._pairs, random)
        batches = order[: self.steps_per_epoch * self.batch_size]
        shares = batches.reshape(self.steps_per_epoch, self._group.size, self._own)
        own = shares[:, self._group.rank]
        # Of the rows that no other process has in this epoch, so that a batch stays distinct.
        spares = np.sort(order if self._group.size == 1 else own.ravel())
        self._rows = self._images.stream(own[place:], None, spares)
