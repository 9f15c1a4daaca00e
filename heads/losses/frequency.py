"""Weights and offsets from class frequencies, shared by the losses for long-tailed sets.

n_c is the number of training rows with class c, N that of all training rows. A class without rows
counts as one of a single row.
"""

import math
from typing import Literal

import numpy as np
import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import Tensor

from featcache.config import Config
from heads.losses.base import ClassStatistics
from heads.losses.weighted import LabelWeights

WeightNorm = Literal["none", "by_instance", "by_batch"]
CountMode = Literal["by_class", "average_n", "average_w", "min_n"]


def seen_counts(statistics: ClassStatistics) -> Tensor:
    """(C,) float64 n_c, at least 1."""
    return torch.from_numpy(np.maximum(statistics.counts, 1)).double()


def effective_number_weights(counts: Tensor, beta: float) -> Tensor:
    """(1 − β) / (1 − β^n) for any tensor of counts >= 1, in its dtype; between 1 − β and 1.

    Args:
        counts: n.
        beta: 0 to below 1.
    """
    log_beta = math.log(beta) if beta > 0 else -math.inf
    return (1.0 - beta) / -torch.expm1(counts * log_beta)


def logit_shift(statistics: ClassStatistics, init_bias: float) -> Tensor:
    """(C,) float32 ν_c = −κ log(N / n_c − 1), the logit of a class's share of rows times κ.

    n_c is held between 1 and N − 1: a class in all rows or in none would shift by infinity.

    Args:
        statistics: n_c and N.
        init_bias: κ, 0 or more.
    """
    num_rows = max(statistics.num_rows, 2)
    counts = seen_counts(statistics).clamp(max=num_rows - 1)
    return (-init_bias * torch.log(num_rows / counts - 1.0)).float()


class RebalanceOptions(Config):
    """Options of the losses with re-balancing weights."""

    map_alpha: NonNegativeFloat = 0.1
    """Least re-balancing weight a, 0 or more."""
    map_beta: PositiveFloat = 10.0
    """Slope b of the re-balancing weight, > 0."""
    map_gamma: float = 0.2
    """Centre μ of the re-balancing weight; published: 0.2 for COCO, 0.3 for VOC."""
    weight_norm: WeightNorm = "none"
    """by_instance = divide a row's weights by their largest; by_batch = by the batch's largest."""

    def label_weights(self, statistics: ClassStatistics) -> "RebalanceWeights":
        """What makes weights of labels."""
        return RebalanceWeights(
            seen_counts(statistics).reciprocal().float(),
            alpha=self.map_alpha,
            beta=self.map_beta,
            gamma=self.map_gamma,
            norm=self.weight_norm,
        )


class RebalanceWeights(LabelWeights):
    """r̂ = a + σ(b (r − μ)), r_ic = (1 / n_c) / Σ_{j: y_ij = 1} 1 / n_j, r = 1 without labels."""

    inverse: Tensor

    def __init__(
        self, inverse: Tensor, *, alpha: float, beta: float, gamma: float, norm: WeightNorm
    ) -> None:
        """Options as in `RebalanceOptions`.

        Args:
            inverse: (C,) 1 / n_c.
            alpha: a, the least weight.
            beta: b, the slope.
            gamma: μ, the centre.
            norm: what the weights are divided by.
        """
        super().__init__()
        self.register_buffer("inverse", inverse, persistent=False)
        self.alpha, self.beta, self.gamma, self.norm = alpha, beta, gamma, norm
        self.needs_whole_batch = norm == "by_batch"

    def forward(self, targets: Tensor) -> Tensor:
        """(B, C) weights of (B, C) labels 0..1."""
        total = (targets * self.inverse).sum(1, keepdim=True)
        ratio = self.inverse / torch.where(total > 0, total, self.inverse)
        weights = self.alpha + torch.sigmoid(self.beta * (ratio - self.gamma))
        if self.norm == "by_instance":
            return weights / weights.amax(1, keepdim=True)
        if self.norm == "by_batch":
            return weights / weights.amax()
        return weights


class EffectiveNumberOptions(Config):
    """Options of the losses weighted by the effective number of rows."""

    beta: float = Field(default=0.9, ge=0, lt=1)
    """β of the effective number (1 − β^n) / (1 − β), 0 to below 1: 0.9 tells classes below some 50
    rows apart, 0.999 below some 5,000."""
    mode: CountMode = "by_class"
    """by_class = each class has its own weight; average_n = a row has that of the mean count of its
    labels; average_w = the mean of its labels' weights; min_n = that of its rarest label."""

    def label_weights(self, statistics: ClassStatistics) -> "EffectiveNumberWeights":
        """What makes weights of labels."""
        return EffectiveNumberWeights(seen_counts(statistics), self.beta, self.mode)


class EffectiveNumberWeights(LabelWeights):
    """(1 − β) / (1 − β^n) of each class or row; rows without labels have the least, 1 − β."""

    counts: Tensor
    by_class: Tensor

    def __init__(self, counts: Tensor, beta: float, mode: CountMode) -> None:
        """Options as in `EffectiveNumberOptions`.

        Args:
            counts: (C,) float64 n_c, at least 1.
            beta: β.
            mode: what n is.
        """
        super().__init__()
        self.beta, self.mode = beta, mode
        self.register_buffer("counts", counts.float(), persistent=False)
        weights = effective_number_weights(counts, beta).float()
        self.register_buffer("by_class", weights, persistent=False)

    def forward(self, targets: Tensor) -> Tensor:
        """(1, C) or (B, 1) weights of (B, C) labels; those of 0.5 and more count as there."""
        if self.mode == "by_class":
            return self.by_class.unsqueeze(0)
        has = targets >= 0.5
        number = has.sum(1, keepdim=True)
        least = 1.0 - self.beta  # that of a class without end
        if self.mode == "average_w":
            mean = (has * self.by_class).sum(1, keepdim=True) / number.clamp(min=1)
            return torch.where(number > 0, mean, least)
        if self.mode == "average_n":
            rows = (has * self.counts).sum(1, keepdim=True) / number.clamp(min=1)
        else:
            rows = torch.where(has, self.counts, torch.inf).amin(1, keepdim=True)
        rows = torch.where(number > 0, rows, torch.inf)
        return torch.where(number > 0, effective_number_weights(rows, self.beta), least)


class ClassWeights(LabelWeights):
    """One given weight for each class."""

    weights: Tensor

    def __init__(self, weights: Tensor) -> None:
        """The weights.

        Args:
            weights: (C,).
        """
        super().__init__()
        self.register_buffer("weights", weights, persistent=False)

    def forward(self, targets: Tensor) -> Tensor:
        """(1, C) whatever the labels."""
        return self.weights.unsqueeze(0)
