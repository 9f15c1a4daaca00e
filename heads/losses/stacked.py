"""A loss of G linear classifiers that read the same features: one multiplication for all."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

CHUNK_ELEMENTS = 2**22
"""Logits held at a time, in elements (16 MiB of float32): more only costs memory traffic."""

LossAndGradient = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""From (b, G, C) logits and the targets of b rows: (G,) loss summed over rows, and its (b, G, C)
derivative by the logits. May overwrite the logits."""


class StackedLinearLoss(torch.autograd.Function):
    """(G,) mean loss of each classifier; the gradient is made in the forward pass, chunk by chunk.

    Never holds more than `CHUNK_ELEMENTS` logits, and so no (B, G, C) tensor. Features get no
    gradient: they come from a cache. Under bfloat16 autocast both multiplications are bfloat16; a
    float16 one is not made use of: a sum of gradients over thousands of rows leaves its range.
    """

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        targets: Tensor,
        loss_and_gradient: LossAndGradient,
        num_copies: int,
        *parameters: Tensor,
    ) -> Tensor:
        """See the losses that call it; `parameters`: G weights (C, D), then 0 or G biases (C,)."""
        weights, biases = parameters[:num_copies], parameters[num_copies:]
        num_rows, num_classes = len(features), len(weights[0])
        weight = torch.cat(weights)
        bias = torch.cat(biases) if biases else weight.new_zeros(len(weight))
        weight_gradient, bias_gradient = torch.zeros_like(weight), torch.zeros_like(bias)
        losses = weight.new_zeros(num_copies)
        step = max(1, CHUNK_ELEMENTS // len(weight))
        kind, dtype = features.device.type, features.dtype
        if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.bfloat16:
            dtype = torch.bfloat16
        bias, weight = bias.to(dtype), weight.to(dtype)
        with torch.autocast(kind, enabled=False):
            for start in range(0, num_rows, step):
                rows = features[start : start + step].to(dtype)
                logits = torch.addmm(bias, rows, weight.T).float()
                logits = logits.view(len(rows), num_copies, num_classes)
                loss, gradient = loss_and_gradient(logits, targets[start : start + step])
                losses += loss
                flat = gradient.view(len(rows), -1)
                if dtype == weight_gradient.dtype:
                    weight_gradient.addmm_(flat.T, rows)
                else:
                    weight_gradient += flat.T.to(dtype) @ rows
                bias_gradient += flat.sum(0)
        ctx.num_copies, ctx.has_bias = num_copies, bool(biases)
        ctx.save_for_backward(weight_gradient.div_(num_rows), bias_gradient.div_(num_rows))
        return losses / num_rows

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the weights and biases."""
        parts = grad_outputs[0]
        weight, bias = (saved.unflatten(0, (ctx.num_copies, -1)) for saved in ctx.saved_tensors)
        gradients = [weight * parts[:, None, None]]
        if ctx.has_bias:
            gradients.append(bias * parts[:, None])
        return (None, None, None, None, *(g for stack in gradients for g in stack.unbind()))
