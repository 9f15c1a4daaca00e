"""Penalties against prompts of a class becoming one: alike, unused, or used by one row only.

With p_ck the unit prompts, γ_ik = softmax_k(κ <x_i, p_{y_i,k}> / τ) with its gradient, unlike in
the mixture loss, and u_c = mean of γ_i over the rows of class c:

    diversity = mean over c in batch and k != l of <p_ck, p_cl>²      (0 for K = 1)
    entropy   = mean over c in batch of -H(u_c)
    min_usage = mean over c in batch of Σ_k max(0, threshold - u_ck)

All three look at the classes of the batch alone. They cost little beside the loss that they join:
the cosines of rows with their own prompts are there already, so that entropy and usage only change
the weights of entries which the gradient has anyway; diversity adds K x K products of prompts that
are normalised at that moment.

Reference: systems "Mixture-of-Prompts CLIP", later extras against mode collapse; it names the three
and their weights (0.1, 0.01, 0 with threshold 0.05) without formulas, which are ours.

Shapes: B rows, U classes in the batch, K prompts a class, D width.
"""

from bisect import bisect_left
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from heads.losses.prompt_chunks import Chunk

_SMALLEST_USAGE = 1e-12


@dataclass(frozen=True)
class Collapse:
    """Weights >= 0 of the three penalties, and the share of rows that each prompt should get."""

    diversity: float = 0.0
    entropy: float = 0.0
    min_usage: float = 0.0
    usage_threshold: float = 0.05

    @property
    def reads_usage(self) -> bool:
        """Whether entropy or usage count."""
        return self.entropy > 0.0 or self.min_usage > 0.0


NO_COLLAPSE = Collapse()
"""None of the penalties."""


class Grams:
    """Cosines between the prompts of each class in the batch, gathered chunk by chunk.

    Attributes:
        present: (U,) int64 classes of the batch, ascending.
        values: (U, K, K) float32, 0 on the diagonal.
    """

    def __init__(self, present: Tensor, num_prompts: int) -> None:
        self.present = present
        self.values = torch.empty(
            len(present), num_prompts, num_prompts, dtype=torch.float32, device=present.device
        )
        self._order: list[int] = present.tolist()

    def between(self, start: int, stop: int) -> tuple[int, int]:
        """First and last + 1 position in `present` of the classes start..stop."""
        return bisect_left(self._order, start), bisect_left(self._order, stop)

    def add(self, chunk: Chunk) -> None:
        """Fills in the classes of a chunk."""
        first, last = self.between(chunk.start, chunk.stop)
        if first == last:
            return
        prompts = chunk.prompts[self.present[first:last] - chunk.start]
        part = self.values[first:last]
        torch.bmm(prompts, prompts.transpose(1, 2), out=part)
        part.diagonal(dim1=1, dim2=2).zero_()

    def diversity(self) -> Tensor:
        """0-d mean squared cosine of two prompts of a class."""
        return self.values.square().sum() / self.pairs

    @property
    def pairs(self) -> int:
        """U K (K - 1), at least 1."""
        num_classes, num_prompts, _ = self.values.shape
        return max(1, num_classes * num_prompts * (num_prompts - 1))

    def add_gradient(
        self,
        result: Tensor,
        offsets: Tensor,
        base: Tensor,
        norms: Tensor,
        first: int,
        positions: Tensor,
        weight: float,
    ) -> None:
        """Adds `weight` times the gradient of `diversity` to that of some classes.

        With S the cosines, d|S|²/dp_k = 4 Σ_l S_kl p_l, and the normalisation's backward leaves
        d o_k = Σ_l W_kl (b + o_l), W_kl = 4 S_kl / (n_k n_l), W_kk = -4 Σ_l S_kl² / n_k².

        Args:
            result: (c, K, D) gradient of the classes of a chunk.
            offsets: (c, K, D) of the same classes.
            base: (c, D) likewise.
            norms: (c, K) likewise.
            first: position in `present` of the first class that is in the batch.
            positions: (m,) int64 positions in 0..c-1 of those classes.
            weight: factor.
        """
        if len(positions) == 0:
            return
        cosines = self.values[first : first + len(positions)]
        inverse = norms[positions].reciprocal()  # (m, K)
        mixed = cosines * inverse.unsqueeze(1)
        mixed.diagonal(dim1=1, dim2=2).copy_(-cosines.square().sum(dim=2) * inverse)
        mixed *= (4.0 * weight / self.pairs) * inverse.unsqueeze(2)
        prompts = offsets[positions].add_(base[positions].unsqueeze(1))
        result.index_add_(0, positions, torch.bmm(mixed, prompts))


def usage_terms(
    own: Tensor,
    member: Tensor,
    num_present: int,
    *,
    scale: float,
    tau: float,
    collapse: Collapse,
) -> tuple[Tensor, Tensor, Tensor]:
    """Entropy and min_usage, both 0-d, and the (B, K) slope of their weighted sum.

    Args:
        own: (B, K) float32 cosines with the own class's prompts; the slope is along them.
        member: (B,) int64 number of each row's class among those of the batch.
        num_present: U.
        scale: κ > 0.
        tau: τ > 0.
        collapse: weights and threshold.
    """
    assignment = torch.softmax(own * (scale / tau), dim=1)
    counts = torch.bincount(member, minlength=num_present).to(own.dtype).unsqueeze(1)
    usage = own.new_zeros(num_present, own.shape[1]).index_add_(0, member, assignment) / counts
    logs = usage.clamp_min(_SMALLEST_USAGE).log()
    entropy = (usage * logs).sum() / num_present
    shortfall = F.relu(collapse.usage_threshold - usage).sum() / num_present
    along = collapse.entropy * (logs + 1.0) * (usage > _SMALLEST_USAGE)
    along -= collapse.min_usage * (usage < collapse.usage_threshold)
    along /= counts * num_present  # dL/dγ of one row
    slope = along[member]
    slope -= (assignment * slope).sum(dim=1, keepdim=True)
    return entropy, shortfall, slope.mul_(assignment).mul_(scale / tau)
