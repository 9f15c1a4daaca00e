"""Optimisers, learning-rate schedules, and the sizes that follow from the number of rows."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)
from torch import nn

from featcache.config import Config
from featcache.errors import ConfigError
from heads.base import Head, OptimDefaults, Shape
from heads.lazy_adam import LazyAdamW, StateDtype

_NO_FACTORS: Mapping[str, float] = {}
_CYCLE_START, _CYCLE_END = 1 / 25, 1 / 25e4
"""First and last multiplier of one_cycle: torch's default."""

MIN_STEPS_PER_EPOCH = 16
"""A small split is cut into at least this many batches: fewer updates train too little."""


class ScheduleConfig(Config):
    """How the learning rate moves over the optimiser steps."""

    shape: Shape | None = None
    """After the warm-up: cosine = half a cosine from the peak to 0; linear = a straight line to 0;
    constant = stay at the peak; one_cycle = rise along half a cosine from 1/25 of the peak, then
    fall along one to 4e-7 of it; plateau = multiply by `factor` whenever the validation has not
    improved for `patience` epochs. Unset = the head's own, mostly cosine."""
    warmup_steps: NonNegativeInt | None = None
    """Optimiser steps in which the rate rises to its peak, 0 or more; unset = a share of all steps
    that the head chooses, or `pct_start` of them for one_cycle."""
    pct_start: float = Field(default=0.2, gt=0, lt=1)
    """Share of all steps in which one_cycle rises, 0..1; not read if `warmup_steps` is set."""
    factor: float = Field(default=0.1, gt=0, lt=1)
    """What plateau multiplies the rate by, between 0 and 1; not read by the others."""
    patience: NonNegativeInt = 5
    """Epochs in a row without a better validation that plateau endures, 0 or more; the next one
    lowers the rate. Better = a higher metric, or a lower loss with `stop_on=loss`."""
    min_lr: NonNegativeFloat = 1e-7
    """Learning rate below which plateau does not go, 0 or more."""


class OptimConfig(Config):
    """How a head is trained; unset fields take the head's own defaults."""

    optimizer: Literal["adamw", "lazy_adamw", "adam", "sgd"] | None = None
    """adamw (decoupled weight decay), lazy_adamw (the same on the rows of a weight that a step has
    a gradient for: for mop with thousands of classes), adam or sgd (both with weight decay in the
    gradient); unset = the head's own, mostly adamw."""
    lr: PositiveFloat | None = None
    """Peak learning rate, > 0; unset = the head's own."""
    weight_decay: NonNegativeFloat | None = None
    """Weight decay, 0 or more; unset = the head's own."""
    epochs: PositiveInt | None = None
    """Passes over the training rows, 1 or more; unset = the head's own."""
    batch_size: PositiveInt | Literal["all"] | None = None
    """Rows per optimiser step, 1 or more, or all = the whole split; unset = the head's own, less
    for a small split."""
    accumulate: PositiveInt = 1
    """Pieces in which a batch is computed one after the other, 1 or more: as many times less memory
    for activations, and the same gradient for every loss that is a mean over rows."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of forward pass and loss: fp32, or mixed with bf16, or mixed with fp16 and a
    scaled loss; weights and optimiser stay float32. auto = bf16 on a GPU, fp32 on the CPU."""
    ema_decay: float | None = Field(default=None, ge=0, lt=1)
    """Average the weights over the steps with this decay, 0 to below 1 (0.999: over about 1000
    steps), and validate and keep the average; 0 = none; unset = the head's own, mostly none."""
    compile: bool = False
    """Compile forward pass and loss (torch.compile): a first step of up to a minute, then faster
    ones for heads of many small operations. Needs a C++ compiler."""
    state_dtype: StateDtype = "float32"
    """How lazy_adamw keeps its two moments: float32, or bfloat16, which is half as much; not read
    by the others."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Momentum of sgd, 0 to below 1; not read by the others."""
    clip_norm: PositiveFloat | None = None
    """Largest norm of the gradient over all parameters, > 0; unset = not clipped."""
    schedule: ScheduleConfig = ScheduleConfig()
    """Learning-rate schedule."""

    def num_steps(self, num_rows: int) -> int:
        """Optimiser steps of a whole training of a resolved config; the last batch may be short."""
        assert self.epochs is not None, "not resolved"
        assert isinstance(self.batch_size, int), "not resolved"
        return self.epochs * math.ceil(num_rows / self.batch_size)


def resolve(optim: OptimConfig, defaults: OptimDefaults, num_rows: int) -> OptimConfig:
    """`optim` with every unset field filled in.

    The batch size is the head's own or, for a small split, the largest power of two that still
    makes `MIN_STEPS_PER_EPOCH` batches.

    Args:
        optim: what the user asked for.
        defaults: the head's own choice.
        num_rows: rows that are trained on.

    Raises:
        ConfigError: if the warm-up is as long as the whole training.
    """
    fitting = 2 ** int(math.log2(max(num_rows / MIN_STEPS_PER_EPOCH, 1)))
    filled = {
        "lr": optim.lr if optim.lr is not None else defaults.lr,
        "weight_decay": (
            optim.weight_decay if optim.weight_decay is not None else defaults.weight_decay
        ),
        "epochs": optim.epochs or defaults.epochs,
        "batch_size": (
            num_rows
            if optim.batch_size == "all"
            else optim.batch_size or min(defaults.batch_size, fitting)
        ),
        "optimizer": optim.optimizer or defaults.optimizer,
        "ema_decay": optim.ema_decay if optim.ema_decay is not None else defaults.ema_decay,
    }
    resolved = optim.model_copy(update=filled)
    total = resolved.num_steps(num_rows)
    shape, warmup = optim.schedule.shape or defaults.schedule, optim.schedule.warmup_steps
    if warmup is None:
        one_cycle = shape == "one_cycle"
        warmup = int((optim.schedule.pct_start if one_cycle else defaults.warmup_share) * total)
    elif warmup >= total:
        raise ConfigError(
            f"optim.schedule.warmup_steps: {warmup} is not below the {total} optimiser steps of "
            f"{resolved.epochs} epochs of {num_rows} rows in batches of {resolved.batch_size}; "
            "lower it, or raise optim.epochs"
        )
    schedule = optim.schedule.model_copy(update={"shape": shape, "warmup_steps": warmup})
    return resolved.model_copy(update={"schedule": schedule})


def lr_factor(schedule: ScheduleConfig, num_steps: int) -> Callable[[int], float]:
    """Multiplier of the peak learning rate at a 0-based step; the first step is never 0.

    `plateau` stays at the peak here: what it does depends on the validation, see `heads.watch`.

    Reference of one_cycle: Smith and Topin, Super-Convergence, 2018, in the cosine form of torch's
    `OneCycleLR`; momentum is not cycled.

    Args:
        schedule: resolved.
        num_steps: optimiser steps of the whole training.
    """
    warmup = schedule.warmup_steps
    assert schedule.shape is not None, "not resolved"
    assert warmup is not None, "not resolved"

    def factor(step: int) -> float:
        if schedule.shape == "one_cycle":
            if step < warmup - 1:
                return _along_cosine(_CYCLE_START, 1.0, step / (warmup - 1))
            start = max(warmup - 1, 0)
            return _along_cosine(1.0, _CYCLE_END, (step - start) / max(1, num_steps - 1 - start))
        if step < warmup:
            return (step + 1) / warmup
        done = (step - warmup) / max(1, num_steps - warmup)
        if schedule.shape == "cosine":
            return 0.5 * (1 + math.cos(math.pi * done))
        return 1 - done if schedule.shape == "linear" else 1.0

    return factor


def _along_cosine(start: float, end: float, done: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * done))


def build(optim: OptimConfig, head: Head) -> torch.optim.Optimizer:
    """The optimiser over the head's own parameter groups; fused kernels, same results, 5x faster.

    Args:
        optim: resolved.
        head: on the device it will be trained on.
    """
    assert optim.optimizer is not None, "not resolved"
    groups: list[dict[str, Any]] = head.param_groups(
        math.nan if optim.lr is None else optim.lr,
        math.nan if optim.weight_decay is None else optim.weight_decay,
    )
    for group in groups:
        group["peak_lr"] = group["lr"]
    if optim.optimizer == "lazy_adamw":
        head.give_sparse_gradients()
        return LazyAdamW(groups, state_dtype=optim.state_dtype)
    if optim.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=optim.momentum, fused=True)
    if optim.optimizer == "adam":
        return torch.optim.Adam(groups, fused=True)
    return torch.optim.AdamW(groups, fused=True)


def set_lr(
    optimizer: torch.optim.Optimizer,
    factor: float,
    by_name: Mapping[str, float] = _NO_FACTORS,
    min_lr: float = 0.0,
) -> None:
    """Sets each group's learning rate to `factor` times its peak.

    Args:
        optimizer: of `build`.
        factor: see `lr_factor`.
        by_name: further factors of groups by "name"; see `Head.lr_factors`.
        min_lr: not below this, unless the peak is.
    """
    for group in optimizer.param_groups:
        group["lr"] = max(factor * group["peak_lr"], min(min_lr, group["peak_lr"]))
        if by_name:
            group["lr"] *= by_name.get(group.get("name", ""), 1.0)


def clip(head: nn.Module, max_norm: float) -> None:
    """Scales the gradient down to `max_norm` where its norm over all parameters is larger."""
    parameters = [p for p in head.parameters() if p.requires_grad and p.grad is not None]
    for parameter in parameters:
        if parameter.grad is not None and parameter.grad.is_sparse:
            parameter.grad = parameter.grad.coalesce()
    values = [
        p.grad.values() if p.grad.is_sparse else p.grad for p in parameters if p.grad is not None
    ]
    share = max_norm / (nn.utils.get_total_norm(values) + 1e-6)
    for value in values:
        value.mul_(share.clamp(max=1.0).to(value.device))
