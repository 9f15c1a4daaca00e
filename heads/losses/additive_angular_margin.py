"""Additive angular margin (AAM): positives have to be right by an angle.

With cos θ_c the cosine between a row's feature and class c's weight, s a scale and m the margin:

    z_c = s [ y cos(θ_c + m) + (1 − y) cos θ_c ] + offset,   loss = softplus(z) − y z

and cos θ − m sin m in place of cos(θ + m) where θ + m > π, so that it keeps falling.

Reference: Deng et al., ArcFace: Additive Angular Margin Loss for Deep Face Recognition, 2019,
equation 3. Departs from it in the sigmoids, for several labels a row, and in the offset: one
learned number that brings the decision to a probability of 0.5.
"""

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor

from heads.losses.base import (
    ClassStatistics,
    Loss,
    LossConfig,
    as_multi_hot,
    at_least_float32,
)
from heads.losses.tolerant import two_sided


class AdditiveAngularMarginConfig(LossConfig):
    """Sigmoid cross-entropy on scaled cosines, with an angle between positives and the rest."""

    needs_cosines: ClassVar[bool] = True

    kind: Literal["aam"] = "aam"
    """Loss kind."""
    scale: PositiveFloat = 30.0
    """Multiplier s of the cosines, > 0."""
    margin: float = Field(default=0.5, ge=0, lt=math.pi / 2)
    """Angle m that positives have to be right by, radians, 0 to below π/2."""

    def build(self, statistics: ClassStatistics) -> "AdditiveAngularMargin":
        """The loss; needs no counts."""
        return AdditiveAngularMargin(self.scale, self.margin)


class AdditiveAngularMargin(Loss):
    """Takes cosines, not logits; prediction is scale · cosine + offset, without a margin."""

    needs_cosines = True

    def __init__(self, scale: float = 30.0, margin: float = 0.5) -> None:
        """Options as in `AdditiveAngularMarginConfig`."""
        super().__init__()
        self.scale, self.margin = scale, margin

    def logits(self, cosines: Tensor, targets: Tensor) -> Tensor:
        """(B, C) float32 s [y cos(θ + m) + (1 − y) cos θ].

        Args:
            cosines: (B, C), -1..1 but for rounding.
            targets: (B, C) float 0..1.
        """
        cosines = at_least_float32(cosines)
        # The root has no slope at 0; what is cut off is below the rounding of a cosine.
        least = torch.finfo(cosines.dtype).eps
        sines = (1.0 - cosines.square()).clamp(min=least).sqrt()
        turned = cosines * math.cos(self.margin) - sines * math.sin(self.margin)
        beyond = cosines < -math.cos(self.margin)  # θ > π − m
        turned = torch.where(beyond, cosines - self.margin * math.sin(self.margin), turned)
        return self.scale * torch.lerp(cosines, turned, targets.to(cosines.dtype))

    def terms(self, logits: Tensor, targets: Tensor, offset: Tensor | float = 0.0) -> Tensor:
        """(B, C) float32 of cosines (in place of logits), and the learned offset.

        Args:
            logits: (B, C) cosines of features and class weights.
            targets: see `Loss.terms`.
            offset: added to the scaled cosines.
        """
        wanted = as_multi_hot(targets, logits.shape[-1])
        return two_sided(self.logits(logits, wanted) + offset, wanted)
