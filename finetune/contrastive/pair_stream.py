"""Batches of image-caption pairs: which rows every step of a training sees, and their pixels.

The plan is arithmetic: step s is batch s mod (N div B) of epoch s div (N div B), and the order and
captions of an epoch follow from (seed, epoch). So a run can begin at any step, and each of several
processes makes its own rows of the same batches. Every batch has exactly B distinct images, so the
number of negatives never changes: what is left of an epoch is dropped, and another image takes the
place of an unreadable one.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from finetune.contrastive.pairs import Pairs, draw_captions
from finetune.images.training_images import TrainingImages, VariedBatch
from heads.distributed import Group


@dataclass(frozen=True)
class Batch:
    """This process's rows of one step.

    Attributes:
        epoch: pass over the split, from 0.
        images: b distinct images.
        caption_ids: (b,) int64 one drawn caption an image, as index into `Pairs.texts`.
    """

    epoch: int
    images: VariedBatch
    caption_ids: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.caption_ids)

    def chunks(self, count: int) -> list["Batch"]:
        """The rows in `count` pieces, as equal as possible."""
        parts = zip(self.images.chunks(count), np.array_split(self.caption_ids, count), strict=True)
        return [Batch(self.epoch, images, ids) for images, ids in parts]


class PairStream(Iterator[Batch]):
    """The batches from one step to the last, in order.

    Attributes:
        batch_size: images a step over all processes.
        steps_per_epoch: full batches in the split.
    """

    def __init__(
        self,
        pairs: Pairs,
        images: TrainingImages,
        *,
        batch_size: int,
        seed: int,
        group: Group,
        first_step: int,
        num_steps: int,
    ) -> None:
        """Begins at `first_step`; decoding begins at once.

        Args:
            pairs: rows and their captions.
            images: those of the pairs, row by row.
            batch_size: B, images a step over all processes; a multiple of their number.
            seed: of order, captions, crops and flips.
            group: the processes.
            first_step: step to begin with, from 0.
            num_steps: where to end.
        """
        assert batch_size % group.size == 0, (batch_size, group.size)
        self.batch_size = batch_size
        self.steps_per_epoch = len(pairs) // batch_size
        self._pairs, self._images, self._seed, self._group = pairs, images, seed, group
        self._step, self._end = first_step, num_steps
        if self._step < self._end:
            self._open()

    @property
    def waited(self) -> float:
        """Seconds that the consumer spent in waiting for pixels."""
        return self._images.images.waited

    def __next__(self) -> Batch:
        if self._step == self._end:
            raise StopIteration
        images = next(self._stream)
        batch = Batch(self._step // self.steps_per_epoch, images, self._captions[images.which])
        self._step += 1
        if self._step < self._end and self._step % self.steps_per_epoch == 0:
            self._open()  # now: its first images are decoded while this batch is used
        return batch

    def _open(self) -> None:
        """Makes the plan of the epoch that the next step is in, from that step on."""
        epoch, place = divmod(self._step, self.steps_per_epoch)
        random = np.random.default_rng([self._seed, epoch])
        order = random.permutation(len(self._pairs))
        self._captions = draw_captions(self._pairs, random)
        size, own = self._group.size, self.batch_size // self._group.size
        batches = order[: self.steps_per_epoch * self.batch_size]
        shares = batches.reshape(self.steps_per_epoch, size, own)[:, self._group.rank]
        # Of the rows that no other process has in this epoch, so that a batch stays distinct.
        spares = np.sort(order if size == 1 else shares.ravel())
        steps = min(self.steps_per_epoch, place + self._end - self._step)
        self._stream = self._images.stream(shares[place:steps], (self._seed, epoch), spares)
