"""AdamW for towers trained from scratch: who decays, and the learning rate of every step."""

import math
from typing import Any

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import nn

from featcache.config import Config

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)


class AdamWConfig(Config):
    """AdamW with linear warm-up and half-cosine decay."""

    lr: PositiveFloat = 2e-3
    """Peak learning rate, > 0."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Decay rates of AdamW's two moments, each in [0, 1)."""
    eps: PositiveFloat = 1e-8
    """AdamW's epsilon, > 0."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay of matrices and kernels, >= 0; biases, norm gains and the logit scale
    never decay."""
    warmup: float = Field(default=0.2, ge=0.0, lt=1.0)
    """Share of all optimizer steps spent in linear warm-up, [0, 1)."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Gradients are scaled down to this L2 norm over all parameters; 0 = never."""

    def build(self, model: nn.Module) -> torch.optim.AdamW:
        """The optimizer over all trainable parameters of `model`."""
        return torch.optim.AdamW(
            param_groups(model, self.weight_decay),
            lr=self.lr,
            betas=self.betas,
            eps=self.eps,
            fused=True,
        )


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices, kernels and embeddings decay; biases, norm gains and scalars do not."""
    norms = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, _NORMS)
        for parameter in module.parameters(recurse=False)
    }
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        kept = parameter.ndim < 2 or id(parameter) in norms or name.endswith("bias")
        (plain if kept else decayed).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]


def learning_rate(step: int, num_steps: int, warmup: float, peak: float) -> float:
    """Learning rate of a step: linear warm-up to `peak`, then half a cosine towards 0.

    Args:
        step: optimizer step, from 0; already the first one moves.
        num_steps: all steps of the run.
        warmup: share of them spent rising.
        peak: highest value.
    """
    rising = round(warmup * num_steps)
    if step < rising:
        return peak * (step + 1) / rising
    return 0.5 * peak * (1.0 + math.cos(math.pi * (step - rising) / (num_steps - rising)))
