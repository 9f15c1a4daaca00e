"""Penalties against prompts of a class becoming one: alike, unused, or used by one row only.

All three look at the prompts of the classes in the batch, never at all C x K of them, and keep the
gradient of the assignment γ, unlike the mixture loss.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class CollapseTerms(NamedTuple):
    """0-d float32 terms, unweighted, averaged over the classes in the batch."""

    diversity: Tensor
    entropy: Tensor
    min_usage: Tensor


def prompt_collapse_terms(
    features: Tensor,
    base: Tensor,
    offsets: Tensor,
    targets: Tensor,
    *,
    scale: float,
    tau: float,
    usage_threshold: float,
) -> CollapseTerms:
    """Diversity, entropy and least-usage penalties of the batch's own classes.

    With p_ck the unit prompts, γ_ik = softmax_k(κ <x_i, p_{y_i,k}> / τ) and u_c = mean of γ_i over
    the rows of class c:

        diversity = mean over c in batch and k != l of <p_ck, p_cl>²      (0 for K = 1)
        entropy   = mean over c in batch of -H(u_c)
        min_usage = mean over c in batch of Σ_k max(0, threshold - u_ck)

    Args:
        features: (B, D) float32 of unit length.
        base: (C, D) float32 of unit length.
        offsets: (C, K, D) float32.
        targets: (B,) int64 class indices.
        scale: κ > 0.
        tau: τ > 0.
        usage_threshold: share of a class's rows that each prompt should get, 0..1/K.
    """
    classes, member = torch.unique(targets, return_inverse=True)  # (U,), (B,)
    prompts = F.normalize(base[classes].unsqueeze(1) + offsets[classes], dim=-1)  # (U, K, D)
    num_prompts = offsets.shape[1]
    similar = torch.bmm(prompts, prompts.transpose(1, 2)).square()  # (U, K, K)
    others = ~torch.eye(num_prompts, dtype=torch.bool, device=offsets.device)
    diversity = similar[:, others].mean() if num_prompts > 1 else similar.sum() * 0.0
    cosines = torch.einsum("bd,bkd->bk", features, prompts[member])
    assignment = torch.softmax(scale * cosines / tau, dim=1)
    counts = torch.bincount(member, minlength=len(classes)).to(assignment.dtype)
    usage = torch.zeros(len(classes), num_prompts, device=offsets.device, dtype=assignment.dtype)
    usage = usage.index_add(0, member, assignment) / counts.unsqueeze(1)  # (U, K)
    entropy = torch.special.entr(usage.clamp_min(1e-12)).sum(dim=1).mean().neg()
    min_usage = F.relu(usage_threshold - usage).sum(dim=1).mean()
    return CollapseTerms(diversity, entropy, min_usage)
