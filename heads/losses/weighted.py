"""Terms of one loss times weights made of the labels, as losses for long-tailed sets are."""

import copy
from typing import Self

from torch import Tensor, nn

from heads.losses.base import Loss, as_multi_hot


class LabelWeights(nn.Module):
    """Weights (B, C), (B, 1) or (1, C) from (B, C) labels 0..1; subclasses define `forward`."""

    needs_whole_batch: bool = False
    """Whether a row's weights depend on the other rows of its batch."""


class Weighted(Loss):
    """multiplier · weights(targets) · terms(logits, targets)."""

    index: int | None = None
    """The one class whose logits it takes; None = all."""

    def __init__(self, inner: Loss, weights: LabelWeights, multiplier: float = 1.0) -> None:
        """The loss from its factors.

        Args:
            inner: gives (B, C) terms.
            weights: makes weights of labels.
            multiplier: of every term.
        """
        super().__init__()
        self.inner, self.weights, self.multiplier = inner, weights, multiplier
        self.needs_whole_batch = weights.needs_whole_batch

    def of_class(self, index: int) -> Self:
        """A copy for one class's logits whose weights are those that the class has among all."""
        one = copy.deepcopy(self)
        one.inner, one.index, one.reads_all_labels = self.inner.of_class(index), index, True
        return one

    def terms(self, logits: Tensor, targets: Tensor) -> Tensor:
        """(B, C) float32; see `Loss.terms`."""
        wanted = as_multi_hot(targets, logits.shape[-1])
        weights: Tensor = self.weights(wanted)
        if self.index is not None:
            wanted = wanted[:, self.index, None]
            if weights.shape[1] > 1:
                weights = weights[:, self.index, None]
        return self.multiplier * weights * self.inner.terms(logits, wanted)
