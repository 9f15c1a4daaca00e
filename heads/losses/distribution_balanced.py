"""Distribution-balanced loss (DB): re-balanced weights, tolerance for negatives, and focusing.

With u = z + ν, ν_c = −κ log(N / n_c − 1), ζ the scale of negatives, q_t = σ(u) for a positive and
σ(−ζu) for a negative, and r̂ the re-balancing weight (`heads.losses.rebalanced`), each element has

    φ (1 − q_t)^γ r̂ [ y softplus(−u) + (1 − y) softplus(ζu) / ζ ]

Reference: Wu et al., Distribution-Balanced Loss for Multi-Label Classification in Long-Tailed
Datasets, 2020, equations 4-9. Rows without a label have r = 1. ν is not divided by ζ (their first
code does; `ntr_divide`), n_c is held between 1 and N − 1, and evaluation mode leaves ν out.
"""

from typing import Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import Tensor

from heads.losses.base import ClassStatistics, as_multi_hot
from heads.losses.frequency import WeightNorm, inverse_counts, normalised, rebalance_weights
from heads.losses.negative_tolerant import NegativeTolerant, ToleranceConfig


class DistributionBalancedConfig(ToleranceConfig):
    """Re-balanced, negative-tolerant focal loss for long-tailed sets of several labels."""

    kind: Literal["distribution_balanced"] = "distribution_balanced"
    """Loss kind."""
    balance: PositiveFloat = 2.0
    """Multiplier φ of the focal form, > 0; not read with `alpha` or without `focal`."""
    alpha: float | None = Field(default=None, ge=0, le=1)
    """Weight of positives in the focal form, negatives have 1 minus it, 0..1; unset = both have
    `balance`."""
    map_alpha: NonNegativeFloat = 0.1
    """Least re-balancing weight a, 0 or more."""
    map_beta: PositiveFloat = 10.0
    """Slope b of the re-balancing weight, > 0."""
    map_gamma: float = 0.2
    """Centre μ of the re-balancing weight; published: 0.2 for COCO, 0.3 for VOC."""
    weight_norm: WeightNorm = "none"
    """by_instance = divide a row's weights by their largest; by_batch = by the batch's largest."""

    def build(self, statistics: ClassStatistics) -> "DistributionBalanced":
        """The loss for classes of these counts."""
        return DistributionBalanced(
            shift=self.shift(statistics),
            inverse=inverse_counts(statistics),
            neg_scale=self.neg_scale,
            gamma=self.gamma if self.focal else 0.0,
            alpha=self.alpha if self.focal else None,
            multiplier=self.loss_weight
            * (self.balance if self.focal and self.alpha is None else 1.0),
            map_alpha=self.map_alpha,
            map_beta=self.map_beta,
            map_gamma=self.map_gamma,
            weight_norm=self.weight_norm,
        )


class DistributionBalanced(NegativeTolerant):
    """Negative-tolerant terms times the re-balancing weight of each row and class."""

    inverse: Tensor

    def __init__(
        self,
        shift: Tensor,
        inverse: Tensor,
        *,
        neg_scale: float = 2.0,
        gamma: float = 2.0,
        alpha: float | None = None,
        multiplier: float = 2.0,
        map_alpha: float = 0.1,
        map_beta: float = 10.0,
        map_gamma: float = 0.2,
        weight_norm: WeightNorm = "none",
    ) -> None:
        """The loss with ν and 1 / n_c given.

        Args:
            shift: (C,) ν.
            inverse: (C,) 1 / n_c.
            neg_scale: ζ > 0.
            gamma: focusing exponent, 0 = not focal.
            alpha: α of α_t, None = 1 for both sides.
            multiplier: of every term.
            map_alpha: a, the least weight.
            map_beta: b, the slope of the weights.
            map_gamma: μ, their centre.
            weight_norm: see `DistributionBalancedConfig.weight_norm`.
        """
        super().__init__(
            shift, neg_scale=neg_scale, gamma=gamma, alpha=alpha, multiplier=multiplier
        )
        self.register_buffer("inverse", inverse, persistent=False)
        self.map_alpha, self.map_beta, self.map_gamma = map_alpha, map_beta, map_gamma
        self.weight_norm: WeightNorm = weight_norm
        self.needs_whole_batch = weight_norm == "by_batch"

    def terms(self, logits: Tensor, targets: Tensor) -> Tensor:
        """(B, C) float32; see `Loss.terms`."""
        wanted = as_multi_hot(targets, logits.shape[-1])
        weights = rebalance_weights(
            wanted,
            self.inverse,
            offset=self.map_alpha,
            slope=self.map_beta,
            centre=self.map_gamma,
        )
        return super().terms(logits, wanted) * normalised(weights, self.weight_norm)
