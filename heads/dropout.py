"""Dropout for the price of a few passes over memory: on CPUs torch draws number by number.

One 64-bit random number decides about four elements, 16 bits each, so that the share dropped is
exact to 1/65536. On other devices torch's own kernels are used.

Reference: Srivastava et al., Dropout: A Simple Way to Prevent Neural Networks from Overfitting,
2014, in the form in which kept elements are divided by the share kept.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_BITS = 16


def dropout(values: Tensor, share: float) -> Tensor:
    """`values` with a share of its elements set to 0 and the others divided by what is left.

    Args:
        values: any shape, float.
        share: 0 to below 1; 0 returns `values` itself.
    """
    if not share:
        return values
    if values.device.type != "cpu":
        return F.dropout(values, share)
    result: Tensor = _Dropout.apply(values, share)
    return result


def relu_dropout(values: Tensor, share: float) -> Tensor:
    """`dropout(relu(values), share)`, in place; what it keeps for the gradient is its result.

    Args:
        values: result of an operation that does not need it for its own gradient; overwritten.
        share: 0 to below 1.
    """
    if not share or values.device.type != "cpu":
        return F.dropout(F.relu(values), share, training=share > 0)
    result: Tensor = _ReluDropout.apply(values, share)
    return result


def kept(shape: torch.Size, share: float) -> Tensor:
    """Bool tensor on the CPU, True with probability 1 − share to within 1/65536."""
    count = shape.numel()
    drawn = torch.empty(-(-count * _BITS // 64), dtype=torch.int64).random_(-(2**63), None)
    threshold = round(share * (1 << _BITS)) - (1 << (_BITS - 1))
    mask: Tensor = drawn.view(torch.int16)[:count] >= threshold
    return mask.view(shape)


def _scale(share: float) -> float:
    """One over the share that `kept` really keeps."""
    return (1 << _BITS) / ((1 << _BITS) - round(share * (1 << _BITS)))


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, share: float) -> Tensor:
        mask = kept(values.shape, share)
        ctx.save_for_backward(mask)
        ctx.scale = _scale(share)
        return (values * mask).mul_(ctx.scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        return (gradient * mask).mul_(ctx.scale), None


class _ReluDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, share: float) -> Tensor:
        ctx.mark_dirty(values)
        ctx.scale = _scale(share)
        values.relu_().mul_(kept(values.shape, share)).mul_(ctx.scale)
        ctx.save_for_backward(values)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (values,) = ctx.saved_tensors
        return (gradient * (values > 0)).mul_(ctx.scale), None
