"""Sigmoid cross-entropy.

With z logits and y in 0..1: softplus(z) − y z, for each row and class.

Reference: the negative log-likelihood of independent Bernoulli labels.
"""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from heads.losses.base import (
    ClassStatistics,
    Loss,
    LossConfig,
    as_multi_hot,
    at_least_float32,
)


class BinaryCrossEntropyConfig(LossConfig):
    """Sigmoid cross-entropy of each class by itself."""

    kind: Literal["bce"] = "bce"
    """Loss kind."""

    def build(self, statistics: ClassStatistics) -> "BinaryCrossEntropy":
        """The loss; needs no counts."""
        return BinaryCrossEntropy()


class BinaryCrossEntropy(Loss):
    """softplus(z) − y z."""

    def terms(self, logits: Tensor, targets: Tensor) -> Tensor:
        """(B, C) float32; see `Loss.terms`."""
        logits = at_least_float32(logits)
        return F.softplus(logits) - as_multi_hot(targets, logits.shape[-1]) * logits

    def sums_and_slopes(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor] | None:
        """softplus(z) − y z and σ(z) − y; see `Loss.sums_and_slopes`."""
        num_classes = logits.shape[-1]
        wanted = as_multi_hot(targets, num_classes)[:, None, :]
        loss = (F.softplus(logits) - wanted * logits).sum((0, 2)) / num_classes
        return loss, logits.sigmoid_().sub_(wanted).div_(num_classes)
