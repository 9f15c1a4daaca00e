"""Mixture-of-prompts loss whose memory does not grow with batch x classes x prompts.

Each class c has K prompts p_ck = (b_c + o_ck) / |b_c + o_ck|; the offsets o are what trains. With
s_ick = <x_i, p_ck> (cosines), scale κ, temperatures τ and T, and targets y:

    γ_ik  = softmax_k(κ s_{i,y_i,k} / τ), without gradient    (or one-hot of the largest)
    L_mix = - mean_i Σ_k γ_ik κ s_{i,y_i,k}
    L_cls = cross entropy of (κ/T) max_k s_ick against y_i
    L_reg = w mean(o²), or w mean_ck |o_ck|²
    L     = λ L_mix + (1 - λ) L_cls + L_reg

Classes go by in chunks. Only the best prompt of each (row, class) pair gets a gradient from the
classification loss, so what the backward pass needs is a list of pairs. The *sparse* way, for CPUs
and sharp softmaxes, lists the pairs whose softmax weight can matter; with native bfloat16 all
cosines are only screened in bfloat16, and what survives is computed again in float32. The *dense*
way keeps the best prompt of all B x C pairs: any temperature, any device.

Shapes: B rows, C classes, K prompts a class, D width, P = classes of a chunk x K.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from heads.losses.prompt_chunks import (
    Chunks,
    chunk_classes,
    class_spans,
    csr_matrix,
    rows_by_class,
    sparse_products,
    starts_of,
)

Method = Literal["auto", "screen", "float32", "dense"]
PenaltyReduction = Literal["mean", "sum_per_prompt"]

# Softmax weights below e^-_CUT / C of a row are left out: together less than e^-14 = 8e-7 of the
# row (21 nats at 1000 classes).
_CUT = 14.0
# Relative error of rounding to bfloat16.
_ROUNDING = 2.0**-9
# Weights below this share of the largest possible one are left out of the gradient.
_NEGLIGIBLE = 1e-9
# Share of all (row, class) pairs above which remembering pairs costs more than computing twice.
_MAX_DENSITY = 0.1


class MixtureLoss(NamedTuple):
    """The loss and its parts, all 0-d float32; only `loss` carries a gradient."""

    loss: Tensor
    mixture: Tensor
    classification: Tensor
    penalty: Tensor


@dataclass(frozen=True)
class _Terms:
    """The plain numbers of a loss."""

    scale: float
    tau: float
    classification_temperature: float
    mixture_weight: float
    penalty_factor: float
    """w / (C K D) or w / (C K): what the sum of squared offsets is multiplied by."""
    hard: bool

    @property
    def sharpness(self) -> float:
        """Nats of the classification softmax per unit of cosine."""
        return self.scale / self.classification_temperature


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
        method: "auto" chooses; "screen" (bfloat16 screen, float32 result) and "float32" are sparse
            and turn dense by themselves when too many pairs matter; "dense" is always possible.

    Returns:
        The loss and its unweighted parts (the penalty includes its weight).

    Raises:
        ValueError: if features or base want a gradient, which this function does not give.
    """
    if features.requires_grad or base.requires_grad:
        raise ValueError("only the offsets get a gradient; detach features and base")
    num_classes, num_prompts, dim = offsets.shape
    entries = num_classes * num_prompts * (dim if penalty_reduction == "mean" else 1)
    terms = _Terms(
        scale=scale,
        tau=tau,
        classification_temperature=classification_temperature,
        mixture_weight=mixture_weight,
        penalty_factor=offset_penalty / entries,
        hard=hard,
    )
    chosen = _choose_method(method, offsets.device, terms, num_classes)
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


def _choose_method(method: Method, device: torch.device, terms: _Terms, num_classes: int) -> Method:
    flat = 2.0 * terms.sharpness < _cut_nats(num_classes)  # cosines differ by 2 at most
    if method == "dense" or flat or not sparse_products(device):
        return "dense"
    if method == "auto":
        return "screen" if _native_bfloat16() else "float32"
    return method


@functools.cache
def _native_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware."""
    capabilities = torch.backends.cpu.get_cpu_capability()
    return capabilities == "AVX512" and bool(torch.cpu._is_avx512_bf16_supported())


def _cut_nats(num_classes: int) -> float:
    return _CUT + math.log(num_classes)


@dataclass
class _Scores:
    """What the chunks of a forward pass leave behind.

    Attributes:
        own: (B, K) float32 cosines with the own class's prompts.
        best: (B,) largest cosine of each row.
        log_sum: (B,) log-sum-exp of the class scores above the best one, nats >= 0.
        norms: (C, K) lengths of the prompts before normalising.
        squares: () sum of the squared offsets.
        pairs: sparse: rows (n,), best prompts as index into C K (n,) int64, cosines (n,), in
            ascending order of classes. Dense: cosines (C, B), best prompts 0..K-1 (C, B).
    """

    own: Tensor
    best: Tensor
    log_sum: Tensor
    norms: Tensor
    squares: Tensor
    pairs: tuple[Tensor, ...]


class _Mixture(torch.autograd.Function):
    """Loss parts with a gradient for the offsets only."""

    @staticmethod
    def forward(
        ctx: Any,
        offsets: Tensor,
        features: Tensor,
        base: Tensor,
        targets: Tensor,
        terms: _Terms,
        method: Method,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        scores = None
        if method != "dense":
            scores = _sparse_scores(features, base, offsets, targets, terms, method == "screen")
        if scores is None:
            scores = _dense_scores(features, base, offsets, targets, terms)
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
        ctx.terms = terms
        tensors = (features, base, offsets, targets, assignment)
        kept = (scores.own, scores.best, scores.log_sum, scores.norms, scores.squares)
        ctx.save_for_backward(*tensors, *kept, *scores.pairs)
        ctx.mark_non_differentiable(mixture, classification, penalty)
        return loss, mixture, classification, penalty

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        features, base, offsets, targets, assignment, *kept = ctx.saved_tensors
        own, best, log_sum, norms, squares, *pairs = kept
        scores = _Scores(own, best, log_sum, norms, squares, tuple(pairs))
        result = _gradient(
            features, base, offsets, targets, assignment, scores, ctx.terms, float(grad)
        )
        return result, None, None, None, None, None


def _sparse_scores(
    features: Tensor, base: Tensor, offsets: Tensor, targets: Tensor, terms: _Terms, screen: bool
) -> _Scores | None:
    """Scores with the pairs that matter for the softmax; None if they are too many to list."""
    num_classes, num_prompts, _ = offsets.shape
    num_rows = features.shape[0]
    limit = max(_MAX_DENSITY * num_rows * num_classes, 2 * num_rows)
    cut = _cut_nats(num_classes) / terms.sharpness
    order, bounds = rows_by_class(targets, num_classes)
    own = features.new_empty(num_rows, num_prompts)
    norms = offsets.new_empty(num_classes, num_prompts)
    squares = offsets.new_zeros(())
    best = features.new_full((num_rows,), -2.0)  # lower bound of each row's largest cosine
    factors_error = _factors_error(features) if screen else 0.0
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    count = 0
    for chunk in Chunks(features, base, offsets, screen):
        norms[chunk.start : chunk.stop] = chunk.norms
        squares += torch.linalg.vector_norm(chunk.offsets).square()
        cosines = chunk.cosines()
        largest = cosines.amax(dim=1)  # (c, B)
        error = factors_error
        if screen:  # a bound: of the two factors' rounding, and of the result's
            error += _ROUNDING * (float(largest.abs().amax()) + 0.02)
        torch.maximum(best, largest.amax(dim=0).float().sub_(error), out=best)
        wanted = largest >= best - (cut + error)
        mine = order[bounds[chunk.start] : bounds[chunk.stop]]
        wanted[targets[mine] - chunk.start, mine] = True
        classes, rows = wanted.nonzero(as_tuple=True)
        count += rows.numel()
        if count > limit:
            return None
        is_own = targets[rows] == classes + chunk.start
        values = cosines[classes, :, rows]  # (n, K)
        if screen:
            near = values >= (values.amax(dim=1, keepdim=True).float() - 2.0 * error)
            near |= is_own.unsqueeze(1)
            values = _exact(chunk.prompts, features, classes, rows, near)
        top, winners = values.max(dim=1)
        own[rows[is_own]] = values[is_own]
        best.scatter_reduce_(0, rows, top, "amax")
        parts.append((rows, (classes + chunk.start) * num_prompts + winners, top))
    rows, prompts, top = (torch.cat(part) for part in zip(*parts, strict=True))
    keep = top >= best[rows] - cut  # a lost own pair has no weight, and its score is in `own`
    keep |= targets[rows] == prompts // num_prompts
    rows, prompts, top = rows[keep], prompts[keep], top[keep]
    weights = torch.exp((top - best[rows]) * terms.sharpness)
    log_sum = torch.zeros_like(best).index_add_(0, rows, weights).log_()
    return _Scores(own, best, log_sum, norms, squares, (rows, prompts, top))


def _factors_error(features: Tensor) -> float:
    """Bound on the error of <x, p> when unit x and p are rounded to bfloat16 (Cauchy-Schwarz)."""
    rounded = features.to(torch.bfloat16)
    lost = torch.linalg.vector_norm(features - rounded, dim=1).amax()
    return float(lost) + 1.01 * _ROUNDING


def _exact(
    prompts: Tensor, features: Tensor, classes: Tensor, rows: Tensor, near: Tensor
) -> Tensor:
    """(n, K) float32 cosines of the pairs where `near` (n, K), -inf elsewhere."""
    count, num_prompts, dim = prompts.shape
    pair, member = near.nonzero(as_tuple=True)
    prompt, order = torch.sort((classes[pair] * num_prompts + member).to(torch.int32))
    columns = rows[pair[order]]
    shape = (count * num_prompts, features.shape[0])
    pattern = csr_matrix(prompt, columns, features.new_zeros(columns.shape), shape)
    found = torch.sparse.sampled_addmm(pattern, prompts.view(-1, dim), features.t(), beta=0.0)
    values = features.new_full(near.shape, -math.inf)
    values.view(-1)[(pair * num_prompts + member)[order]] = found.values()
    return values


def _dense_scores(
    features: Tensor, base: Tensor, offsets: Tensor, targets: Tensor, terms: _Terms
) -> _Scores:
    """Scores with the best prompt of every (class, row) pair."""
    num_classes, num_prompts, _ = offsets.shape
    num_rows = features.shape[0]
    order, bounds = rows_by_class(targets, num_classes)
    own = features.new_empty(num_rows, num_prompts)
    norms = offsets.new_empty(num_classes, num_prompts)
    squares = offsets.new_zeros(())
    best = features.new_full((num_rows,), -2.0)
    total = features.new_zeros(num_rows)
    top = features.new_empty(num_classes, num_rows)
    small = num_prompts <= 256
    winners = top.new_empty(top.shape, dtype=torch.uint8 if small else torch.int32)
    chunks = Chunks(features, base, offsets)
    numbers = torch.arange(num_prompts, device=top.device, dtype=winners.dtype).view(1, -1, 1)
    equal = torch.empty_like(chunks.cosines, dtype=torch.uint8 if small else torch.bool)
    for chunk in chunks:
        norms[chunk.start : chunk.stop] = chunk.norms
        squares += torch.linalg.vector_norm(chunk.offsets).square()
        cosines = chunk.cosines()
        part = top[chunk.start : chunk.stop]
        torch.amax(cosines, dim=1, out=part)
        if small:  # five times as fast as max with indices on a CPU
            is_top = equal[: cosines.shape[0] * num_prompts].view(cosines.shape)
            torch.eq(cosines, part.unsqueeze(1), out=is_top.view(torch.bool))
            torch.mul(is_top, numbers, out=is_top)
            torch.amax(is_top, dim=1, out=winners[chunk.start : chunk.stop])
        else:
            winners[chunk.start : chunk.stop] = cosines.argmax(dim=1)
        before, best = best, torch.maximum(best, part.amax(dim=0))
        total *= torch.exp((before - best) * terms.sharpness)
        total += torch.exp((part - best) * terms.sharpness).sum(dim=0)
        mine = order[bounds[chunk.start] : bounds[chunk.stop]]
        own[mine] = cosines[targets[mine] - chunk.start, :, mine]
    return _Scores(own, best, total.log_(), norms, squares, (top, winners))


def _gradient(
    features: Tensor,
    base: Tensor,
    offsets: Tensor,
    targets: Tensor,
    assignment: Tensor,
    scores: _Scores,
    terms: _Terms,
    outer: float,
) -> Tensor:
    """(C, K, D) gradient of `outer` times the loss.

    With w_ij = dL/ds_ij, n_j = |b + o_j| and r_j = Σ_i w_ij s_ij, the normalisation's backward is
    d o_j = Σ_i (w_ij / n_j) x_i - (r_j / n_j²) (b + o_j): elementwise passes over the offsets and
    one product of a sparse matrix with the features.
    """
    num_classes, num_prompts, _ = offsets.shape
    num_rows = features.shape[0]
    slope = outer * (1.0 - terms.mixture_weight) * terms.sharpness / num_rows
    mixture_slope = -outer * terms.mixture_weight * terms.scale / num_rows
    decay = 2.0 * outer * terms.penalty_factor
    size = min(chunk_classes(num_rows, num_prompts, features.device), num_classes)
    spans = class_spans(num_classes, size)
    edges = [start for start, _ in spans] + [num_classes]

    # The mixture loss's entries, in ascending order of classes.
    order, _ = rows_by_class(targets, num_classes)
    weights = mixture_slope * assignment[order]
    position, member = (weights.abs() > _NEGLIGIBLE * abs(outer) * terms.scale / num_rows).nonzero(
        as_tuple=True
    )
    own_rows = order[position]
    own_prompts = targets[own_rows] * num_prompts + member
    own_entries = (own_rows, own_prompts, weights[position, member], scores.own[own_rows, member])
    own_bounds = starts_of(own_prompts // num_prompts, edges)

    sparse_pairs = len(scores.pairs) == 3
    if sparse_pairs:
        rows, prompts, top = scores.pairs
        share = torch.exp((top - scores.best[rows]) * terms.sharpness - scores.log_sum[rows])
        share -= (targets[rows] == prompts // num_prompts).to(share.dtype)
        pair_entries = (rows, prompts, slope * share, top)
        pair_bounds = starts_of(prompts // num_prompts, edges)

    result = torch.empty_like(offsets, memory_format=torch.contiguous_format)
    for index, (start, stop) in enumerate(spans):
        mine = slice(own_bounds[index], own_bounds[index + 1])
        if sparse_pairs:
            theirs = slice(pair_bounds[index], pair_bounds[index + 1])
            found = tuple(entry[theirs] for entry in pair_entries)
        else:
            found = _dense_entries(scores, targets, start, stop, slope, terms.sharpness)
        rows, prompts, weights, cosines = (
            torch.cat([entry[mine], other]) for entry, other in zip(own_entries, found, strict=True)
        )
        _write_chunk(
            result[start:stop],
            offsets.detach()[start:stop],
            base[start:stop],
            features,
            (rows, prompts - start * num_prompts, weights, cosines),
            scores.norms[start:stop],
            decay,
        )
    return result


def _dense_entries(
    scores: _Scores, targets: Tensor, start: int, stop: int, slope: float, sharpness: float
) -> tuple[Tensor, ...]:
    """Rows, prompts, weights and cosines of the pairs of classes start..stop that have weight."""
    top, winners = (part[start:stop] for part in scores.pairs)
    share = (top - scores.best).mul_(sharpness).sub_(scores.log_sum).exp_()
    share -= (targets == torch.arange(start, stop, device=targets.device).unsqueeze(1)).float()
    classes, rows = (share.abs() > _NEGLIGIBLE).nonzero(as_tuple=True)
    prompts = (classes + start) * scores.own.shape[1] + winners[classes, rows]
    return rows, prompts, slope * share[classes, rows], top[classes, rows]


def _write_chunk(
    result: Tensor,
    offsets: Tensor,
    base: Tensor,
    features: Tensor,
    entries: tuple[Tensor, ...],
    norms: Tensor,
    decay: float,
) -> None:
    """Fills the gradient of c classes (c, K, D) from entries (rows, prompts in 0..cK-1, w, s)."""
    rows, prompts, weights, cosines = entries
    inverse = norms.reshape(-1).reciprocal()
    pull = torch.zeros_like(inverse).index_add_(0, prompts, weights * cosines)
    pull = pull.mul_(inverse).mul_(inverse).view(*norms.shape, 1)
    torch.mul(offsets, decay - pull, out=result)
    result.addcmul_(base.unsqueeze(1), pull, value=-1.0)
    weights = weights * inverse[prompts]
    flat = result.view(-1, result.shape[-1])
    shape = (flat.shape[0], features.shape[0])
    if sparse_products(features.device):
        prompts, order = torch.sort(prompts.to(torch.int32))
        matrix = csr_matrix(prompts, rows[order], weights[order], shape)
        torch.addmm(flat, matrix, features, out=flat)
    else:
        matrix = features.new_zeros(shape).index_put_((prompts, rows), weights, accumulate=True)
        flat.addmm_(matrix, features)
