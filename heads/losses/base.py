"""What a loss on logits must offer: a config that builds it, and its terms before any mean.

Adding a loss is one new file in `heads/losses`: subclass `LossConfig` and `Loss`. Losses of whole
heads that see more than logits (mixture of prompts) are functions in files of their own.
"""

import copy
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featcache.config import Config
from featcache.manifest import Task


@dataclass(frozen=True)
class ClassStatistics:
    """What losses for long-tailed sets are told about the rows that are trained on.

    Attributes:
        counts: (C,) int64 n_c, rows with class c.
        num_rows: N, all rows.
    """

    counts: npt.NDArray[np.int64]
    num_rows: int


class Loss(nn.Module, ABC):
    """A loss on logits: elementwise, or one number a row, until the mean at the very end.

    Numbers of its own for each class are (C,) buffers.
    """

    reduction: Literal["mean", "sum"] = "mean"
    """What `forward` does with `terms`."""
    needs_cosines: bool = False
    """Whether it takes cosines in place of logits, and has an `offset` besides."""
    reads_multi_hot: bool = True
    """Whether class indices mean one-hot rows to it; False for a softmax over classes."""
    needs_whole_batch: bool = False
    """Whether a row's terms depend on the other rows of its batch."""

    reads_all_labels: bool = False
    """Whether a copy `of_class` still takes the labels of all classes: weights may come of them."""

    @property
    def is_mean_over_rows(self) -> bool:
        """Whether losses of pieces of a batch, weighed by their rows, make that of the batch."""
        return self.reduction == "mean" and not self.needs_whole_batch

    @abstractmethod
    def terms(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The unreduced loss.

        Args:
            logits: (B, C) of any float type; computed in float32 from here on (float64 stays).
            targets: (B, C) float 0..1, or (B,) int64 class indices, which losses for several labels
                read as one-hot rows (`as_multi_hot`).

        Returns:
            (B, C) or (B,) float32.
        """

    def sums_and_slopes(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor] | None:
        """The loss of G models at once with its derivative, where there is a closed form for both.

        Args:
            logits: (b, G, C) float32 of b rows by G models; may be overwritten.
            targets: of the b rows.

        Returns:
            (G,) terms as a mean over classes and a sum over rows, and their (b, G, C) derivative by
            the logits; None = leave it to autograd.
        """
        return None

    def of_class(self, index: int) -> Self:
        """A copy for (B, 1) logits of one class: of what is kept for each class, its share.

        Its targets are (B, 1) too, or (B, C) if it `reads_all_labels`.
        """
        one = copy.deepcopy(self)
        for module in one.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer[index : index + 1])
        return one

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """0-d float32 mean (or sum, see `reduction`) of `terms`."""
        terms = self.terms(logits, targets)
        return terms.sum() if self.reduction == "sum" else terms.mean()


class LossConfig(Config):
    """Options that every loss shares."""

    tasks: ClassVar[tuple[Task, ...]] = ("single_label", "multi_label")
    """Tasks that the loss is defined for; sigmoid losses take one label a row as a one-hot row."""
    needs_cosines: ClassVar[bool] = False
    """Whether it takes cosines in place of logits; `HeadConfig.gives_cosines` says who has them."""

    kind: str
    """Loss kind."""

    @abstractmethod
    def build(self, statistics: ClassStatistics) -> Loss:
        """The loss, with class counts taken from the rows that are trained on."""


def as_multi_hot(targets: Tensor, num_classes: int) -> Tensor:
    """(B, C) float32 targets from (B,) class indices; multi-hot ones as they are."""
    if targets.ndim == 1:
        return F.one_hot(targets, num_classes).float()
    return targets


def at_least_float32(logits: Tensor) -> Tensor:
    """Half precision as float32; wider types as they are."""
    return logits if logits.dtype == torch.float64 else logits.float()
