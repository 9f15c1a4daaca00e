"""Weights and offsets from class frequencies, shared by the losses for long-tailed sets.

n_c is the number of training rows with class c, N that of all training rows. A class without rows
counts as one of a single row.
"""

import math
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from heads.losses.base import ClassStatistics

WeightNorm = Literal["none", "by_instance", "by_batch"]


def seen_counts(statistics: ClassStatistics) -> Tensor:
    """(C,) float64 n_c, at least 1."""
    return torch.from_numpy(np.maximum(statistics.counts, 1)).double()


def inverse_counts(statistics: ClassStatistics) -> Tensor:
    """(C,) float32 1 / n_c."""
    return seen_counts(statistics).reciprocal().float()


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


def rebalance_weights(
    targets: Tensor, inverse: Tensor, *, offset: float, slope: float, centre: float
) -> Tensor:
    """(B, C) r̂ = a + σ(b (r − μ)) with r_ic = (1 / n_c) / Σ_{j: y_ij = 1} 1 / n_j.

    Rows without a label have r = 1.

    Args:
        targets: (B, C) float 0..1.
        inverse: (C,) 1 / n_c.
        offset: a.
        slope: b.
        centre: μ.
    """
    total = (targets * inverse).sum(1, keepdim=True)
    ratio = inverse / torch.where(total > 0, total, inverse)
    return offset + torch.sigmoid(slope * (ratio - centre))


def normalised(weights: Tensor, norm: WeightNorm) -> Tensor:
    """(B, C) weights divided by the largest of their row, or of the batch."""
    if norm == "by_instance":
        return weights / weights.amax(1, keepdim=True)
    if norm == "by_batch":
        return weights / weights.amax()
    return weights
