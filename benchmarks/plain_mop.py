"""The mixture-of-prompts loss written out: every tensor of the equations, gradient by autograd.

The yardstick of `benchmarks/mop.py` and the oracle of the tests. It holds B x C x K cosines and a
normalised copy of all C x K x D prompts.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def plain_mop_loss(
    features: Tensor,
    base: Tensor,
    offsets: Tensor,
    targets: Tensor,
    *,
    scale: float = 50.0,
    tau: float = 1.0,
    classification_temperature: float = 0.07,
    mixture_weight: float = 0.5,
    offset_penalty: float = 0.001,
    penalty_reduction: str = "mean",
    hard: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, mixture, classification, penalty) of a batch; arguments as for the fused loss."""
    prompts = F.normalize(base.unsqueeze(1) + offsets, dim=-1)
    logits = scale * torch.einsum("bd,ckd->bck", features, prompts)
    own = logits[torch.arange(len(targets)), targets]
    if hard:
        assignment = F.one_hot(own.argmax(dim=1), own.shape[1]).to(own.dtype)
    else:
        assignment = torch.softmax(own / tau, dim=1).detach()
    mixture = -(assignment * own).sum(dim=1).mean()
    scores = logits.max(dim=-1).values
    classification = F.cross_entropy(scores / classification_temperature, targets)
    if penalty_reduction == "mean":
        penalty = offset_penalty * offsets.square().mean()
    else:
        penalty = offset_penalty * offsets.square().sum(dim=-1).mean()
    loss = mixture_weight * mixture + (1.0 - mixture_weight) * classification + penalty
    return loss, mixture, classification, penalty


def plain_collapse_terms(
    features: Tensor,
    base: Tensor,
    offsets: Tensor,
    targets: Tensor,
    *,
    scale: float = 50.0,
    tau: float = 1.0,
    usage_threshold: float = 0.05,
) -> tuple[Tensor, Tensor, Tensor]:
    """(diversity, entropy, min_usage) of a batch, from one gathered set of prompts a row."""
    classes, member = torch.unique(targets, return_inverse=True)
    prompts = F.normalize(base[classes].unsqueeze(1) + offsets[classes], dim=-1)
    num_prompts = offsets.shape[1]
    similar = torch.bmm(prompts, prompts.transpose(1, 2)).square()
    others = ~torch.eye(num_prompts, dtype=torch.bool, device=offsets.device)
    diversity = similar[:, others].mean() if num_prompts > 1 else similar.sum() * 0.0
    cosines = torch.einsum("bd,bkd->bk", features, prompts[member])
    assignment = torch.softmax(scale * cosines / tau, dim=1)
    counts = torch.bincount(member, minlength=len(classes)).to(assignment.dtype)
    usage = torch.zeros(len(classes), num_prompts, device=offsets.device, dtype=assignment.dtype)
    usage = usage.index_add(0, member, assignment) / counts.unsqueeze(1)
    entropy = torch.special.entr(usage.clamp_min(1e-12)).sum(dim=1).mean().neg()
    min_usage = F.relu(usage_threshold - usage).sum(dim=1).mean()
    return diversity, entropy, min_usage
