"""Who decays, and the learning rate of every step."""

import itertools
import math
from typing import Any

import open_clip
import pytest
import torch
from pydantic import ValidationError

from featcache.errors import ConfigError
from finetune.contrastive.architectures import PRESETS, build
from finetune.optim import AdamWConfig, param_groups
from finetune.tuning.options import TuningConfig
from heads.optim import lr_factor


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_f30_no_decay_of_logit_scale_norms_and_biases(preset: str) -> None:
    model = build(PRESETS[preset])
    decayed, plain = param_groups(model, 0.1)
    assert decayed["weight_decay"] == 0.1
    assert plain["weight_decay"] == 0.0
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    in_plain = {names[id(parameter)] for parameter in plain["params"]}
    in_decayed = {names[id(parameter)] for parameter in decayed["params"]}
    assert in_plain | in_decayed == set(names.values())
    assert not in_plain & in_decayed
    assert "logit_scale" in in_plain
    assert {name for name in names.values() if name.endswith("bias")} <= in_plain
    norms = (open_clip.transformer.LayerNorm, torch.nn.LayerNorm, torch.nn.BatchNorm2d)
    for name, module in model.named_modules():
        if isinstance(module, norms):
            assert f"{name}.weight" in in_plain
    assert {"token_embedding.weight", "text_projection"} <= in_decayed
    assert any("conv1.weight" in name for name in in_decayed)


def test_f30_decay_does_not_move_what_has_no_gradient() -> None:
    model = build(PRESETS["demo-rn"])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    AdamWConfig(lr=0.1, weight_decay=0.5).build(model).step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert "token_embedding.weight" in moved
    assert not {name for name in moved if name.endswith("bias") or name == "logit_scale"}
    assert not {name for name in moved if ".ln_" in name or ".bn" in name}


def test_learning_rate_rises_then_follows_half_a_cosine() -> None:
    factor = AdamWConfig(warmup=0.2).lr_factor(100)
    rates = [factor(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.05)  # the first step already moves
    assert rates[19] == pytest.approx(1.0)
    assert rates[20] == pytest.approx(1.0)
    assert rates[60] == pytest.approx(0.5)  # half of the way down
    assert rates[99] == pytest.approx(0.5 + 0.5 * math.cos(math.pi * 79 / 80))
    assert 0 < rates[99] < 0.001
    assert all(a < b for a, b in itertools.pairwise(rates[:20]))
    assert all(a > b for a, b in itertools.pairwise(rates[20:]))
    assert AdamWConfig(warmup=0.2).lr_factor(1)(0) == 1.0


def test_hard_restarts_begin_each_cycle_at_the_peak() -> None:
    """After the warm-up of 20 steps, four cycles of 20: each is the half cosine of 20 steps."""
    factor = AdamWConfig(warmup=0.2, cycles=4).lr_factor(100)
    assert [factor(step) for step in range(20)] == pytest.approx([s / 20 for s in range(1, 21)])
    cycle = [0.5 * (1 + math.cos(math.pi * s / 20)) for s in range(20)]
    assert [factor(step) for step in range(20, 100)] == pytest.approx(cycle * 4)


def test_the_optimizer_is_adamw_with_the_stated_options() -> None:
    config = AdamWConfig(lr=0.25, betas=(0.8, 0.7), eps=1e-3, weight_decay=0.5)
    optimizer = config.build(torch.nn.Linear(2, 3))
    for group, decay in zip(optimizer.param_groups, (0.5, 0.0), strict=True):
        assert (group["lr"], group["peak_lr"], group["weight_decay"]) == (0.25, 0.25, decay)
        assert (group["betas"], group["eps"]) == ((0.8, 0.7), 1e-3)


@pytest.mark.parametrize("options", [AdamWConfig, TuningConfig])
def test_decay_rates_outside_their_range_are_refused_as_options(
    options: type[AdamWConfig | TuningConfig],
) -> None:
    assert options(betas=(0.0, 0.5)).betas == (0.0, 0.5)
    with pytest.raises(ValidationError, match=r"betas\.1\n.*less than 1"):
        options(betas=(0.9, 1.0))
    with pytest.raises(ValidationError, match=r"betas\.0\n.*greater than or equal to 0"):
        options(betas=(-0.1, 0.9))


@pytest.mark.parametrize(
    ("given", "shape", "warmup"),
    [
        ({}, "constant", 0),
        ({"shape": "cosine"}, "cosine", 0),
        ({"shape": "one_cycle", "pct_start": 0.3}, "one_cycle", 3),
        ({"warmup_steps": 2}, "constant", 2),
    ],
)
def test_a_schedule_of_which_one_option_is_given_has_the_others(
    given: dict[str, Any], shape: str, warmup: int
) -> None:
    """As `--optim.schedule.shape cosine` alone gives it."""
    config = TuningConfig.from_values({"schedule": given} if given else {})
    schedule = config.schedule_over(10)
    assert (schedule.shape, schedule.warmup_steps) == (shape, warmup)
    assert 0 < lr_factor(schedule, 10)(0) <= 1


def test_a_warm_up_as_long_as_the_training_is_refused() -> None:
    config = TuningConfig.from_values({"schedule": {"warmup_steps": 10}})
    with pytest.raises(ConfigError, match="warmup_steps: 10 is not below the 10"):
        config.schedule_over(10)
