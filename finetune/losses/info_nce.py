"""InfoNCE: every image against every caption of the batch, both ways.

Reference: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision"
(2021), section 2.3 and figure 3; van den Oord et al., "Representation Learning with Contrastive
Predictive Coding" (2018), equation 4, for the name.

The gradient is written out, where others leave it to autograd. With z = exp(s)·I·Tᵀ and its softmax
over rows, R, and over columns, C,

    ∂L/∂z = (R + C − 2·1) / 2B,   ∂L/∂I = exp(s)·∂L/∂z·T,   ∂L/∂T = exp(s)·∂L/∂zᵀ·I

    ∂L/∂s = Σᵢⱼ zᵢⱼ·∂L/∂zᵢⱼ = Σᵢ Iᵢ·∂L/∂Iᵢ

so a process that knows all features and the B + B normalisers of R and C has the exact gradient by
its own rows: features are gathered once and nothing of their size goes back, and the matrix is
made a few rows at a time. (Autograd through a gather needs a second exchange of all features, and
every intermediate of b × B.)
"""

import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from finetune.losses.base import PairLossConfig, checked, row_chunks
from finetune.parallel import all_rows, no_autocast
from heads.distributed import Group

INITIAL_LOGIT_SCALE = math.log(1 / 0.07)
"""Natural logarithm of the scale that training starts from: temperature 0.07."""

MAX_LOGIT_SCALE = math.log(100.0)
"""Largest log scale; beyond it one hard pair swamps the batch and training diverges."""


class InfoNceConfig(PairLossConfig):
    """Softmax over all captions for each image and over all images for each caption (CLIP)."""

    kind: Literal["info_nce"] = "info_nce"
    """Loss kind."""

    initial_scale = INITIAL_LOGIT_SCALE

    def loss(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        group: Group | None = None,
    ) -> Tensor:
        """See `PairLossConfig.loss`; a bias, which no softmax would feel, is refused."""
        if logit_bias is not None:
            raise ValueError("info_nce has no bias, found a logit_bias; choose siglip")
        return info_nce(image_features, text_features, logit_scale, group)

    def of_chance(self, batch_size: int) -> float:
        """Log B: all texts alike."""
        return math.log(batch_size)

    def clamp(self, logit_scale: Tensor) -> None:
        """Puts s back into [0, ln 100], in place."""
        clamp_logit_scale(logit_scale)


def info_nce(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    group: Group | None = None,
    rows_at_once: int | None = None,
) -> Tensor:
    """The symmetric cross entropy ½[CE(z, diag) + CE(zᵀ, diag)] with z = exp(s)·I·Tᵀ.

    Row i of both inputs belongs together; all other rows are its negatives, those of other
    processes too, so the value depends on B: compare runs at equal batch size only.

    Args:
        image_features: (b, P) float, L2-normalised.
        text_features: (b, P) float, L2-normalised.
        logit_scale: () or (1,) float, s: natural logarithm of the scale.
        group: the processes that share the batch, b rows each; None = this one alone.
        rows_at_once: rows of z that are held at once; None = what 128 MiB hold.

    Returns:
        () float32 (float64 for float64 features), in nats; ln B for a model that knows nothing.
        The same for every process, gradients as told in `finetune.losses.base`.

    Raises:
        ValueError: if the two feature matrices differ in shape.
    """
    images, texts = checked(image_features, text_features)
    loss: Tensor = _InfoNce.apply(
        images, texts, logit_scale, group, rows_at_once, torch.is_grad_enabled()
    )
    return loss


class _InfoNce(torch.autograd.Function):
    """The loss, with its gradients computed on the way forward."""

    @staticmethod
    def forward(
        ctx: Any,
        images: Tensor,
        texts: Tensor,
        logit_scale: Tensor,
        group: Group | None,
        rows_at_once: int | None,
        with_gradients: bool,
    ) -> Tensor:
        scale = logit_scale.detach().to(images.dtype).exp().reshape(())
        with no_autocast(images.device):
            if group is None or group.size == 1:
                found = _alone(images, texts, scale, rows_at_once, with_gradients)
            else:
                found = _together(images, texts, scale, group, rows_at_once, with_gradients)
        loss, by_images, by_texts = found
        if with_gradients:
            by_scale = torch.dot(images.flatten(), by_images.flatten())
            ctx.save_for_backward(by_images, by_texts, by_scale.reshape(logit_scale.shape))
            ctx.scale_dtype = logit_scale.dtype
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (factor,) = upstream
        by_images, by_texts, by_scale = ctx.saved_tensors
        by_scale = (factor * by_scale).to(ctx.scale_dtype)
        return factor * by_images, factor * by_texts, by_scale, None, None, None


_Found = tuple[Tensor, Tensor, Tensor]
"""Loss, and its gradients by the images and texts of this process."""


def _alone(
    images: Tensor, texts: Tensor, scale: Tensor, rows_at_once: int | None, with_gradients: bool
) -> _Found:
    """One process: rows and columns are read off the same matrix."""
    count = len(images)
    slices = list(row_chunks(count, count, rows_at_once))
    matrix = _Blocks(images, texts, scale, slices)
    by_row = images.new_empty(count)
    by_column = images.new_full((count,), -math.inf)
    loss = images.new_zeros(())
    for rows, z in matrix:
        by_row[rows] = z.logsumexp(1)
        by_column = torch.logaddexp(by_column, z.logsumexp(0))
        loss -= 2 * z.diagonal(rows.start).sum()
    loss = (loss + by_row.sum() + by_column.sum()) / (2 * count)
    by_images, by_texts = torch.zeros_like(images), torch.zeros_like(texts)
    if with_gradients:
        for rows, z in matrix:
            slope = _slope_in_place(z, by_row[rows], by_column, rows.start)
            by_images[rows] = slope @ texts
            by_texts += slope.T @ images[rows]
    factor = scale / (2 * count)
    return loss, by_images * factor, by_texts * factor


def _together(
    images: Tensor,
    texts: Tensor,
    scale: Tensor,
    group: Group,
    rows_at_once: int | None,
    with_gradients: bool,
) -> _Found:
    """Several processes: own images against all texts, own texts against all images."""
    all_images, all_texts = all_rows(images, group), all_rows(texts, group)
    count, total, first = len(images), len(all_images), group.rank * len(images)
    slices = list(row_chunks(count, total, rows_at_once))
    sides = (_Blocks(images, all_texts, scale, slices), _Blocks(texts, all_images, scale, slices))
    loss = images.new_zeros(())
    normalisers = images.new_empty(count, 2)
    for side, matrix in enumerate(sides):
        for rows, z in matrix:
            normalisers[rows, side] = z.logsumexp(1)
            loss -= z.diagonal(first + rows.start).sum()
    loss = group.sum(loss + normalisers.sum()) / (2 * total)
    everyones = all_rows(normalisers, group)
    gradients = [torch.zeros_like(images), torch.zeros_like(texts)]
    if with_gradients:
        for side, (matrix, others) in enumerate(zip(sides, (all_texts, all_images), strict=True)):
            for rows, z in matrix:
                own = normalisers[rows, side]
                slope = _slope_in_place(z, own, everyones[:, 1 - side], first + rows.start)
                gradients[side][rows] = slope @ others
    factor = scale / (2 * total)
    return loss, gradients[0] * factor, gradients[1] * factor


class _Blocks:
    """Rows of exp(s)·A·Bᵀ, slice by slice, twice; kept for the second time if one slice is all."""

    def __init__(self, a: Tensor, b: Tensor, scale: Tensor, slices: list[slice]) -> None:
        self._a, self._b, self._scale, self._slices = a, b, scale, slices
        self._kept: Tensor | None = None

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        for rows in self._slices:
            z, self._kept = self._kept, None
            if z is None:
                z = (self._a[rows] * self._scale) @ self._b.T
                if len(self._slices) == 1:
                    self._kept = z
            yield rows, z


def _slope_in_place(z: Tensor, by_row: Tensor, by_column: Tensor, offset: int) -> Tensor:
    """R + C − 2·1 of some rows of z, in its memory; their first pair lies `offset` to the right."""
    over_rows = (z - by_row[:, None]).exp_()
    slope = z.sub_(by_column).exp_().add_(over_rows)
    slope.diagonal(offset).sub_(2)
    return slope


@torch.no_grad()
def clamp_logit_scale(logit_scale: Tensor) -> None:
    """Puts s back into [0, ln 100], in place; belongs after every optimiser step."""
    logit_scale.clamp_(0.0, MAX_LOGIT_SCALE)
