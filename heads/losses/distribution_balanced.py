"""Distribution-balanced loss (DB): re-balanced weights, tolerance for negatives, and focusing.

With u = z + ν, ν_c = −κ log(N / n_c − 1), ζ the scale of negatives, q_t = σ(u) for a positive and
σ(−ζu) for a negative, and r̂ the re-balancing weight (`heads.losses.rebalanced`), each row and class
has

    λ φ (1 − q_t)^γ r̂ [ y softplus(−u) + (1 − y) softplus(ζu) / ζ ],   λ = `loss_weight`

without φ and the power of γ if not `focal`.

Reference: Wu et al., Distribution-Balanced Loss for Multi-Label Classification in Long-Tailed
Datasets, 2020, equations 4-9. Rows without a label have r = 1. ν is not divided by ζ (their first
code does; `ntr_divide`), n_c is held between 1 and N − 1, and evaluation mode leaves ν out.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, PositiveFloat

from heads.losses.base import ClassStatistics, LossConfig
from heads.losses.frequency import RebalanceOptions
from heads.losses.negative_tolerant import ToleranceOptions
from heads.losses.weighted import Weighted


class DistributionBalancedConfig(RebalanceOptions, ToleranceOptions, LossConfig):
    """Re-balanced, negative-tolerant focal loss for long-tailed sets of several labels."""

    aliases: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "dbl": {},
        "DBloss": {},
        "DBloss-noFocal": {"focal": False, "loss_weight": 0.5},
    }

    kind: Literal["distribution_balanced"] = "distribution_balanced"
    """Loss kind."""
    balance: PositiveFloat = 2.0
    """Multiplier φ of the focal form, > 0; not read if `alpha` is set."""
    alpha: float | None = Field(default=None, ge=0, le=1)
    """Weight of positives in the focal form, negatives have 1 minus it, 0..1, in place of
    `balance`."""
    loss_weight: PositiveFloat = 1.0
    """Multiplier λ of the whole loss, > 0."""

    def build(self, statistics: ClassStatistics) -> Weighted:
        """The loss for classes of these counts."""
        balance = self.balance if self.focal and self.alpha is None else 1.0
        inner = self.tolerant(statistics, self.alpha)
        return Weighted(inner, self.label_weights(statistics), self.loss_weight * balance)
