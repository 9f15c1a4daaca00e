"""Negative-tolerant regularisation (NTR): negatives of rare classes are pushed down less.

With u = z + ν, ν_c = −κ log(N / n_c − 1) and ζ the scale of negatives, for each row and class

    y softplus(−u) + (1 − y) softplus(ζu) / ζ,

times α_t (1 − q_t)^γ with q_t = σ(u) for a positive and σ(−ζu) for a negative (`focal`).

Reference: Wu et al., Distribution-Balanced Loss for Multi-Label Classification in Long-Tailed
Datasets, 2020, equations 6-8. ν is not divided by ζ (their first code does; `ntr_divide`), n_c is
held between 1 and N − 1, and ν belongs to training: evaluation mode leaves it out, and predictions
are made of the logits as the head gives them.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import Tensor

from featcache.config import Config
from heads.losses.base import ClassStatistics, Loss, LossConfig
from heads.losses.frequency import logit_shift
from heads.losses.tolerant import two_sided


class ToleranceOptions(Config):
    """Options of the losses with tolerance for negatives."""

    init_bias: NonNegativeFloat = 0.05
    """Multiplier κ of the logit of each class's share of rows, 0 or more."""
    neg_scale: PositiveFloat = 2.0
    """Scale ζ of negatives, > 0: more = wrong ones weigh more, right ones less; published: 2 for
    COCO, 5 for VOC."""
    ntr_divide: bool = False
    """Divide the class offsets by `neg_scale`, as the published vision code does."""
    focal: bool = True
    """Weigh elements down that are right already."""
    gamma: NonNegativeFloat = 2.0
    """Focusing exponent, 0 or more; read with `focal`."""

    def tolerant(self, statistics: ClassStatistics, alpha: float | None) -> "NegativeTolerant":
        """The loss for classes of these counts; `alpha` is read with `focal`."""
        shift = logit_shift(statistics, self.init_bias)
        return NegativeTolerant(
            shift / self.neg_scale if self.ntr_divide else shift,
            neg_scale=self.neg_scale,
            gamma=self.gamma if self.focal else 0.0,
            alpha=alpha if self.focal else None,
        )


class NegativeTolerantConfig(ToleranceOptions, LossConfig):
    """Focal loss with tolerance for negatives, without re-balancing."""

    aliases: ClassVar[Mapping[str, Mapping[str, Any]]] = {"NTR-Focal": {}}

    kind: Literal["negative_tolerant"] = "negative_tolerant"
    """Loss kind."""
    alpha: float | None = Field(default=0.5, ge=0, le=1)
    """Weight of positives in the focal form, negatives have 1 minus it, 0..1; unset (null) = 1 for
    both."""

    def build(self, statistics: ClassStatistics) -> "NegativeTolerant":
        """The loss for classes of these counts."""
        return self.tolerant(statistics, self.alpha)


class NegativeTolerant(Loss):
    """Sigmoid terms on logits shifted by class, negatives scaled."""

    shift: Tensor

    def __init__(
        self,
        shift: Tensor,
        *,
        neg_scale: float = 2.0,
        gamma: float = 2.0,
        alpha: float | None = 0.5,
    ) -> None:
        """The loss with ν given.

        Args:
            shift: (C,) ν.
            neg_scale: ζ > 0.
            gamma: focusing exponent, 0 = not focal.
            alpha: α of α_t, None = 1 for both sides.
        """
        super().__init__()
        self.register_buffer("shift", shift, persistent=False)
        self.neg_scale, self.gamma, self.alpha = neg_scale, gamma, alpha

    def terms(self, logits: Tensor, targets: Tensor) -> Tensor:
        """(B, C) float32; see `Loss.terms`."""
        return two_sided(
            logits,
            targets,
            gamma=self.gamma,
            alpha=self.alpha,
            shift=self.shift if self.training else None,
            neg_scale=self.neg_scale,
        )
