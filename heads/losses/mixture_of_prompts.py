"""Mixture-of-prompts loss whose memory does not grow with batch x classes x prompts.

Each class c has K prompts p_ck = (b_c + o_ck) / |b_c + o_ck|; the offsets o are what trains. With
s_ick = <x_i, p_ck> (cosines), scale κ, temperatures τ and T, and targets y:

    γ_ik  = softmax_k(κ s_{i,y_i,k} / τ), without gradient    (or one-hot of the largest)
    L_mix = - mean_i Σ_k γ_ik κ s_{i,y_i,k}
    L_cls = cross entropy of (κ/T) max_k s_ick against y_i
    L_reg = w mean(o²), or w mean_ck |o_ck|²
    L     = λ L_mix + (1 - λ) L_cls + L_reg (+ the penalties of `prompt_collapse`)

Classes go by in chunks. Only the best prompt of each (row, class) pair gets a gradient from the
classification loss, so what the backward pass needs is a list of pairs. The *sparse* way, for CPUs
and sharp softmaxes, lists the pairs whose softmax weight can matter; with native bfloat16 all
cosines are only screened in bfloat16, and what survives is computed again in float32. The *dense*
way keeps the best prompt of all B x C pairs: any temperature, any device.

Shapes: B rows, C classes, K prompts a class, D width, P = classes of a chunk x K.
"""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from heads.losses.prompt_chunks import Chunks, chunk_classes
from heads.losses.prompt_collapse import NO_COLLAPSE, Collapse, Grams, usage_terms
from heads.losses.prompt_gradient import offsets_gradient
from heads.losses.prompt_scores import (
    Method,
    Terms,
    choose_method,
    dense_scores,
    sparse_scores,
)

PenaltyReduction = Literal["mean", "sum_per_prompt"]


class MixtureLoss(NamedTuple):
    """The loss and its parts, all 0-d float32; only `loss` carries a gradient."""

    loss: Tensor
    mixture: Tensor
    classification: Tensor
    penalty: Tensor
    diversity: Tensor
    entropy: Tensor
    min_usage: Tensor


def mixture_of_prompts_loss(
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
    penalty_reduction: PenaltyReduction = "mean",
    hard: bool = False,
    collapse: Collapse = NO_COLLAPSE,
    touched_share: float | None = None,
    method: Method = "auto",
) -> MixtureLoss:
    """λ L_mix + (1 - λ) L_cls + L_reg of a batch; see the module's text for the terms.

    Extra memory is one gradient of `offsets` and a few buffers of chunk size; B x C x K is never
    held. Where two prompts of a class tie exactly, the largest has no unique gradient and one of
    them takes it whole.

    Args:
        features: (B, D) float32 of unit length, without gradient.
        base: (C, D) float32 of unit length, without gradient.
        offsets: (C, K, D) float32.
        targets: (B,) int64 in 0..C-1.
        scale: κ > 0.
        tau: assignment temperature τ > 0.
        classification_temperature: T > 0.
        mixture_weight: λ in 0..1.
        offset_penalty: w >= 0.
        penalty_reduction: "mean" over all C K D entries, or "sum_per_prompt": squared length of an
            offset, averaged over the C K prompts.
        hard: one-hot instead of softmax assignment.
        collapse: weights of the penalties of `heads.losses.prompt_collapse`, added to the loss.
        touched_share: where the softmax is sharp, give a sparse gradient that holds the classes of
            the batch and those with at least this softmax weight (0..1) in one of its rows, and
            nothing of the others, not even the offsets' penalty; see `heads.lazy_adam`. None = the
            whole gradient. A flat softmax gives the whole gradient anyway.
        method: "auto" chooses; "screen" (bfloat16 screen, float32 result) and "float32" are sparse
            and turn dense by themselves when too many pairs matter; "dense" is always possible.

    Returns:
        The loss and its unweighted parts (the penalty includes its weight); diversity, and entropy
        with min_usage, are 0 where they have no weight.

    Raises:
        ValueError: if features or base want a gradient, which this function does not give.
    """
    if features.requires_grad or base.requires_grad:
        raise ValueError("only the offsets get a gradient; detach features and base")
    num_classes, num_prompts, dim = offsets.shape
    entries = num_classes * num_prompts * (dim if penalty_reduction == "mean" else 1)
    terms = Terms(
        scale=scale,
        tau=tau,
        classification_temperature=classification_temperature,
        mixture_weight=mixture_weight,
        penalty_factor=offset_penalty / entries,
        hard=hard,
        collapse=collapse,
        touched_share=touched_share,
    )
    chosen = choose_method(method, offsets.device, terms, num_classes)
    parts = _Mixture.apply(offsets, features, base, targets, terms, chosen)
    return MixtureLoss(*parts)


def max_cosines(features: Tensor, base: Tensor, offsets: Tensor) -> Tensor:
    """(B, C) largest cosine of each row with the prompts of each class, chunk by chunk.

    With gradients enabled the chunks are computed again in the backward pass.

    Args:
        features: (B, D) float32 of unit length.
        base: (C, D) float32 of unit length.
        offsets: (C, K, D) float32.
    """
    if torch.is_grad_enabled() and offsets.requires_grad:
        size = chunk_classes(features.shape[0], offsets.shape[1], features.device)
        parts: list[Tensor] = [
            checkpoint(_chunk_scores, features, b, o, use_reentrant=False)
            for b, o in zip(torch.split(base, size), torch.split(offsets, size), strict=True)
        ]
        return torch.cat(parts, dim=1)
    scores = features.new_empty(base.shape[0], features.shape[0])
    for chunk in Chunks(features, base, offsets):
        torch.amax(chunk.cosines(), dim=1, out=scores[chunk.start : chunk.stop])
    return scores.t()


def _chunk_scores(features: Tensor, base: Tensor, offsets: Tensor) -> Tensor:
    """(B, c) largest cosines with the prompts of c classes."""
    prompts = F.normalize(base.unsqueeze(1) + offsets, dim=-1).flatten(0, 1)
    return torch.matmul(features, prompts.t()).view(-1, *offsets.shape[:2]).amax(dim=-1)


class _Mixture(torch.autograd.Function):
    """Loss parts with a gradient for the offsets only."""

    @staticmethod
    def forward(
        ctx: Any,
        offsets: Tensor,
        features: Tensor,
        base: Tensor,
        targets: Tensor,
        terms: Terms,
        method: Method,
    ) -> tuple[Tensor, ...]:
        collapse, grams = terms.collapse, None
        zero = features.new_zeros(())
        diversity, entropy, min_usage, usage_slope = zero, zero.clone(), zero.clone(), None
        if collapse.diversity > 0.0 or collapse.reads_usage:
            present, member = torch.unique(targets, return_inverse=True)
            if collapse.diversity > 0.0 and offsets.shape[1] > 1:
                grams = Grams(present, offsets.shape[1])
        scores = None
        if method != "dense":
            screen = method == "screen"
            scores = sparse_scores(features, base, offsets, targets, terms, screen, grams)
        if scores is None:
            scores = dense_scores(features, base, offsets, targets, terms, grams)
        own = terms.scale * scores.own
        if terms.hard:
            assignment = F.one_hot(own.argmax(dim=1), own.shape[1]).to(own.dtype)
        else:
            assignment = torch.softmax(own / terms.tau, dim=1)
        mixture = -(assignment * own).sum(dim=1).mean()
        behind = scores.best - scores.own.amax(dim=1)
        classification = (scores.log_sum + terms.sharpness * behind).mean()
        penalty = terms.penalty_factor * scores.squares
        weight = terms.mixture_weight
        loss = weight * mixture + (1.0 - weight) * classification + penalty
        if grams is not None:
            diversity = grams.diversity()
            loss = loss + collapse.diversity * diversity
        if collapse.reads_usage:
            entropy, min_usage, usage_slope = usage_terms(
                scores.own,
                member,
                len(present),
                scale=terms.scale,
                tau=terms.tau,
                collapse=collapse,
            )
            loss = loss + collapse.entropy * entropy + collapse.min_usage * min_usage
        ctx.terms, ctx.scores = terms, scores
        ctx.grams, ctx.usage_slope = grams, usage_slope
        ctx.save_for_backward(features, base, offsets, targets, assignment)
        parts = (mixture, classification, penalty, diversity, entropy, min_usage)
        ctx.mark_non_differentiable(*parts)
        return loss, *parts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        features, base, offsets, targets, assignment = ctx.saved_tensors
        result = offsets_gradient(
            features,
            base,
            offsets,
            targets,
            assignment,
            ctx.scores,
            ctx.terms,
            float(grad),
            ctx.grams,
            ctx.usage_slope,
        )
        return result, None, None, None, None, None
