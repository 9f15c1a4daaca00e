"""Zero-bounded log-sum-exp and pairwise rank loss (ZLPR): positives above 0, negatives below.

For each row, with z logits:

    log(1 + Σ_{c in positives} e^−z_c) + log(1 + Σ_{c in negatives} e^z_c)

Labels between 0 and 1 weigh the summands of the first sum by y, of the second by 1 − y. The
decision threshold is z > 0, a probability of 0.5.

Reference: Su et al., ZLPR: A Novel Loss for Multi-label Classification, 2022, equations 4 and 9.
"""

from typing import Literal

import torch
from torch import Tensor

from heads.losses.base import (
    ClassStatistics,
    Loss,
    LossConfig,
    as_multi_hot,
    at_least_float32,
)


class ZLPRConfig(LossConfig):
    """Ranks each positive above 0 and each negative below, one term a row."""

    kind: Literal["zlpr"] = "zlpr"
    """Loss kind."""

    def build(self, statistics: ClassStatistics) -> "ZLPR":
        """The loss; needs no counts."""
        return ZLPR()


class ZLPR(Loss):
    """log(1 + Σ_pos e^−z) + log(1 + Σ_neg e^z)."""

    def terms(self, logits: Tensor, targets: Tensor) -> Tensor:
        """(B,) float32; see `Loss.terms`."""
        logits = at_least_float32(logits)
        wanted = as_multi_hot(targets, logits.shape[-1]).to(logits.dtype)
        zero = logits.new_zeros(len(logits), 1)  # the 1 in each sum
        positive = torch.cat([zero, torch.log(wanted) - logits], 1)
        negative = torch.cat([zero, torch.log(1.0 - wanted) + logits], 1)
        return positive.logsumexp(1) + negative.logsumexp(1)
