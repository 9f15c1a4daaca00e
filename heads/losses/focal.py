"""Focal loss: sigmoid cross-entropy with less weight on what is already right.

With p = σ(z), p_t = p for a positive and 1 − p for a negative, α_t = α and 1 − α likewise, for each
row and class:

    α_t (1 − p_t)^γ bce(z, y)

Reference: Lin et al., Focal Loss for Dense Object Detection, 2017, equation 5. Targets between 0
and 1 weigh the two sides, where the paper has 0 and 1 only.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, NonNegativeFloat
from torch import Tensor

from heads.losses.base import ClassStatistics, Loss, LossConfig
from heads.losses.tolerant import two_sided


class FocalConfig(LossConfig):
    """Sigmoid cross-entropy that looks away from elements that are right already."""

    aliases: ClassVar[Mapping[str, Mapping[str, Any]]] = {"FL": {"alpha": 0.5}}

    kind: Literal["focal"] = "focal"
    """Loss kind."""
    alpha: float | None = Field(default=0.25, ge=0, le=1)
    """Weight of positives, negatives have 1 minus it, 0..1; unset (null) = 1 for both."""
    gamma: NonNegativeFloat = 2.0
    """Focusing exponent, 0 or more; 0 = plain sigmoid cross-entropy."""

    def build(self, statistics: ClassStatistics) -> "Focal":
        """The loss; needs no counts."""
        return Focal(alpha=self.alpha, gamma=self.gamma)


class Focal(Loss):
    """α_t (1 − p_t)^γ bce."""

    def __init__(self, alpha: float | None = 0.25, gamma: float = 2.0) -> None:
        """Options as in `FocalConfig`."""
        super().__init__()
        self.alpha, self.gamma = alpha, gamma

    def terms(self, logits: Tensor, targets: Tensor) -> Tensor:
        """(B, C) float32; see `Loss.terms`."""
        return two_sided(logits, targets, gamma=self.gamma, alpha=self.alpha)
