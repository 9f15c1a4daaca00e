"""Two-sided sigmoid terms that most losses for several labels share.

With z logits, ν an offset for each class and ζ a scale of the negative side, u = z + ν:

    positive side  (1 − σ(u))^γ · softplus(−u)
    negative side  σ(ζu)^γ · softplus(ζu) / ζ

With ν = 0, ζ = 1 and γ = 0 they are the two sides of sigmoid cross-entropy.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from heads.losses.base import as_multi_hot, at_least_float32


def two_sided(
    logits: Tensor,
    targets: Tensor,
    *,
    gamma: float = 0.0,
    alpha: float | None = None,
    shift: Tensor | None = None,
    neg_scale: float = 1.0,
) -> Tensor:
    """(B, C) float32 terms, y times the positive side plus 1 − y times the negative.

    Args:
        logits: (B, C) of any float type; not changed.
        targets: (B, C) float 0..1, or (B,) class indices.
        gamma: focusing exponent γ, 0 or more; each element has its own factor.
        alpha: weight α of the positive side, the negative's is 1 − α; None = 1 for both.
        shift: (C,) ν.
        neg_scale: ζ > 0.
    """
    logits = at_least_float32(logits)
    wanted = as_multi_hot(targets, logits.shape[-1]).to(logits.dtype)
    if shift is not None:
        logits = logits + shift  # a new tensor: the caller's logits stay raw
    scaled = logits if neg_scale == 1.0 else logits * neg_scale
    positive, negative = F.softplus(-logits), F.softplus(scaled)
    if gamma:
        # σ(x)^γ = exp(−γ softplus(−x)): unlike the power it has a finite slope where σ is 0.
        same = neg_scale == 1.0
        far = torch.exp(-gamma * (negative if same else F.softplus(logits)))
        near = torch.exp(-gamma * (positive if same else F.softplus(-scaled)))
        positive, negative = positive * far, negative * near
    if neg_scale != 1.0:
        negative = negative / neg_scale
    if alpha is not None:
        positive, negative = positive * alpha, negative * (1.0 - alpha)
    return torch.lerp(negative, positive, wanted)
