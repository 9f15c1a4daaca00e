"""Class-balanced loss with tolerance for negatives (CB-NTR).

Effective-number weights (`heads.losses.class_balanced`) times negative-tolerant terms
(`heads.losses.negative_tolerant`), for each row and class:

    λ w α_t (1 − q_t)^γ [ y softplus(−u) + (1 − y) softplus(ζu) / ζ ],   λ = `loss_weight`

Reference: Huang et al., Balancing Methods for Multi-label Text Classification with Long-Tailed
Class Distribution, 2021, section 3 (CB-NTR). Edge cases as in the two losses it is made of.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, PositiveFloat

from heads.losses.base import ClassStatistics, LossConfig
from heads.losses.frequency import EffectiveNumberOptions
from heads.losses.negative_tolerant import ToleranceOptions
from heads.losses.weighted import Weighted


class ClassBalancedNTRConfig(EffectiveNumberOptions, ToleranceOptions, LossConfig):
    """Negative-tolerant focal loss weighted by the effective number of rows."""

    aliases: ClassVar[Mapping[str, Mapping[str, Any]]] = {"CBloss-ntr": {}}

    kind: Literal["class_balanced_ntr"] = "class_balanced_ntr"
    """Loss kind."""
    alpha: float | None = Field(default=0.5, ge=0, le=1)
    """Weight of positives in the focal form, negatives have 1 minus it, 0..1; unset (null) = 1 for
    both."""
    loss_weight: PositiveFloat = 10.0
    """Multiplier of the whole loss, > 0: the weights of all but rare classes are near 1 − β."""

    def build(self, statistics: ClassStatistics) -> Weighted:
        """The loss for classes of these counts."""
        inner = self.tolerant(statistics, self.alpha)
        return Weighted(inner, self.label_weights(statistics), self.loss_weight)
