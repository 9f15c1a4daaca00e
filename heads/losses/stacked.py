"""Any loss on logits of G linear classifiers that read the same features: one product for all."""

from typing import Any

import torch
from torch import Tensor

from heads.losses.base import Loss, as_multi_hot

CHUNK_ELEMENTS = 2**22
"""Logits held at a time, in elements (16 MiB of float32): more only costs memory traffic."""

GROUP_ELEMENTS = 2**18
"""Logits that a loss without a closed form sees at a time: its many temporaries stay in cache."""


def stacked_loss(
    criterion: Loss,
    features: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    targets: Tensor,
) -> Tensor:
    """(G,) loss of each of G linear classifiers.

    Equals `criterion(F.linear(features, weights[g], biases[g]), targets)` for each g, up to
    rounding, and so do its gradients; a loss on cosines gets the products alone, and each
    classifier's one bias as its offset. Under bfloat16 autocast both products are bfloat16.

    Args:
        criterion: the loss; reads no parameter of its own.
        features: (B, D); gets no gradient: features come from a cache.
        weights: G times (C, D).
        biases: G times (C,), or an empty list; for a loss on cosines G times ().
        targets: (B,) int64 class indices or (B, C) float 0..1.
    """
    losses: Tensor = _StackedLinearLoss.apply(
        features, targets, criterion, len(weights), *weights, *biases
    )
    if criterion.reduction == "sum":
        losses = losses * (len(features) * len(weights[0]))
    return losses


class _StackedLinearLoss(torch.autograd.Function):
    """(G,) mean loss of each classifier; the gradient is made in the forward pass, chunk by chunk.

    Never holds more than `CHUNK_ELEMENTS` logits, and so no (B, G, C) tensor, but for losses in
    which rows depend on each other.
    """

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        targets: Tensor,
        criterion: Loss,
        num_copies: int,
        *parameters: Tensor,
    ) -> Tensor:
        """See `stacked_loss`; `parameters`: G weights, then 0 or G biases."""
        device = features.device.type
        product = features.dtype
        # A float16 autocast is left out: sums of gradients over thousands of rows leave its range.
        mixed = torch.is_autocast_enabled(device) and product == torch.float32
        if mixed and torch.get_autocast_dtype(device) == torch.bfloat16:
            product = torch.bfloat16
        with torch.autocast(device, enabled=False):
            return _StackedLinearLoss._forward(
                ctx, features, targets, criterion, num_copies, parameters, product
            )

    @staticmethod
    def _forward(
        ctx: Any,
        features: Tensor,
        targets: Tensor,
        criterion: Loss,
        num_copies: int,
        parameters: tuple[Tensor, ...],
        product: torch.dtype,
    ) -> Tensor:
        weights, biases = parameters[:num_copies], parameters[num_copies:]
        num_rows, num_classes = len(features), len(weights[0])
        weight = torch.cat(weights)
        factor = weight.to(product).T
        bias = None if criterion.needs_cosines or not biases else torch.cat(biases)
        offsets = torch.stack(biases) if criterion.needs_cosines and biases else None
        weight_gradient = torch.zeros_like(weight)
        bias_gradient = torch.zeros_like(torch.stack(biases)) if biases else None
        losses = weight.new_zeros(num_copies)
        step = max(1, CHUNK_ELEMENTS // len(weight))
        if criterion.needs_whole_batch:
            step = num_rows
        for start in range(0, num_rows, step):
            rows = features[start : start + step]
            wanted = targets[start : start + step]
            if product == weight.dtype and bias is not None:
                logits = torch.addmm(bias, rows, factor)
            else:
                logits = (rows.to(product) @ factor).to(weight.dtype)
                if bias is not None:
                    logits += bias
            logits = logits.view(len(rows), num_copies, num_classes)
            found = None if offsets is not None else criterion.sums_and_slopes(logits, wanted)
            if found is None:
                found = _sums_and_slopes(criterion, logits, wanted, offsets, bias_gradient)
            loss, slopes = found
            losses += loss
            flat = slopes.view(len(rows), -1)
            if product == weight.dtype:
                weight_gradient.addmm_(flat.T, rows)
            else:
                weight_gradient += flat.to(product).T @ rows.to(product)
            if bias is not None and bias_gradient is not None:
                bias_gradient += slopes.sum(0)
        ctx.num_copies, ctx.has_bias = num_copies, bias_gradient is not None
        kept = [weight_gradient.div_(num_rows)]
        if bias_gradient is not None:
            kept.append(bias_gradient.div_(num_rows))
        ctx.save_for_backward(*kept)
        return losses / num_rows

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the weights and biases."""
        parts = grad_outputs[0]
        weight = ctx.saved_tensors[0].unflatten(0, (ctx.num_copies, -1))
        gradients = list((weight * parts[:, None, None]).unbind())
        if ctx.has_bias:
            bias = ctx.saved_tensors[1]
            gradients += (bias * parts.view(-1, *[1] * (bias.ndim - 1))).unbind()
        return (None, None, None, None, *gradients)


def _sums_and_slopes(
    criterion: Loss,
    logits: Tensor,
    targets: Tensor,
    offsets: Tensor | None,
    offset_gradient: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """What `Loss.sums_and_slopes` gives, by autograd on a few classifiers at a time.

    Args:
        criterion: the loss.
        logits: (b, G, C).
        targets: of the b rows.
        offsets: (G,) of a loss on cosines.
        offset_gradient: (G,) that their gradients are added to.
    """
    num_rows, num_copies, num_classes = logits.shape
    if targets.ndim == 1 and criterion.reads_multi_hot:
        targets = as_multi_hot(targets, num_classes)
    size = max(1, GROUP_ELEMENTS // (num_rows * num_classes))
    if criterion.needs_whole_batch:
        size = 1
    losses, slopes = logits.new_empty(num_copies), torch.empty_like(logits)
    for start in range(0, num_copies, size):
        group = slice(start, min(start + size, num_copies))
        count = group.stop - start
        leaf = logits[:, group].detach().requires_grad_()
        extra, options = [leaf], {}
        with torch.enable_grad():
            if offsets is not None:
                extra.append(offsets[group].detach().requires_grad_())
                options["offset"] = extra[1].repeat(num_rows).unsqueeze(1)
            wanted = targets if count == 1 else targets.repeat_interleave(count, 0)
            terms = criterion.terms(leaf.reshape(num_rows * count, -1), wanted, **options)
            own = terms.view(num_rows, count, -1).mean(2).sum(0)
            found = torch.autograd.grad(own.sum(), extra)
        losses[group], slopes[:, group] = own.detach(), found[0]
        if offset_gradient is not None and offsets is not None:
            offset_gradient[group] += found[1]
    return losses, slopes
