"""Several processes train as one: gloo on the CPU."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from featcache.class_text import text_array_name
from featcache.prompts import format_prompts
from featcache.reader import Cache, open_cache
from heads import train
from heads.base import HeadConfig
from heads.distributed import Group, group_for
from heads.models.linear import LinearConfig
from heads.models.mop import MopConfig
from heads.optim import OptimConfig
from heads.train import TrainConfig

from ..together import run_together

CacheMaker = Callable[..., Path]
CPU = torch.device("cpu")


def history(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("size", [2, 3])
def test_shares_are_all_rows_once_and_weigh_as_the_whole_batch(size: int) -> None:
    for num_rows in range(1, 9):
        index = torch.arange(num_rows) + 10
        shares = [Group(rank, size, CPU).share(index) for rank in range(size)]
        weights = torch.zeros(20, dtype=torch.float64)
        for own, divisor in shares:
            assert len(own) > 0
            weights[own] += 1 / divisor
        torch.testing.assert_close(
            weights[index], torch.full_like(index, 1) / num_rows * 1.0, check_dtype=False
        )
        if num_rows >= size:
            assert torch.equal(torch.cat([own for own, _ in shares]), index)
            lengths = [len(own) for own, _ in shares]
            assert max(lengths) - min(lengths) <= 1


def test_a_process_alone_is_a_group_of_one() -> None:
    with group_for("cpu") as group:
        assert group == Group(0, 1, CPU)
        value = torch.ones(2)
        assert group.sum(value) is value
        assert group.follow("x") == "x"


def give_class_text(cache: Cache, template: str) -> None:
    """Puts text features of the classes into a cache, as if they had been encoded before."""
    (texts,) = format_prompts(cache.classes, [template])
    values = np.random.default_rng(0).normal(size=(len(texts), 12)).astype(np.float32)
    cache.store.put_array(text_array_name(cache, texts), values, {})


HEADS: dict[str, HeadConfig] = {
    "linear": LinearConfig(lrs=(0.01, 0.1), weight_decays=(0.0, 0.1)),
    "mop": MopConfig(num_prompts=3, init_std=0.1, templates="a {name}"),
}


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS.keys())
def test_two_processes_train_as_one(head: Any, make_single: CacheMaker, tmp_path: Path) -> None:
    cache = make_single(splits={"train": 301, "val": 60, "test": 80})  # the last batch is one row
    give_class_text(open_cache(cache), "a {name}")
    # Not adamw: it makes a whole step of a gradient that is zero but for rounding.
    optim = {"optimizer": "sgd", "epochs": 3, "batch_size": 60, "accumulate": 2}
    asked = TrainConfig(
        cache=cache,
        run=tmp_path / "one",
        head=head,
        optim=OptimConfig(**optim, ema_decay=0.9, clip_norm=1.0),
        quiet=True,
        device="cpu",
    )
    alone = train.run(asked)
    file = tmp_path / "two.yaml"
    file.write_text(asked.model_copy(update={"run": tmp_path / "two", "quiet": False}).to_yaml())
    first, second = run_together(2, "-m", "heads.train", "--config", str(file))
    assert (first[2], second[2]) == (0, 0), first[1] + second[1]
    assert "run folder:" in first[0]
    assert second[0] == "", "only the first process speaks"
    for weights in ("head", "head_last"):
        one, two = (load_file(tmp_path / run / f"{weights}.safetensors") for run in ("one", "two"))
        for name, tensor in one.items():
            torch.testing.assert_close(two[name], tensor, atol=1e-6, rtol=1e-6)
    for one_epoch, two_epoch in zip(history(alone.run), history(tmp_path / "two"), strict=True):
        for name in one_epoch.keys() - {"seconds", "best_loss"}:  # least of means is no mean
            assert two_epoch[name] == pytest.approx(one_epoch[name], rel=1e-6), name
    assert train.run(asked.model_copy(update={"run": tmp_path / "two"})).reused
