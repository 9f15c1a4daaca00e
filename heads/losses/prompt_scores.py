"""Cosines of rows with the best prompts of all classes, and which pairs of them matter.

The forward half of `heads.losses.mixture_of_prompts`, whose text says what is computed and why.
Shapes: B rows, C classes, K prompts a class, D width, U classes that occur in the batch.
"""

import functools
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from heads.losses.prompt_chunks import Chunks, csr_matrix, rows_by_class, sparse_products
from heads.losses.prompt_collapse import NO_COLLAPSE, Collapse, Grams

Method = Literal["auto", "screen", "float32", "dense"]

# Softmax weights below e^-_CUT / C of a row are left out: together less than e^-14 = 8e-7 of the
# row (21 nats at 1000 classes).
_CUT = 14.0
# Relative error of rounding to bfloat16.
_ROUNDING = 2.0**-9
# Share of all (row, class) pairs above which remembering pairs costs more than computing twice.
_MAX_DENSITY = 0.1
# Rows from which that share is guessed, before any chunk is computed in vain.
_GUESS_ROWS = 64


@dataclass(frozen=True)
class Terms:
    """The plain numbers of a loss."""

    scale: float
    tau: float
    classification_temperature: float
    mixture_weight: float
    penalty_factor: float
    """w / (C K D) or w / (C K): what the sum of squared offsets is multiplied by."""
    hard: bool
    collapse: Collapse = NO_COLLAPSE
    touched_share: float | None = None
    """Softmax weight from which on a pair counts; None = a gradient of all classes."""

    @property
    def sharpness(self) -> float:
        """Nats of the classification softmax per unit of cosine."""
        return self.scale / self.classification_temperature


def choose_method(method: Method, device: torch.device, terms: Terms, num_classes: int) -> Method:
    """The way that is possible and fast on this machine."""
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
class Scores:
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


def sparse_scores(
    features: Tensor,
    base: Tensor,
    offsets: Tensor,
    targets: Tensor,
    terms: Terms,
    screen: bool,
    grams: Grams | None = None,
) -> Scores | None:
    """Scores with the pairs that matter for the softmax; None if they are too many to list."""
    num_classes, num_prompts, _ = offsets.shape
    num_rows = features.shape[0]
    limit = max(_MAX_DENSITY * num_rows * num_classes, 2 * num_rows)
    cut = _cut_nats(num_classes) / terms.sharpness
    if _density(features, base, cut) > 2.0 * _MAX_DENSITY:
        return None
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
        if grams is not None:
            grams.add(chunk)
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
    return Scores(own, best, log_sum, norms, squares, (rows, prompts, top))


def _density(features: Tensor, base: Tensor, cut: float) -> float:
    """Share of pairs within `cut` of the row's best, guessed from the texts alone and some rows."""
    some = features[:: max(1, len(features) // _GUESS_ROWS)]
    cosines = some @ base.t()
    return float((cosines >= cosines.amax(dim=1, keepdim=True) - cut).float().mean())


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


def dense_scores(
    features: Tensor,
    base: Tensor,
    offsets: Tensor,
    targets: Tensor,
    terms: Terms,
    grams: Grams | None = None,
) -> Scores:
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
    winners = top.new_empty(top.shape, dtype=torch.uint8 if num_prompts <= 256 else torch.int32)
    numbers = torch.arange(num_prompts, device=top.device, dtype=top.dtype).view(1, -1, 1)
    for chunk in Chunks(features, base, offsets):
        norms[chunk.start : chunk.stop] = chunk.norms
        squares += torch.linalg.vector_norm(chunk.offsets).square()
        if grams is not None:
            grams.add(chunk)
        cosines = chunk.cosines()
        part = top[chunk.start : chunk.stop]
        torch.amax(cosines, dim=1, out=part)
        before, best = best, torch.maximum(best, part.amax(dim=0))
        total *= torch.exp((before - best) * terms.sharpness)
        total += torch.exp((part - best) * terms.sharpness).sum(dim=0)
        mine = order[bounds[chunk.start] : bounds[chunk.stop]]
        own[mine] = cosines[targets[mine] - chunk.start, :, mine]
        # On a CPU 20 times as fast as max with indices: the largest numbers of the largest cosines.
        is_top = cosines.eq_(part.unsqueeze(1))
        winners[chunk.start : chunk.stop] = is_top.mul_(numbers).amax(dim=1)
    return Scores(own, best, total.log_(), norms, squares, (top, winners))
