"""Softmax cross-entropy of several linear classifiers on the same features, in one pass."""

from torch import Tensor

from heads.losses.stacked import StackedLinearLoss


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
