"""AdamW for towers trained from scratch: who decays, and the schedule."""

import math
from collections.abc import Callable
from typing import Annotated, Any

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import nn

from featcache.config import Config
from finetune.parallel import alike_groups
from heads.optim import ScheduleConfig, lr_factor

Decay = Annotated[float, Field(ge=0.0, lt=1.0)]
"""Decay rate of a running mean, [0, 1)."""

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)


class AdamWConfig(Config):
    """AdamW with linear warm-up, then half-cosine decay."""

    lr: PositiveFloat = 2e-3
    """Peak learning rate, > 0."""
    betas: tuple[Decay, Decay] = (0.9, 0.98)
    """Decay rates of AdamW's two moments, each in [0, 1)."""
    eps: PositiveFloat = 1e-8
    """AdamW's epsilon, > 0."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay of matrices and kernels, >= 0; biases, norm gains and the logit scale
    never decay."""
    warmup: float = Field(default=0.2, ge=0.0, lt=1.0)
    """Share of all optimizer steps spent in linear warm-up, [0, 1)."""
    cycles: PositiveInt = 1
    """Half-cosines after the warm-up, 1 or more; a further one restarts from the peak."""
    clip_norm: NonNegativeFloat = 1.0
    """Largest norm of the gradient over all parameters, >= 0; 0 = not clipped."""

    def build(self, model: nn.Module) -> torch.optim.AdamW:
        """The optimizer over all trainable parameters of `model`; fused kernels, same results."""
        groups = alike_groups(param_groups(model, self.weight_decay))
        for group in groups:
            group["peak_lr"] = self.lr
        return torch.optim.AdamW(groups, self.lr, self.betas, self.eps, fused=True)

    def lr_factor(self, num_steps: int) -> Callable[[int], float]:
        """Multiplier of the peak learning rate at a 0-based step, as in `heads.optim`.

        With several cycles: Loshchilov and Hutter, "SGDR" (2017), equation 5, cycles equally long.

        Args:
            num_steps: optimizer steps of the whole run.
        """
        warmup = round(self.warmup * num_steps)
        schedule = ScheduleConfig(shape="cosine", warmup_steps=warmup)
        whole = lr_factor(schedule, num_steps)
        if self.cycles == 1:
            return whole

        def factor(step: int) -> float:
            if step < warmup:
                return whole(step)
            done = (step - warmup) / max(1, num_steps - warmup) * self.cycles
            return 0.5 * (1 + math.cos(math.pi * (done % 1.0)))

        return factor


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
