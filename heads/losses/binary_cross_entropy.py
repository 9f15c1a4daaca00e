"""Sigmoid cross-entropy, and of several linear classifiers on the same features in one pass.

With z logits and y in 0..1: softplus(z) − y z, for each row and class.

Reference: the negative log-likelihood of independent Bernoulli labels.
"""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from heads.losses.base import ClassStatistics, Loss, LossConfig, as_multi_hot, at_least_float32
from heads.losses.stacked import StackedLinearLoss


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


def stacked_binary_cross_entropy(
    features: Tensor, weights: list[Tensor], biases: list[Tensor], targets: Tensor
) -> Tensor:
    """(G,) sigmoid cross-entropy of each of G linear classifiers, mean over rows and classes.

    Equals `F.binary_cross_entropy_with_logits(F.linear(features, weights[g], biases[g]), targets)`
    for each g: the mean of softplus(z) − y z.

    Args:
        features: (B, D); gets no gradient.
        weights: G times (C, D).
        biases: G times (C,), or an empty list.
        targets: (B, C) float 0..1.
    """
    losses: Tensor = StackedLinearLoss.apply(
        features, targets, _loss_and_gradient, len(weights), *weights, *biases
    )
    return losses


def _loss_and_gradient(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    wanted = targets[:, None, :]
    num_classes = logits.shape[-1]
    loss = (F.softplus(logits) - wanted * logits).sum((0, 2)) / num_classes
    return loss, logits.sigmoid_().sub_(wanted).div_(num_classes)
