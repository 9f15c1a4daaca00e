"""Mixture-of-prompts loss whose memory does not grow with batch x classes x prompts.

Each class c has K prompts p_ck = (b_c + o_ck) / |b_c + o_ck|; the offsets o are what trains. With
s_ick = <x_i, p_ck> (cosines), scale κ, temperatures τ and T, and targets y:

    γ_ik  = softmax_k(κ s_{i,y_i,k} / τ), without gradient    (or one-hot of the largest)
    L_mix = - mean_i Σ_k γ_ik κ s_{i,y_i,k}
    L_cls = cross entropy of (κ/T) max_k s_ick against y_i
    L_reg = w mean(o²), or w mean_ck |o_ck|²
    L     = λ L_mix + (1 - λ) L_cls + L_reg

Two ways give the same numbers. The *sparse* one is for CPUs and sharp softmaxes: classes go by in
chunks, and only the (row, class) pairs whose softmax weight can matter are remembered; with native
bfloat16 the cosines of all pairs are only screened in bfloat16, and what survives is computed again
in float32. The *dense* one recomputes each chunk in the backward pass: any temperature, any device.

Shapes: B rows, C classes, K prompts a class, D width, P = classes of a chunk x K.
"""

import functools
import math
import warnings
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

Method = Literal["auto", "screen", "float32", "dense"]
PenaltyReduction = Literal["mean", "sum_per_prompt"]

# Softmax weights below e^-_CUT / C of a row are left out: together less than e^-14 = 8e-7 of the
# row (21 nats at 1000 classes).
_CUT = 14.0
# Largest error of a bfloat16 cosine of unit vectors: 2^-9 relative rounding of each factor
# (Cauchy-Schwarz) and of the result.
_SCREEN_ERROR = 2.0**-8 + 2.0**-9
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
        size = _chunk_classes(features.shape[0], offsets.shape[1], features.device)
        parts: list[Tensor] = [
            checkpoint(_chunk_scores, features, b, o, use_reentrant=False)
            for b, o in zip(torch.split(base, size), torch.split(offsets, size), strict=True)
        ]
        return torch.cat(parts, dim=1)
    scores = features.new_empty(base.shape[0], features.shape[0])
    for chunk in _Chunks(features, base, offsets):
        torch.amax(chunk.cosines(), dim=1, out=scores[chunk.start : chunk.stop])
    return scores.t()


def _chunk_scores(features: Tensor, base: Tensor, offsets: Tensor) -> Tensor:
    """(B, c) largest cosines with the prompts of c classes."""
    prompts = F.normalize(base.unsqueeze(1) + offsets, dim=-1).flatten(0, 1)
    return torch.matmul(features, prompts.t()).view(-1, *offsets.shape[:2]).amax(dim=-1)


def _choose_method(method: Method, device: torch.device, terms: _Terms, num_classes: int) -> Method:
    sparse_works = device.type == "cpu" and torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
    flat = 2.0 * terms.sharpness < _cut_nats(num_classes)  # cosines differ by 2 at most
    if method == "dense" or flat or not sparse_works:
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


class _Chunk:
    """Normalised prompts of classes start..stop, in buffers that the next chunk overwrites."""

    def __init__(self, owner: "_Chunks", start: int, stop: int) -> None:
        self.start, self.stop = start, stop
        self._owner = owner
        count = stop - start
        self.prompts = owner.prompts[:count]  # (count, K, D) float32
        offsets = owner.offsets[start:stop]
        torch.add(offsets, owner.base[start:stop, None], out=self.prompts)
        self.norms = torch.linalg.vector_norm(self.prompts, dim=-1)  # (count, K)
        self.prompts.div_(self.norms.unsqueeze(-1))

    def cosines(self) -> Tensor:
        """(classes, K, B) cosines in the buffer's dtype."""
        owner = self._owner
        count, num_prompts, dim = self.prompts.shape
        flat = self.prompts.view(count * num_prompts, dim)
        out = owner.cosines[: count * num_prompts]
        if owner.low is not None:
            flat = owner.low[: count * num_prompts].copy_(flat)
        torch.mm(flat, owner.columns, out=out)
        return out.view(count, num_prompts, -1)


class _Chunks:
    """Walks over the classes with buffers allocated once.

    Fresh tensors of this size would cost more in page faults than the arithmetic in them.
    """

    def __init__(
        self, features: Tensor, base: Tensor, offsets: Tensor, screen: bool = False
    ) -> None:
        num_classes, num_prompts, dim = offsets.shape
        self.features, self.base, self.offsets = features, base, offsets.detach()
        self.size = min(
            _chunk_classes(features.shape[0], num_prompts, features.device), num_classes
        )
        self.prompts = offsets.new_empty(self.size, num_prompts, dim)
        dtype = torch.bfloat16 if screen else features.dtype
        rows = self.size * num_prompts
        self.low = offsets.new_empty(rows, dim, dtype=dtype) if screen else None
        self.columns = features.to(dtype).t()  # (D, B)
        self.cosines = offsets.new_empty(rows, features.shape[0], dtype=dtype)

    def __iter__(self) -> Any:
        num_classes = self.base.shape[0]
        for start in range(0, num_classes, self.size):
            yield _Chunk(self, start, min(start + self.size, num_classes))


def _chunk_classes(num_rows: int, num_prompts: int, device: torch.device) -> int:
    """Classes a chunk: about 4 M cosines, at most 4096 prompts, on CPU; 16 times that elsewhere."""
    factor = 1 if device.type == "cpu" else 16
    prompts = min(2**22 * factor // num_rows, 4096 * factor)
    return max(1, prompts // num_prompts)


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
        found = None
        if method != "dense":
            found = _collect_pairs(features, base, offsets, targets, terms, method == "screen")
        if found is not None:
            own, log_total, own_best, squares, pairs = found
        else:
            own, log_total, own_best, squares = _dense_scores(
                features, base, offsets, targets, terms
            )
            pairs = ()
        scaled = terms.scale * own
        if terms.hard:
            assignment = F.one_hot(own.argmax(dim=1), own.shape[1]).to(own.dtype)
        else:
            assignment = torch.softmax(scaled / terms.tau, dim=1)
        mixture = -(assignment * scaled).sum(dim=1).mean()
        classification = (log_total - terms.sharpness * own_best).mean()
        penalty = terms.penalty_factor * squares
        weight = terms.mixture_weight
        loss = weight * mixture + (1.0 - weight) * classification + penalty
        ctx.terms = terms
        ctx.save_for_backward(offsets, features, base, targets, own, assignment, log_total, *pairs)
        ctx.mark_non_differentiable(mixture, classification, penalty)
        return loss, mixture, classification, penalty

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        offsets, features, base, targets, own, assignment, log_total, *pairs = ctx.saved_tensors
        share = float(grad) / features.shape[0]
        terms: _Terms = ctx.terms
        mixture = assignment.mul(-terms.mixture_weight * terms.scale * share)  # (B, K)
        slope = (1.0 - terms.mixture_weight) * terms.sharpness * share
        decay = 2.0 * terms.penalty_factor * float(grad)
        common = (features, base, offsets, targets)
        if pairs:
            result = _sparse_gradient(*common, own, mixture, log_total, terms, slope, decay, *pairs)
        else:
            result = _dense_gradient(*common, mixture, log_total, terms, slope, decay)
        return result, None, None, None, None, None


def _collect_pairs(
    features: Tensor, base: Tensor, offsets: Tensor, targets: Tensor, terms: _Terms, screen: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[Tensor, ...]] | None:
    """Cosines that matter for the softmax, or None if they are too many to remember.

    Returns:
        own (B, K) cosines with the own class's prompts, log_total (B,) log-sum-exp of the class
        scores in nats, own_best (B,), squares () sum of squared offsets, and the pairs: rows and
        prompts (index into C K) int64, cosines float32, whether the class is the row's own; then
        norms (C, K) of the prompts before normalising.
    """
    num_classes, num_prompts, _ = offsets.shape
    num_rows = features.shape[0]
    limit = max(_MAX_DENSITY * num_rows * num_classes, 2 * num_rows)
    error = _SCREEN_ERROR if screen else 0.0
    cut = _cut_nats(num_classes) / terms.sharpness
    by_class = torch.argsort(targets)
    bounds = torch.searchsorted(targets[by_class], torch.arange(num_classes + 1)).tolist()
    own = features.new_empty(num_rows, num_prompts)
    norms = offsets.new_empty(num_classes, num_prompts)
    squares = offsets.new_zeros(())
    best = features.new_full((num_rows,), -2.0)  # lower bound of each row's largest cosine
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    count = 0
    for chunk in _Chunks(features, base, offsets, screen):
        norms[chunk.start : chunk.stop] = chunk.norms
        squares += torch.linalg.vector_norm(offsets[chunk.start : chunk.stop]).square()
        cosines = chunk.cosines()
        largest = cosines.amax(dim=1)  # (classes, B)
        best = torch.maximum(best, largest.amax(dim=0).float() - error)
        wanted = largest >= best - (cut + error)
        mine = by_class[bounds[chunk.start] : bounds[chunk.stop]]
        wanted[targets[mine] - chunk.start, mine] = True
        classes, rows = wanted.nonzero(as_tuple=True)
        count += rows.numel()
        if count > limit:
            return None
        is_own = targets[rows] == classes + chunk.start
        values = cosines[classes, :, rows]  # (n, K)
        if screen:
            near = values >= largest[classes, rows].unsqueeze(1) - 2.0 * error
            near |= is_own.unsqueeze(1)
            values = _exact(chunk.prompts, features, classes, rows, near)
        top, winners = values.max(dim=1)
        own[rows[is_own]] = values[is_own]
        best.scatter_reduce_(0, rows, top, "amax")
        parts.append((rows, (classes + chunk.start) * num_prompts + winners, top))
    rows, prompts, top = (torch.cat(part) for part in zip(*parts, strict=True))
    keep = (top >= best[rows] - cut) | (targets[rows] == prompts // num_prompts)
    rows, prompts, top = rows[keep], prompts[keep], top[keep]
    weights = torch.exp((top - best[rows]) * terms.sharpness)
    total = torch.zeros_like(best).index_add_(0, rows, weights)
    log_total = total.log() + best * terms.sharpness
    is_own = targets[rows] == prompts // num_prompts
    return own, log_total, own.amax(dim=1), squares, (rows, prompts, top, is_own, norms)


def _exact(
    prompts: Tensor, features: Tensor, classes: Tensor, rows: Tensor, near: Tensor
) -> Tensor:
    """(n, K) float32 cosines of the pairs where `near` (n, K), -inf elsewhere."""
    num_classes, num_prompts, dim = prompts.shape
    num_rows = features.shape[0]
    pair, member = near.nonzero(as_tuple=True)
    prompt = classes[pair] * num_prompts + member
    order = torch.argsort(prompt)
    prompt = prompt[order]
    pattern = _csr(
        prompt, rows[pair[order]], prompt.new_zeros(()), (num_classes * num_prompts, num_rows)
    )
    found = torch.sparse.sampled_addmm(pattern, prompts.view(-1, dim), features.t(), beta=0.0)
    values = features.new_full(near.shape, -math.inf)
    values.view(-1)[(pair * num_prompts + member)[order]] = found.values()
    return values


def _csr(rows: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    """CSR matrix of entries that are already sorted by row."""
    starts = torch.zeros(shape[0] + 1, dtype=torch.int32)
    torch.cumsum(torch.bincount(rows, minlength=shape[0]), 0, out=starts[1:])
    if values.dim() == 0:
        values = torch.zeros(columns.shape, dtype=torch.float32)
    _accept_sparse_csr()
    return torch.sparse_csr_tensor(
        starts, columns.to(torch.int32), values, size=shape, check_invariants=False
    )


@functools.cache
def _accept_sparse_csr() -> None:
    """Takes the once-given notice that CSR tensors are in beta before users see it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        index = torch.zeros(2, dtype=torch.int32)
        torch.sparse_csr_tensor(
            index, index[:0], torch.zeros(0), size=(1, 1), check_invariants=False
        )


def _sparse_gradient(
    features: Tensor,
    base: Tensor,
    offsets: Tensor,
    targets: Tensor,
    own: Tensor,
    mixture: Tensor,
    log_total: Tensor,
    terms: _Terms,
    slope: float,
    decay: float,
    rows: Tensor,
    prompts: Tensor,
    top: Tensor,
    is_own: Tensor,
    norms: Tensor,
) -> Tensor:
    """(C, K, D) gradient of the offsets from the remembered pairs.

    With w_ij = dL/ds_ij, n_j = |b + o_j| and r_j = Σ_i w_ij s_ij, the normalisation's backward is
    d o_j = Σ_i (w_ij / n_j) x_i - (r_j / n_j²) (b + o_j): one elementwise pass over the offsets and
    one product of a sparse matrix with the rows [x; b].
    """
    num_classes, num_prompts, dim = offsets.shape
    num_rows = features.shape[0]
    share = torch.exp(top * terms.sharpness - log_total[rows])
    weights = slope * (share - is_own.to(share.dtype))
    row, member = (mixture.abs() > 1e-9 * abs(slope)).nonzero(as_tuple=True)
    prompts = torch.cat([prompts, targets[row] * num_prompts + member])
    rows = torch.cat([rows, row])
    weights = torch.cat([weights, mixture[row, member]])
    cosines = torch.cat([top, own[row, member]])
    inverse = norms.view(-1).reciprocal()
    pull = torch.zeros_like(inverse).index_add_(0, prompts, weights * cosines)
    pull.mul_(inverse).mul_(inverse)
    weights.mul_(inverse[prompts])
    touched = pull.nonzero().squeeze(1)
    prompts = torch.cat([prompts, touched])
    rows = torch.cat([rows, touched // num_prompts + num_rows])
    weights = torch.cat([weights, -pull[touched]])
    order = torch.argsort(prompts)
    matrix = _csr(
        prompts[order], rows[order], weights[order], (norms.numel(), num_rows + num_classes)
    )
    result = torch.mul(offsets.detach(), (decay - pull).view(num_classes, num_prompts, 1))
    flat = result.view(-1, dim)
    torch.addmm(flat, matrix, torch.cat([features, base]), out=flat)
    return result


def _dense_scores(
    features: Tensor, base: Tensor, offsets: Tensor, targets: Tensor, terms: _Terms
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `_collect_pairs` without the pairs, and nothing cut."""
    own = features.new_empty(features.shape[0], offsets.shape[1])
    log_total = features.new_full((features.shape[0],), -math.inf)
    squares = offsets.new_zeros(())
    for chunk in _Chunks(features, base, offsets):
        squares += torch.linalg.vector_norm(offsets[chunk.start : chunk.stop]).square()
        cosines = chunk.cosines()
        scores = cosines.amax(dim=1).mul_(terms.sharpness)
        log_total = torch.logaddexp(log_total, torch.logsumexp(scores, dim=0))
        mine = ((targets >= chunk.start) & (targets < chunk.stop)).nonzero().squeeze(1)
        own[mine] = cosines[targets[mine] - chunk.start, :, mine]
    return own, log_total, own.amax(dim=1), squares


def _dense_gradient(
    features: Tensor,
    base: Tensor,
    offsets: Tensor,
    targets: Tensor,
    mixture: Tensor,
    log_total: Tensor,
    terms: _Terms,
    slope: float,
    decay: float,
) -> Tensor:
    """(C, K, D) gradient of the offsets, with each chunk's cosines computed a second time."""
    result = torch.empty_like(offsets)
    for chunk in _Chunks(features, base, offsets):
        cosines = chunk.cosines()
        top, winners = cosines.max(dim=1)
        share = torch.exp(top.mul(terms.sharpness).sub_(log_total)).mul_(slope)
        mine = ((targets >= chunk.start) & (targets < chunk.stop)).nonzero().squeeze(1)
        classes = targets[mine] - chunk.start
        share[classes, mine] -= slope
        weights = torch.zeros_like(cosines).scatter_(1, winners.unsqueeze(1), share.unsqueeze(1))
        weights[classes, :, mine] += mixture[mine]
        pull = (weights * cosines).sum(dim=-1, keepdim=True)  # (classes, K, 1)
        part = result[chunk.start : chunk.stop]
        torch.matmul(weights.flatten(0, 1), features, out=part.view(-1, part.shape[-1]))
        part.addcmul_(chunk.prompts, pull, value=-1.0)
        part.div_(chunk.norms.unsqueeze(-1))
        part.add_(offsets[chunk.start : chunk.stop], alpha=decay)
    return result
