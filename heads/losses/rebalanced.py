"""Re-balanced cross-entropy (R-BCE): rows count less where sampling would repeat them.

With r_ic = (1 / n_c) / Σ_{j: y_ij = 1} 1 / n_j and r̂ = a + σ(b (r − μ)), for each row and class

    r̂_ic bce(z, y),   times (1 − p_t)^γ if `focal`

Reference: Wu et al., Distribution-Balanced Loss for Multi-Label Classification in Long-Tailed
Datasets, 2020, equations 3-5. Rows without a label have r = 1.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import NonNegativeFloat

from heads.losses.base import ClassStatistics, LossConfig
from heads.losses.focal import Focal
from heads.losses.frequency import RebalanceOptions
from heads.losses.weighted import Weighted


class RebalancedConfig(RebalanceOptions, LossConfig):
    """Sigmoid cross-entropy with re-balancing weights."""

    aliases: ClassVar[Mapping[str, Mapping[str, Any]]] = {"R-BCE-Focal": {"focal": True}}

    kind: Literal["rebalanced"] = "rebalanced"
    """Loss kind."""
    focal: bool = False
    """Weigh elements down that are right already."""
    gamma: NonNegativeFloat = 2.0
    """Focusing exponent, 0 or more; read with `focal`."""

    def build(self, statistics: ClassStatistics) -> Weighted:
        """The loss for classes of these counts."""
        inner = Focal(alpha=None, gamma=self.gamma if self.focal else 0.0)
        return Weighted(inner, self.label_weights(statistics))
