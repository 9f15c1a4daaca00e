"""The gradient of the mixture-of-prompts loss: a list of entries, and one weighted sum a prompt.

The backward half of `heads.losses.mixture_of_prompts`. Shapes: B rows, C classes, K prompts a
class, D width, c classes of a chunk.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from heads.losses.prompt_chunks import (
    chunk_classes,
    class_spans,
    rows_by_class,
    starts_of,
)
from heads.losses.prompt_collapse import Grams
from heads.losses.prompt_scores import Scores, Terms

# Weights below this share of the largest possible one are left out of the gradient.
_NEGLIGIBLE = 1e-9


def offsets_gradient(
    features: Tensor,
    base: Tensor,
    offsets: Tensor,
    targets: Tensor,
    assignment: Tensor,
    scores: Scores,
    terms: Terms,
    outer: float,
    grams: Grams | None,
    usage_slope: Tensor | None,
) -> Tensor:
    """(C, K, D) gradient of `outer` times the loss.

    With w_ij = dL/ds_ij, n_j = |b + o_j| and r_j = Σ_i w_ij s_ij, the normalisation's backward is
    d o_j = Σ_i (w_ij / n_j) x_i - (r_j / n_j²) (b + o_j): elementwise passes over the offsets and
    one weighted sum of features for each prompt.

    Args:
        features: (B, D) as of the loss.
        base: (C, D) likewise.
        offsets: (C, K, D) likewise.
        targets: (B,) likewise.
        assignment: (B, K) γ of the mixture loss.
        scores: of the forward pass.
        terms: the loss's numbers; with `touched_share` the gradient is a sparse tensor over
            classes, as far as the scores are sparse.
        outer: factor.
        grams: of the diversity penalty, if it counts.
        usage_slope: (B, K) slope of the usage penalties along the own cosines, if they count.
    """
    num_classes, num_prompts, dim = offsets.shape
    num_rows = features.shape[0]
    slope = outer * (1.0 - terms.mixture_weight) * terms.sharpness / num_rows
    mixture_slope = -outer * terms.mixture_weight * terms.scale / num_rows
    decay = 2.0 * outer * terms.penalty_factor

    # Entries of rows with their own prompts, in ascending order of classes.
    order, _ = rows_by_class(targets, num_classes)
    weights = mixture_slope * assignment
    if usage_slope is not None:
        weights += outer * usage_slope
    weights = weights[order]
    smallest = _NEGLIGIBLE * abs(outer) * terms.scale / num_rows
    position, member = (weights.abs() > smallest).nonzero(as_tuple=True)
    rows = order[position]
    own_entries = (rows, targets[rows], member, weights[position, member], scores.own[rows, member])

    pair_entries: tuple[Tensor, ...] | None = None
    touched: Tensor | None = None
    if len(scores.pairs) == 3:
        rows, prompts, top = scores.pairs
        classes = prompts // num_prompts
        share = torch.exp((top - scores.best[rows]) * terms.sharpness - scores.log_sum[rows])
        share -= (targets[rows] == classes).to(share.dtype)
        pair_entries = (rows, classes, prompts - classes * num_prompts, slope * share, top)
        if terms.touched_share is not None:
            keep = share.abs() > terms.touched_share
            pair_entries = tuple(entry[keep] for entry in pair_entries)
            touched = torch.unique(torch.cat([targets, pair_entries[1]]))

    # Classes go by under numbers of their own if only some of them have a gradient.
    place = None
    if touched is not None:
        place = torch.empty(num_classes, dtype=torch.int64, device=touched.device)
        place[touched] = torch.arange(len(touched), device=touched.device)
    count = num_classes if touched is None else len(touched)
    size = min(chunk_classes(num_rows, num_prompts, features.device), count)
    spans = class_spans(count, size)
    edges = [start for start, _ in spans] + [count]

    def numbered(entries: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], list[int]]:
        rows, classes, members, *rest = entries
        classes = classes if place is None else place[classes]
        return (rows, classes * num_prompts + members, *rest), starts_of(classes, edges)

    own, own_bounds = numbered(own_entries)
    pairs, pair_bounds = None, [0]
    if pair_entries is not None:
        pairs, pair_bounds = numbered(pair_entries)
    present, present_bounds = torch.empty(0, dtype=torch.int64), [0]
    if grams is not None:
        present = grams.present if place is None else place[grams.present]
        present_bounds = starts_of(present, edges)

    values = offsets.new_empty(count, num_prompts, dim)
    for index, (start, stop) in enumerate(spans):
        mine = slice(own_bounds[index], own_bounds[index + 1])
        if pairs is not None:
            theirs = slice(pair_bounds[index], pair_bounds[index + 1])
            found = tuple(entry[theirs] for entry in pairs)
        else:
            found = _dense_entries(scores, targets, start, stop, slope, terms.sharpness)
        rows, prompts, weights, cosines = (
            torch.cat([entry[mine], other]) for entry, other in zip(own, found, strict=True)
        )
        which = slice(start, stop) if touched is None else touched[start:stop]
        here, around, norms = offsets.detach()[which], base[which], scores.norms[which]
        _write_chunk(
            values[start:stop],
            here,
            around,
            features,
            (rows, prompts - start * num_prompts, weights, cosines),
            norms,
            decay,
        )
        if grams is not None:
            first, last = present_bounds[index], present_bounds[index + 1]
            positions = present[first:last] - start
            weight = outer * terms.collapse.diversity
            grams.add_gradient(values[start:stop], here, around, norms, first, positions, weight)
    if touched is None:
        return values
    shape = tuple(offsets.shape)
    return torch.sparse_coo_tensor(
        touched.unsqueeze(0), values, shape, is_coalesced=True, check_invariants=False
    )


def _dense_entries(
    scores: Scores, targets: Tensor, start: int, stop: int, slope: float, sharpness: float
) -> tuple[Tensor, ...]:
    """Rows, prompts, weights and cosines of all pairs of classes start..stop.

    Looking for those with a weight that counts would cost more than their part of the product.
    """
    top, winners = (part[start:stop] for part in scores.pairs)
    count, num_rows = top.shape
    classes = torch.arange(start, stop, device=targets.device).unsqueeze(1)
    share = (top - scores.best).mul_(sharpness).sub_(scores.log_sum).exp_()
    share -= (targets == classes).float()
    prompts = (classes * scores.own.shape[1] + winners).flatten()
    rows = torch.arange(num_rows, device=targets.device).repeat(count)
    return rows, prompts, share.mul_(slope).flatten(), top.flatten()


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
    sums = _weighted_sums(features, rows, prompts, weights * inverse[prompts], len(inverse))
    torch.addcmul(sums.view_as(result), offsets, decay - pull, out=result)
    result.addcmul_(base.unsqueeze(1), pull, value=-1.0)


def _weighted_sums(
    features: Tensor, rows: Tensor, prompts: Tensor, weights: Tensor, count: int
) -> Tensor:
    """(count, D) sum of the weighted rows of each prompt 0..count-1."""
    if features.device.type != "cpu":
        matrix = features.new_zeros(count, len(features))
        return matrix.index_put_((prompts, rows), weights, accumulate=True) @ features
    # On a CPU the bag takes half the time of a CSR product.
    prompts, order = torch.sort(prompts.to(torch.int32))
    ends = torch.bincount(prompts, minlength=count).cumsum(0)
    starts = F.pad(ends[:-1], (1, 0)).to(torch.int32)
    columns = rows[order].to(torch.int32)
    return F.embedding_bag(columns, features, starts, mode="sum", per_sample_weights=weights[order])
