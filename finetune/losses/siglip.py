"""SigLIP: is this image-text pair a pair or not, asked of each pair by itself.

Reference: Zhai et al., "Sigmoid Loss for Language Image Pre-Training" (2023), equation 1 and
algorithm 1; start values of t′ = ln t and b from section 3.2.

No softmax, so no normaliser over the batch: any rows of the matrix give their part of the loss and,
with G = σ(z) − 1 (1 the identity), of its gradient

    ∂L/∂z = G / B,   ∂L/∂I = t·G·T / B,   ∂L/∂T = t·Gᵀ·I / B,   ∂L/∂t′ = Σᵢ Iᵢ·∂L/∂Iᵢ

Departure: the paper passes text features around in a ring and sees b texts at a time; here all of
them are gathered (B·P numbers, small beside a tower's activations) and the matrix is made a few
rows at a time, which is what the memory goes into.
"""

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from finetune.losses.base import PairLossConfig, checked, row_chunks
from finetune.parallel import all_rows, no_autocast
from heads.distributed import Group

INITIAL_LOGIT_SCALE = math.log(10.0)
"""t′, natural logarithm of the scale that training starts from."""

INITIAL_LOGIT_BIAS = -10.0
"""b that training starts from: nearly all pairs of a batch are none, and so it predicts."""


class SiglipConfig(PairLossConfig):
    """A sigmoid for every pair of the batch, pair or no pair, with a learned bias (SigLIP)."""

    kind: Literal["siglip"] = "siglip"
    """Loss kind."""

    initial_scale = INITIAL_LOGIT_SCALE
    initial_bias = INITIAL_LOGIT_BIAS

    def loss(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        group: Group | None = None,
    ) -> Tensor:
        """See `PairLossConfig.loss`; the bias is required."""
        if logit_bias is None:
            raise ValueError("siglip needs a logit_bias, found none; build the model with one")
        return siglip(image_features, text_features, logit_scale, logit_bias, group)

    def of_chance(self, batch_size: int) -> float:
        """Log B − (B − 1)·log(1 − 1/B): every pair is one with probability 1/B."""
        return math.log(batch_size) - (batch_size - 1) * math.log1p(-1 / batch_size)


def siglip(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    group: Group | None = None,
    rows_at_once: int | None = None,
) -> Tensor:
    """−1/B Σᵢⱼ ln σ(lᵢⱼ·(exp(s)·Iᵢ·Tⱼ + b)), l = +1 for i = j, else −1.

    Args:
        image_features: (b, P) float, L2-normalised.
        text_features: (b, P) float, L2-normalised.
        logit_scale: () or (1,) float, s: natural logarithm of the scale.
        logit_bias: () or (1,) float.
        group: the processes that share the batch, b rows each; None = this one alone.
        rows_at_once: rows of the matrix that are held at once; None = what 128 MiB hold.

    Returns:
        () float32 (float64 for float64 features), in nats an image, summed over all B texts.
        The same for every process, gradients as told in `finetune.losses.base`.

    Raises:
        ValueError: if the two feature matrices differ in shape.
    """
    images, texts = checked(image_features, text_features)
    loss: Tensor = _Siglip.apply(
        images, texts, logit_scale, logit_bias, group, rows_at_once, torch.is_grad_enabled()
    )
    return loss


class _Siglip(torch.autograd.Function):
    """The loss, with its gradients computed on the way forward."""

    @staticmethod
    def forward(
        ctx: Any,
        images: Tensor,
        texts: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor,
        group: Group | None,
        rows_at_once: int | None,
        with_gradients: bool,
    ) -> Tensor:
        scale = logit_scale.detach().to(images.dtype).exp().reshape(())
        bias = logit_bias.detach().to(images.dtype).reshape(())
        alone = group is None or group.size == 1
        with no_autocast(images.device):
            all_texts = texts if group is None or alone else all_rows(texts, group)
            total, first = len(all_texts), 0 if group is None else group.rank * len(images)
            loss, by_bias = images.new_zeros(()), images.new_zeros(())
            by_images, by_texts = torch.zeros_like(images), torch.zeros_like(texts)
            slices = list(row_chunks(len(images), total, rows_at_once))
            for rows in slices:
                z = ((images[rows] * scale) @ all_texts.T).add_(bias)
                loss += F.softplus(z).sum() - z.diagonal(first + rows.start).sum()
                if not with_gradients:
                    continue
                slope = _slope_in_place(z, first + rows.start)
                by_bias += slope.sum()
                by_images[rows] = slope @ all_texts
                if alone:
                    by_texts += slope.T @ images[rows]
            if group is not None and not alone:
                loss = group.sum(loss)
                if with_gradients:  # own texts against all images: their part of the columns
                    all_images = all_rows(images, group)
                    for rows in slices:
                        z = ((texts[rows] * scale) @ all_images.T).add_(bias)
                        by_texts[rows] = _slope_in_place(z, first + rows.start) @ all_images
        if with_gradients:
            by_images *= scale / total
            by_texts *= scale / total
            by_scale = torch.dot(images.flatten(), by_images.flatten())
            ctx.save_for_backward(
                by_images,
                by_texts,
                by_scale.reshape(logit_scale.shape).to(logit_scale.dtype),
                (by_bias / total).reshape(logit_bias.shape).to(logit_bias.dtype),
            )
        return loss / total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (factor,) = upstream
        by_images, by_texts, by_scale, by_bias = ctx.saved_tensors
        return (
            factor * by_images,
            factor * by_texts,
            (factor * by_scale).to(by_scale.dtype),
            (factor * by_bias).to(by_bias.dtype),
            None,
            None,
            None,
        )


def _slope_in_place(z: Tensor, offset: int) -> Tensor:
    """σ(z) − 1 of some rows of z, in its memory; their first pair lies `offset` to the right."""
    slope = z.sigmoid_()
    slope.diagonal(offset).sub_(1)
    return slope
