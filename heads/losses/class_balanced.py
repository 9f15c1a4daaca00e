"""Class-balanced loss (CB): weights by the effective number of rows of a class.

With w = (1 − β) / (1 − β^n), n the rows of the class (or of a row's labels, see `mode`), each row
and class has

    λ w α_t (1 − p_t)^γ bce(z, y),   λ = `loss_weight`; without `focal`, λ w bce(z, y)

Reference: Cui et al., Class-Balanced Loss Based on Effective Number of Samples, 2019, equations 8
and 12; the modes over a row's labels are those of the distribution-balanced loss's authors. A class
without rows counts as one of a single row; a row without labels has the least weight, 1 − β.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat

from heads.losses.base import ClassStatistics, LossConfig
from heads.losses.focal import Focal
from heads.losses.frequency import EffectiveNumberOptions
from heads.losses.weighted import Weighted


class ClassBalancedConfig(EffectiveNumberOptions, LossConfig):
    """Focal loss weighted by the effective number of rows."""

    aliases: ClassVar[Mapping[str, Mapping[str, Any]]] = {"CBloss": {}}

    kind: Literal["class_balanced"] = "class_balanced"
    """Loss kind."""
    focal: bool = True
    """Weigh elements down that are right already."""
    gamma: NonNegativeFloat = 2.0
    """Focusing exponent, 0 or more; read with `focal`."""
    alpha: float | None = Field(default=0.5, ge=0, le=1)
    """Weight of positives in the focal form, negatives have 1 minus it, 0..1; unset (null) = 1 for
    both."""
    loss_weight: PositiveFloat = 10.0
    """Multiplier of the whole loss, > 0: the weights of all but rare classes are near 1 − β."""

    def build(self, statistics: ClassStatistics) -> Weighted:
        """The loss for classes of these counts."""
        inner = Focal(self.alpha, self.gamma) if self.focal else Focal(None, 0.0)
        return Weighted(inner, self.label_weights(statistics), self.loss_weight)
