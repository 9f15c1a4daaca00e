"""Softmax cross-entropy, and of several linear classifiers on the same features in one pass.

With z logits and y the true class: log Σ_c exp z_c − z_y, for each row.

Reference: the negative log-likelihood of one label a row under a softmax.
"""

from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor

from featcache.manifest import Task
from heads.losses.base import ClassStatistics, Loss, LossConfig
from heads.losses.stacked import StackedLinearLoss


class CrossEntropyConfig(LossConfig):
    """Softmax cross-entropy over the classes of a single-label set."""

    tasks: ClassVar[tuple[Task, ...]] = ("single_label",)

    kind: Literal["cross_entropy"] = "cross_entropy"
    """Loss kind."""

    def build(self, statistics: ClassStatistics) -> "CrossEntropy":
        """The loss; needs no counts."""
        return CrossEntropy()


class CrossEntropy(Loss):
    """log Σ_c exp z_c − z_y."""

    def terms(self, logits: Tensor, targets: Tensor) -> Tensor:
        """(B,) float32; see `Loss.terms`."""
        return F.cross_entropy(logits.float(), targets, reduction="none")


def stacked_cross_entropy(
    features: Tensor, weights: list[Tensor], biases: list[Tensor], targets: Tensor
) -> Tensor:
    """(G,) mean softmax cross-entropy of each of G linear classifiers.

    Equals `F.cross_entropy(F.linear(features, weights[g], biases[g]), targets)` for each g.

    Args:
        features: (B, D); gets no gradient.
        weights: G times (C, D).
        biases: G times (C,), or an empty list.
        targets: (B,) int64 class indices.
    """
    losses: Tensor = StackedLinearLoss.apply(
        features, targets, _loss_and_gradient, len(weights), *weights, *biases
    )
    return losses


def _loss_and_gradient(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    log_probabilities = logits.log_softmax(-1)
    own = targets[:, None, None].expand(-1, logits.shape[1], 1)
    loss = -log_probabilities.gather(2, own).sum((0, 2))
    gradient = log_probabilities.exp_()
    gradient.scatter_add_(2, own, gradient.new_full((), -1.0).expand_as(own))
    return loss, gradient
