"""Asymmetric loss (ASL): negatives are focused harder than positives, easy ones dropped at all.

With p = σ(z) and p_m = max(p − clip, 0), for each row and class:

    −[ y (1 − p)^γ₊ log p + (1 − y) p_m^γ₋ log(1 − p_m) ],   logarithms not below log(eps)

Reference: Ridnik et al., Asymmetric Loss For Multi-Label Classification, 2021, equations 4-7. As in
the authors' code the gradient does not go through the focusing factor unless asked for.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat
from torch import Tensor

from heads.losses.base import (
    ClassStatistics,
    Loss,
    LossConfig,
    as_multi_hot,
    at_least_float32,
)


class AsymmetricConfig(LossConfig):
    """Sigmoid loss with one focusing exponent for positives and one for negatives."""

    kind: Literal["asl"] = "asl"
    """Loss kind."""
    gamma_neg: NonNegativeFloat = 4.0
    """Focusing exponent of negatives, 0 or more."""
    gamma_pos: NonNegativeFloat = 0.0
    """Focusing exponent of positives, 0 or more; the authors' library has 1."""
    clip: float = Field(default=0.05, ge=0, lt=1)
    """Probability taken off negatives, so that those below it have no loss, 0 to below 1."""
    eps: float = Field(default=1e-8, gt=0, lt=1)
    """Least value that a logarithm is taken of, above 0 and below 1."""
    detach_focusing: bool = True
    """Take the focusing factor for a constant in the gradient, as the authors do."""
    reduction: Literal["mean", "sum"] = "mean"
    """mean = over rows and classes; sum = over both, as ML-Decoder is trained: its size, and with
    it the learning rate that fits, depends on the batch."""

    def build(self, statistics: ClassStatistics) -> "Asymmetric":
        """The loss; needs no counts."""
        return Asymmetric(
            gamma_neg=self.gamma_neg,
            gamma_pos=self.gamma_pos,
            clip=self.clip,
            eps=self.eps,
            detach_focusing=self.detach_focusing,
            reduction=self.reduction,
        )


class Asymmetric(Loss):
    """Positives focused by γ₊, negatives shifted by `clip` and focused by γ₋."""

    def __init__(
        self,
        *,
        gamma_neg: float = 4.0,
        gamma_pos: float = 0.0,
        clip: float = 0.05,
        eps: float = 1e-8,
        detach_focusing: bool = True,
        reduction: Literal["mean", "sum"] = "mean",
    ) -> None:
        """Options as in `AsymmetricConfig`."""
        super().__init__()
        self.gamma_neg, self.gamma_pos, self.clip, self.eps = gamma_neg, gamma_pos, clip, eps
        self.detach_focusing, self.reduction = detach_focusing, reduction

    def terms(self, logits: Tensor, targets: Tensor) -> Tensor:
        """(B, C) float32; see `Loss.terms`."""
        logits = at_least_float32(logits)
        wanted = as_multi_hot(targets, logits.shape[-1]).to(logits.dtype)
        right, left = torch.sigmoid(logits), torch.sigmoid(-logits)  # 1 − p without cancellation
        kept = (left + self.clip).clamp(max=1.0)  # 1 − p_m
        floor = torch.log(logits.new_tensor(self.eps))
        positive = torch.maximum(F.logsigmoid(logits), floor)
        negative = torch.log(kept.clamp(min=self.eps))
        if self.gamma_pos:
            positive = positive * self._power(left, F.logsigmoid(-logits), self.gamma_pos)
        if self.gamma_neg:
            shifted = (right - self.clip).clamp(min=0.0)  # p_m
            negative = negative * self._power(shifted, None, self.gamma_neg)
        return -torch.lerp(negative, positive, wanted)

    def _power(self, base: Tensor, log_base: Tensor | None, exponent: float) -> Tensor:
        """base^exponent, a constant in the gradient if so chosen."""
        if self.detach_focusing:
            return base.detach().pow(exponent)
        if log_base is not None:
            return torch.exp(exponent * log_base)
        # The slope of 0^γ is infinite for γ < 1; there the term has no gradient at all.
        inside = base > 0
        return torch.where(inside, base, torch.ones_like(base)).pow(exponent) * inside
