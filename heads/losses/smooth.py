"""Sigmoid cross-entropy with smoothed labels.

With y′ = y (1 − ε) + ε / 2, for each row and class: softplus(z) − y′ z.

Reference: Szegedy et al., Rethinking the Inception Architecture for Computer Vision, 2016, section
7, for each class by itself: two outcomes, so each label moves by ε / 2.
"""

from typing import Literal

from pydantic import Field
from torch import Tensor

from heads.losses.base import ClassStatistics, Loss, LossConfig, as_multi_hot
from heads.losses.tolerant import two_sided


class SmoothConfig(LossConfig):
    """Sigmoid cross-entropy that asks for a little less than certainty."""

    kind: Literal["smooth"] = "smooth"
    """Loss kind."""
    epsilon: float = Field(default=0.1, gt=0, lt=1)
    """Share ε of each label that is evened out, above 0 and below 1; without it, choose bce."""

    def build(self, statistics: ClassStatistics) -> "Smooth":
        """The loss; needs no counts."""
        return Smooth(self.epsilon)


class Smooth(Loss):
    """Sigmoid cross-entropy with y (1 − ε) + ε / 2."""

    def __init__(self, epsilon: float = 0.1) -> None:
        """Options as in `SmoothConfig`."""
        super().__init__()
        self.epsilon = epsilon

    def terms(self, logits: Tensor, targets: Tensor) -> Tensor:
        """(B, C) float32; see `Loss.terms`."""
        wanted = as_multi_hot(targets, logits.shape[-1])
        return two_sided(logits, wanted * (1.0 - self.epsilon) + self.epsilon / 2)
