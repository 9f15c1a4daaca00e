"""What a training costs where there is much of everything: rows, classes, tensors to save."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from featcache.reader import open_cache
from heads import data, fitting, train
from heads.evaluate import score_candidates
from heads.models.linear import Linear, LinearConfig
from heads.optim import OptimConfig
from heads.parts import labelled_part
from heads.predictions import best_first
from heads.train import TrainConfig

CacheMaker = Callable[..., Path]


def test_rows_are_drawn_where_they_are_held(
    make_single: CacheMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = open_cache(make_single())
    arrays = data.open_arrays(cache, LinearConfig())
    device = torch.device("meta")  # any device that is not the CPU
    monkeypatch.setattr(data, "_free_memory", lambda device: 1 << 40)
    held = data.FeatureTables(arrays, cache.rows("train"), device)
    assert held.index_device == device
    monkeypatch.setattr(data, "_free_memory", lambda own: (own.type == "cpu") << 40)
    in_memory = data.FeatureTables(arrays, cache.rows("train"), device)
    assert [table.held for table in in_memory.tables] == ["memory"]
    assert in_memory.index_device == torch.device("cpu")


def test_memory_that_holds_cached_files_counts_as_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "meminfo"
    file.write_text("MemTotal: 9000 kB\nMemFree:  10 kB\nMemAvailable:    8000 kB\n")
    monkeypatch.setattr(data, "_MEMINFO", file)
    assert data._free_memory(torch.device("cpu")) == 8000 * 1024
    monkeypatch.setattr(data, "_MEMINFO", tmp_path / "none")
    assert data._free_memory(torch.device("cpu")) > 1 << 20


def test_scores_of_many_classes_are_made_for_few_rows_at_a_time(
    make_cache: CacheMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 50, 300)
    path = make_cache(
        "many",
        rng.normal(size=(300, 3)).astype(np.float32),
        [[label] for label in labels],
        ["val"] * 300,
        num_classes=50,
    )
    cache = open_cache(path)
    part = labelled_part(cache, "val")
    table = data.FeatureTables(
        data.open_arrays(cache, LinearConfig()), part.rows, torch.device("cpu")
    )
    monkeypatch.setattr(data, "_SPAN_VALUES", 5000)
    seen: list[int] = []
    original = Linear.candidates

    def counting(self: Linear, *features: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        seen.append(len(features[0]))
        return original(self, *features)

    monkeypatch.setattr(Linear, "candidates", counting)
    score_candidates(Linear(3, 50).eval(), table, part)
    assert seen == [100, 100, 100]  # 5000 scores of 50 classes each


def test_slow_saves_are_rare(make_single: CacheMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10**6))  # every look at the clock is a second later: a save takes one too
    monkeypatch.setattr(fitting, "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))
    monkeypatch.setattr(fitting, "SAVE_SECONDS", 0.5)
    saves: list[int] = []
    original = fitting.save_state

    def saving(path: Path, training: Any, fingerprint: str) -> None:
        saves.append(len(training.history))
        original(path, training, fingerprint)

    monkeypatch.setattr(fitting, "save_state", saving)
    path = make_single()
    train.run(
        TrainConfig(
            cache=path,
            head=LinearConfig(lrs=(0.01,), weight_decays=(0.0,)),
            optim=OptimConfig(epochs=30),
            run=path.parent / "run",
            quiet=True,
        )
    )
    assert saves[0] == 1
    assert min(np.diff(saves)) > 5  # an epoch looks twice: 20 seconds are about ten epochs


@pytest.mark.parametrize("num", [1, 3, 6])
def test_best_classes_come_in_class_order_where_scores_are_equal(num: int) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(4, (200, 6), generator=generator) / 4
    scores[100:] = torch.rand(100, 6, generator=generator)
    ranked = scores.sort(stable=True, dim=1, descending=True)
    values, indices = best_first(scores, num)
    assert torch.equal(values, ranked.values[:, :num])
    assert torch.equal(indices, ranked.indices[:, :num])


def test_rows_without_equal_scores_are_not_sorted_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "sort", lambda *_, **__: pytest.fail("sorted whole"))
    scores = torch.arange(40.0).reshape(4, 10)
    assert best_first(scores, 3)[1].tolist() == [[9, 8, 7]] * 4
