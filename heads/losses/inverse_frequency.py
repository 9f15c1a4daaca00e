"""Sigmoid cross-entropy weighted by how rare a class is.

With w_c = N / n_c, or its square root, for each row and class: w_c bce(z, y).

Reference: weights as in Mahajan et al., Exploring the Limits of Weakly Supervised Pretraining, 2018
(square root), and plain inverse frequency. A class without rows counts as one of a single row.
"""

from typing import Literal

from pydantic import PositiveFloat

from heads.losses.base import ClassStatistics, LossConfig
from heads.losses.focal import Focal
from heads.losses.frequency import ClassWeights, seen_counts
from heads.losses.weighted import Weighted


class InverseFrequencyConfig(LossConfig):
    """Sigmoid cross-entropy with weights N / n_c or their roots."""

    kind: Literal["inverse_frequency"] = "inverse_frequency"
    """Loss kind."""
    mode: Literal["inverse", "sqrt"] = "inverse"
    """inverse = N / n_c; sqrt = its square root."""
    loss_weight: PositiveFloat = 1.0
    """Multiplier of the whole loss, > 0."""

    def build(self, statistics: ClassStatistics) -> Weighted:
        """The loss for classes of these counts."""
        weights = statistics.num_rows / seen_counts(statistics)
        if self.mode == "sqrt":
            weights = weights.sqrt()
        return Weighted(Focal(None, 0.0), ClassWeights(weights.float()), self.loss_weight)
