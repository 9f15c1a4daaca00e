"""Schedules, defaults and optimisers."""

import math

import pytest
import torch

from featcache.errors import ConfigError
from heads import optim
from heads.base import OptimDefaults
from heads.models.linear import Linear
from heads.optim import OptimConfig, ScheduleConfig


def test_cosine_after_linear_warmup() -> None:
    factor = optim.lr_factor(ScheduleConfig(shape="cosine", warmup_steps=4), 20)
    assert [factor(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    for step in range(4, 20):
        assert factor(step) == pytest.approx((1 + math.cos(math.pi * (step - 4) / 16)) / 2)
    assert factor(4) == 1.0
    assert 0 < factor(19) < 0.02


def test_constant_schedule_stays_at_the_peak() -> None:
    factor = optim.lr_factor(ScheduleConfig(shape="constant", warmup_steps=2), 50)
    assert [factor(step) for step in (0, 1, 2, 49)] == [0.5, 1.0, 1.0, 1.0]


def test_linear_schedule_falls_in_equal_steps() -> None:
    factor = optim.lr_factor(ScheduleConfig(shape="linear", warmup_steps=2), 7)
    assert [factor(step) for step in range(7)] == pytest.approx([0.5, 1, 1, 0.8, 0.6, 0.4, 0.2])


@pytest.mark.parametrize(("num_steps", "pct_start"), [(50, 0.2), (40, 0.3), (30, 0.1)])
def test_one_cycle_is_that_of_torch(num_steps: int, pct_start: float) -> None:
    asked = OptimConfig(
        lr=0.4,
        epochs=num_steps,
        batch_size="all",
        schedule=ScheduleConfig(shape="one_cycle", pct_start=pct_start),
    )
    resolved = optim.resolve(asked, OptimDefaults(), 33)
    assert resolved.batch_size == 33
    assert resolved.num_steps(33) == num_steps
    factor = optim.lr_factor(resolved.schedule, num_steps)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.4, momentum=0.9)
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=0.4, total_steps=num_steps, pct_start=pct_start
    )
    for step in range(num_steps):
        assert 0.4 * factor(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        if step + 1 < num_steps:
            theirs.step()


def test_a_stated_warmup_is_the_rise_of_one_cycle() -> None:
    schedule = ScheduleConfig(shape="one_cycle", warmup_steps=1)
    factor = optim.lr_factor(schedule, 5)
    assert factor(0) == 1.0
    assert factor(4) == pytest.approx(4e-6)
    asked = OptimConfig(epochs=5, batch_size=1, schedule=schedule)
    assert optim.resolve(asked, OptimDefaults(), 10).schedule.warmup_steps == 1


def test_optimiser_schedule_and_average_are_the_heads_own_unless_asked() -> None:
    defaults = OptimDefaults(optimizer="sgd", schedule="plateau", ema_decay=0.9)
    resolved = optim.resolve(OptimConfig(), defaults, 100)
    assert (resolved.optimizer, resolved.schedule.shape) == ("sgd", "plateau")
    assert resolved.ema_decay == 0.9
    asked = OptimConfig(optimizer="adam", ema_decay=0, schedule=ScheduleConfig(shape="linear"))
    resolved = optim.resolve(asked, defaults, 100)
    assert (resolved.optimizer, resolved.schedule.shape) == ("adam", "linear")
    assert resolved.ema_decay == 0


def test_factors_by_name_freeze_a_group_and_the_lowest_rate_spares_small_peaks() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(3)]
    optimizer = torch.optim.SGD(
        [
            {"params": [parameters[0]], "lr": 1.0, "peak_lr": 1.0, "name": "old"},
            {"params": [parameters[1]], "lr": 1.0, "peak_lr": 1.0},
            {"params": [parameters[2]], "lr": 1.0, "peak_lr": 1e-9},
        ]
    )
    optim.set_lr(optimizer, 1e-6, {"old": 0.0}, min_lr=1e-3)
    assert [group["lr"] for group in optimizer.param_groups] == [0.0, 1e-3, 1e-9]


def test_unset_fields_take_the_heads_defaults() -> None:
    defaults = OptimDefaults(lr=0.5, weight_decay=0.1, epochs=7, batch_size=512, warmup_share=0.1)
    resolved = optim.resolve(OptimConfig(), defaults, 100_000)
    assert (resolved.lr, resolved.weight_decay) == (0.5, 0.1)
    assert (resolved.epochs, resolved.batch_size) == (7, 512)
    assert resolved.schedule.warmup_steps == int(0.1 * 7 * math.ceil(100_000 / 512))
    asked = OptimConfig(lr=0.25, weight_decay=0.0, epochs=3, batch_size=9)
    kept = optim.resolve(asked, defaults, 100)
    for name in asked.model_fields_set:
        assert getattr(kept, name) == getattr(asked, name)


@pytest.mark.parametrize(("num_rows", "expected"), [(1, 1), (100, 4), (1020, 32), (10**6, 4096)])
def test_small_splits_get_small_batches(num_rows: int, expected: int) -> None:
    assert optim.resolve(OptimConfig(), OptimDefaults(), num_rows).batch_size == expected


def test_resolving_twice_changes_nothing() -> None:
    once = optim.resolve(OptimConfig(), OptimDefaults(), 777)
    assert optim.resolve(once, OptimDefaults(), 777) == once


def test_warmup_as_long_as_the_training_is_refused() -> None:
    config = OptimConfig(epochs=2, batch_size=10, schedule=ScheduleConfig(warmup_steps=20))
    with pytest.raises(ConfigError, match=r"warmup_steps: 20 is not below the 20 optimiser steps"):
        optim.resolve(config, OptimDefaults(), 100)


@pytest.mark.parametrize("kind", ["adamw", "adam", "sgd"])
def test_fused_optimisers_equal_the_plain_ones(kind: str) -> None:
    config = optim.resolve(OptimConfig(optimizer=kind, lr=0.1), OptimDefaults(), 100)
    heads = [Linear(3, 2, pairs=[(0.1, 0.2)]) for _ in range(2)]
    fused = optim.build(config, heads[0])
    groups = heads[1].param_groups(0.1, 0.2)
    plain: torch.optim.Optimizer = {
        "adamw": lambda: torch.optim.AdamW(groups, foreach=False, fused=False),
        "adam": lambda: torch.optim.Adam(groups, foreach=False, fused=False),
        "sgd": lambda: torch.optim.SGD(groups, momentum=0.9, foreach=False, fused=False),
    }[kind]()
    torch.manual_seed(0)
    for _ in range(5):
        gradient = torch.randn(2, 3)
        for head, optimizer in zip(heads, (fused, plain), strict=True):
            head.weights[0].grad = gradient.clone()
            head.biases[0].grad = gradient[:, 0].clone()
            optimizer.step()
    torch.testing.assert_close(heads[0].weights[0], heads[1].weights[0])
    assert heads[0].weights[0].abs().max() > 0.1


def test_offsets_are_not_decayed_and_factors_reach_every_group() -> None:
    head = Linear(3, 2, pairs=[(0.1, 0.5), (0.2, 0.5)])
    optimizer = optim.build(OptimConfig(optimizer="adamw"), head)
    optim.set_lr(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.05, 0.1, 0.1]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0, 0.5, 0.0]


def test_clipping_scales_the_whole_gradient() -> None:
    head = Linear(3, 2)
    head.weights[0].grad = torch.full((2, 3), 3.0)
    head.biases[0].grad = torch.full((2,), 4.0)
    optim.clip(head, 1.0)
    grads = [p.grad for p in head.parameters() if p.grad is not None]
    norm = torch.cat([grad.flatten() for grad in grads]).norm()
    assert float(norm) == pytest.approx(1.0, abs=1e-5)
