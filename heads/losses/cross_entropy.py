"""Softmax cross-entropy, smoothed, weighted by class, or adjusted to class frequencies.

With z logits, y the true class, ε the smoothing, w class weights, π_c = n_c / N and τ the strength
of the adjustment, z′ = z + τ log π in training, for each row:

    −Σ_c w_c q_c log softmax(z′)_c,   q = (1 − ε) one-hot(y) + ε / C

Reference: the negative log-likelihood of one label a row under a softmax; smoothing: Szegedy et
al., Rethinking the Inception Architecture for Computer Vision, 2016, section 7; adjustment: Menon
et al., Long-Tail Learning via Logit Adjustment, 2021, equation 10. Class weights are brought to a
mean of 1 over the training rows, so that they leave the size of the loss, and of steps, as it is.
"""

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat
from torch import Tensor

from featcache.manifest import Task
from heads.losses.base import ClassStatistics, Loss, LossConfig, at_least_float32
from heads.losses.frequency import effective_number_weights, seen_counts

Weighting = Literal["none", "inverse", "sqrt_inverse", "class_balanced"]


class CrossEntropyConfig(LossConfig):
    """Softmax cross-entropy over the classes of a single-label set."""

    tasks: ClassVar[tuple[Task, ...]] = ("single_label",)

    kind: Literal["cross_entropy"] = "cross_entropy"
    """Loss kind."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of each label that is spread over all classes, 0 to below 1."""
    class_weights: Weighting = "none"
    """none; inverse = N / n_c; sqrt_inverse = its root; class_balanced = by the effective number of
    rows, (1 − β) / (1 − β^n_c)."""
    beta: float = Field(default=0.999, ge=0, lt=1)
    """β of `class_weights=class_balanced`, 0 to below 1."""
    logit_adjustment: NonNegativeFloat = 0.0
    """Strength τ with which the log of each class's share of the rows is added to its logit while
    training, 0 or more: 1 = what predicts well if all classes were equally frequent."""

    def build(self, statistics: ClassStatistics) -> "CrossEntropy":
        """The loss for classes of these counts."""
        shift = None
        if self.logit_adjustment:
            shares = seen_counts(statistics) / max(statistics.num_rows, 1)
            shift = (self.logit_adjustment * shares.log()).float()
        return CrossEntropy(self.label_smoothing, self._weights(statistics), shift)

    def _weights(self, statistics: ClassStatistics) -> Tensor | None:
        """(C,) float32 of mean 1 over the training rows."""
        if self.class_weights == "none":
            return None
        counts = seen_counts(statistics)
        if self.class_weights == "class_balanced":
            weights = effective_number_weights(counts, self.beta)
        else:
            weights = counts.reciprocal()
            if self.class_weights == "sqrt_inverse":
                weights = weights.sqrt()
        rows = torch.from_numpy(statistics.counts).double()
        return (weights * rows.sum() / (weights * rows).sum()).float()


class CrossEntropy(Loss):
    """log Σ_c exp z_c − z_y, smoothed, weighted and adjusted."""

    reads_multi_hot = False
    weights: Tensor | None
    shift: Tensor | None

    def __init__(
        self,
        label_smoothing: float = 0.0,
        weights: Tensor | None = None,
        shift: Tensor | None = None,
    ) -> None:
        """The loss with its class numbers given.

        Args:
            label_smoothing: ε.
            weights: (C,) float32 w, None = 1.
            shift: (C,) float32 τ log π, added while training.
        """
        super().__init__()
        self.label_smoothing = label_smoothing
        self.register_buffer("weights", weights, persistent=False)
        self.register_buffer("shift", shift, persistent=False)

    def terms(self, logits: Tensor, targets: Tensor) -> Tensor:
        """(B,) float32; see `Loss.terms`."""
        logits = at_least_float32(logits)
        if self.shift is not None and self.training:
            logits = logits + self.shift
        return F.cross_entropy(
            logits,
            targets,
            None if self.weights is None else self.weights.to(logits.dtype),
            reduction="none",
            label_smoothing=self.label_smoothing,
        )

    def sums_and_slopes(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor] | None:
        """The plain form; see `Loss.sums_and_slopes`."""
        if self.label_smoothing or self.weights is not None or self.shift is not None:
            return None
        own = targets[:, None, None].expand(-1, logits.shape[1], 1)
        # Written out in place: torch's softmax over a few classes is five times as slow.
        peak = logits.amax(-1, keepdim=True)
        below = logits.gather(2, own) - peak
        exponentials = logits.sub_(peak).exp_()
        total = exponentials.sum(-1, keepdim=True)
        loss = (total.log() - below).sum((0, 2))
        gradient = exponentials.div_(total)
        gradient.scatter_add_(2, own, gradient.new_full((), -1.0).expand_as(own))
        return loss, gradient
