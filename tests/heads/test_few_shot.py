import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from featcache.errors import ConfigError
from featcache.reader import open_cache
from heads import few_shot
from heads import train as train_job
from heads.data import FeatureTables
from heads.few_shot import FewShotConfig, markdown, summarise
from heads.parts import choose_parts
from heads.reporting import shot_curves
from heads.shots import few_shot_parts
from heads.train import TrainConfig
from heads.train import run as train


def parts_of(cache_path: Path, shots: int, seed: int = 0, val_shots: int = 4):  # type: ignore[no-untyped-def]
    cache = open_cache(cache_path)
    whole = choose_parts(
        cache,
        train_split="train",
        val_split=None,
        val_fraction=0.1,
        test_split=None,
        select_on="val",
        seed=0,
    )
    return whole, few_shot_parts(cache, whole, shots=shots, val_shots=val_shots, seed=seed)


def test_every_class_gives_its_shots_and_few_validation_rows(
    make_single: Callable[..., Path],
) -> None:
    path = make_single()
    whole, parts = parts_of(path, shots=8)
    assert np.bincount(parts.train.targets).tolist() == [8] * 5
    assert np.bincount(parts.val.targets).tolist() == [4] * 5
    assert set(parts.train.rows) <= set(whole.train.rows)
    assert set(parts.val.rows) <= set(whole.val.rows)
    assert parts.test is whole.test
    labels = open_cache(path).labels(parts.train.rows)
    assert labels.tolist() == parts.train.targets.tolist()
    assert np.bincount(parts_of(path, shots=2)[1].val.targets).tolist() == [2] * 5


def test_fewer_shots_are_among_more_and_another_seed_draws_others(
    make_single: Callable[..., Path],
) -> None:
    path = make_single()
    two, eight = (set(parts_of(path, shots=k)[1].train.rows) for k in (2, 8))
    assert two < eight
    assert set(parts_of(path, shots=8, seed=1)[1].train.rows) != eight


def test_several_labels_reach_their_shots(make_multi: Callable[..., Path]) -> None:
    whole, parts = parts_of(make_multi(), shots=3)
    wanted = np.minimum(whole.train.targets.sum(0, dtype=np.int64), 3)
    assert (parts.train.targets.sum(0) >= wanted).all()
    assert len(parts.train) < len(whole.train)


def test_training_on_shots_says_so_in_its_record(make_single: Callable[..., Path]) -> None:
    report = train(
        TrainConfig.from_values(
            {
                "cache": make_single(),
                "head": {"kind": "linear", "lrs": [0.01], "weight_decays": [0.0]},
                "optim": {"epochs": 2},
                "shots": 3,
                "run": make_single("b").parent / "run",
                "quiet": True,
            }
        )
    )
    assert report.metrics["num_train_rows"] == 15
    assert report.metrics["val_rows_from"] == "val, 3 a class"


OPTIONS = {"heads": ("linear", "nearly=linear"), "shots": (1, 4), "seeds": 2, "quiet": True}
SET = (
    "linear:optim.epochs=3",
    "linear:head.lrs=[0.01",
    "0.03]",  # as the command line cuts it
    "nearly:head.lrs=[0.001]",
    "nearly:optim.epochs=2",
)


def test_the_protocol_fills_table_and_picture_and_reuses_runs(
    make_single: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = FewShotConfig.from_values(
        {"cache": make_single(), "run": tmp_path / "out", "set": SET, **OPTIONS}
    )
    report = few_shot.run(config)
    assert report.metric == "top1"
    assert len(report.cells) == 8
    assert set(report.cells["num_train_rows"]) == {5, 20}
    cell = report.cells.query("head == 'nearly' and shots == 4 and seed == 1").iloc[0]
    kept = TrainConfig.from_yaml(Path(cell["run"]) / "config.yaml")
    assert (kept.shots, kept.shots_seed, kept.seed) == (4, 1, 1)
    assert kept.head.lrs == (0.001,)  # type: ignore[attr-defined]
    first = report.cells.query("head == 'linear' and shots == 1")["top1"]
    row = report.table.query("head == 'linear' and shots == 1").iloc[0]
    assert row["mean"] == pytest.approx(first.mean())
    a, b = first
    assert row["std"] == pytest.approx(abs(a - b) / math.sqrt(2))
    out = tmp_path / "out"
    assert (out / "curves.png").stat().st_size > 10_000
    assert "| linear |" in (out / "table.md").read_text()
    assert len(pd.read_csv(out / "cells.csv")) == 8
    monkeypatch.setattr("heads.train.fit", lambda *_, **__: pytest.fail("trained again"))
    again = few_shot.run(config)
    assert again.cells.drop(columns="seconds").equals(report.cells.drop(columns="seconds"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": ("linear", "linear")}, "'linear' is there twice"),
        ({"heads": ("nope",)}, "head nope: head: unknown kind 'nope'"),
        ({"set": ("mop:head.scale=3",)}, "names head 'mop', expected one of linear, nearly"),
        ({"set": ("linear.head.bias",)}, "not of the form head:option=value"),
        ({"set": ("linear:head.bais=1",)}, r"head linear: head\.bais"),
        ({"set": ("linear:seed=1",)}, "seed is for this job to set"),
        ({"set": ("linear:head.lrs=[0.1",)}, "the value is not YAML"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    options: dict[str, object],
    message: str,
    make_single: Callable[..., Path],
    tmp_path: Path,
) -> None:
    values = {"cache": make_single(), "run": tmp_path / "out", **OPTIONS, **options}
    with pytest.raises(ConfigError, match=message):
        few_shot.run(FewShotConfig.from_values(values))


def test_a_cache_without_test_rows_is_refused(
    make_single: Callable[..., Path], tmp_path: Path
) -> None:
    cache = make_single(splits={"train": 60, "val": 40})
    values = {"cache": cache, "run": tmp_path / "out", **OPTIONS, "shots": (1,), "seeds": 1}
    with pytest.raises(ConfigError, match="no labelled test split"):
        few_shot.run(FewShotConfig.from_values(values))


def test_the_cache_is_opened_and_its_test_rows_read_once(
    make_single: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"cache": make_single(), "run": tmp_path / "out", "set": SET, **OPTIONS}
    opened, tables = [], []
    for module in (few_shot, train_job):
        original = module.open_one_or_joined
        monkeypatch.setattr(
            module,
            "open_one_or_joined",
            lambda *places, original=original: opened.append(places) or original(*places),
        )

    class Counting(FeatureTables):
        def __init__(self, *arguments: Any) -> None:
            tables.append(len(arguments[1]))
            super().__init__(*arguments)

    monkeypatch.setattr("heads.shelf.FeatureTables", Counting)
    monkeypatch.setattr(train_job, "FeatureTables", Counting)
    few_shot.run(FewShotConfig.from_values(values))
    assert len(opened) == 1
    assert tables.count(80) == 1  # the test split


def test_the_set_option_may_be_given_as_the_command_line_reads_it(
    make_single: Callable[..., Path],
) -> None:
    read = FewShotConfig.from_values(
        {"cache": make_single(), "set": ["linear:head.lrs=[0.01", "0.03]", "linear:seed=2"]}
    )
    assert read.set == ("linear:head.lrs=[0.01,0.03]", "linear:seed=2")


def test_one_seed_has_no_deviation() -> None:
    cells = pd.DataFrame({"head": ["a"], "shots": [1], "top1": [0.25]})
    assert markdown(summarise(cells, "top1"), ["a"]).splitlines()[2] == "| a    | 25.0 ± 0.0 |"
    assert shot_curves.deviation([0.25]) == 0.0
