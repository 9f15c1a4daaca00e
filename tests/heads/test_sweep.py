"""Many trainings on one cache, and their table."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from featcache.errors import CacheError, ConfigError
from heads import option_grid, sweep, train
from heads.data import FeatureTable
from heads.models.linear import Linear
from heads.run_folder import RunError
from heads.sweep import SweepConfig
from heads.train import TrainConfig

CacheMaker = Callable[..., Path]


class TestGrids:
    @pytest.mark.parametrize(
        ("typed", "expected"),
        [
            (("head=linear,mop",), {"head": ["linear", "mop"]}),
            (
                ("optim.lr=1e-3,0.1", "head.bias=true"),
                {"optim.lr": ["1e-3", 0.1], "head.bias": [True]},
            ),
            (("head.lrs=[0.1,0.2],[0.3]",), {"head.lrs": [[0.1, 0.2], [0.3]]}),
            (("optim.clip_norm=null,2",), {"optim.clip_norm": [None, 2]}),
        ],
    )
    def test_entries_mean_what_was_typed(self, typed: tuple[str, ...], expected: Any) -> None:
        arguments = [word for entry in typed for word in ("--set", entry)]
        config = SweepConfig.from_command_line(["--cache", "x", *arguments])
        assert option_grid.grid_of(config.set) == expected

    @pytest.mark.parametrize(
        ("entries", "message"),
        [
            (["linear"], "'linear' is not of the form option=value"),
            (["head="], "not of the form"),
            (["seed=1", "seed=2"], "seed is there twice"),
            (["head=[1"], "not YAML"),
        ],
    )
    def test_what_is_no_grid_is_refused(self, entries: list[str], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            option_grid.grid_of(entries)

    def test_grids_of_a_file_follow_each_other_times_the_common_one(self, tmp_path: Path) -> None:
        file = tmp_path / "grid.yaml"
        file.write_text("- {head: linear, optim.lr: [1, 2]}\n- {head: mop}\n- {head: [mop]}\n")
        grids = option_grid.read_grids(file)
        assert option_grid.combinations(grids, {"seed": [5, 6]}) == [
            {"head": "linear", "optim.lr": 1, "seed": 5},
            {"head": "linear", "optim.lr": 1, "seed": 6},
            {"head": "linear", "optim.lr": 2, "seed": 5},
            {"head": "linear", "optim.lr": 2, "seed": 6},
            {"head": "mop", "seed": 5},
            {"head": "mop", "seed": 6},
        ]
        with pytest.raises(ConfigError, match="head: in the grid file and in --set"):
            option_grid.combinations(grids, {"head": ["linear"]})
        with pytest.raises(ConfigError, match=r"optim\.lr: no value"):
            option_grid.combinations([{"optim.lr": []}], {})

    @pytest.mark.parametrize(
        ("text", "message"),
        [("3", "entry 1 is no mapping"), ("- head", "entry 1 is no mapping"), ("[", "not YAML")],
    )
    def test_a_file_that_is_no_grid_is_refused(
        self, tmp_path: Path, text: str, message: str
    ) -> None:
        file = tmp_path / "grid.yaml"
        file.write_text(text)
        with pytest.raises(ConfigError, match=message):
            option_grid.read_grids(file)
        with pytest.raises(ConfigError, match="no such file"):
            option_grid.read_grids(tmp_path / "other.yaml")

    def test_paths_are_nested_and_a_kind_may_stand_beside_its_options(self) -> None:
        options = {"head": "linear", "head.bias": False, "optim.schedule.shape": "linear"}
        assert option_grid.nested(options) == {
            "head": {"kind": "linear", "bias": False},
            "optim": {"schedule": {"shape": "linear"}},
        }


def config(cache: Path, run: Path, *entries: str, **options: Any) -> SweepConfig:
    values = {"cache": cache, "run": run, "set": entries, "quiet": True, "device": "cpu"}
    return SweepConfig(**(values | options))


def test_a_sweep_is_its_trainings_with_the_cache_read_once(
    make_single: CacheMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, read = make_single(noise=3.0), []
    original = FeatureTable.__init__

    def counting(self: FeatureTable, *arguments: Any, **options: Any) -> None:
        original(self, *arguments, **options)
        read.append(len(self))

    monkeypatch.setattr(FeatureTable, "__init__", counting)
    base = tmp_path / "base.yaml"
    base.write_text(
        yaml.safe_dump(
            {"cache": "elsewhere", "head": {"weight_decays": [0.1]}, "optim": {"epochs": 2}}
        )
    )
    entries = ("optim.lr=0.0001,0.1", "head.scaling=none,standard")
    asked = config(cache, tmp_path / "sweep", *entries, base=base, seeds=2)
    report = sweep.run(asked)
    assert sorted(read) == [60, 80, 300], "each split is read once for all eight trainings"
    assert len(report.runs) == 8
    assert not report.runs["reused"].any()
    # Each row is what the training alone gives.
    row = report.runs[(report.runs["optim.lr"] == "0.1") & (report.runs["seed"] == "1")].iloc[0]
    alone = TrainConfig.from_yaml(Path(row["run"]) / "config.yaml")
    again = train.run(alone.model_copy(update={"run": tmp_path / "alone", "cache": cache}))
    assert again.metrics["val"]["top1"] == row["val"]
    assert again.metrics["test"]["top1"] == row["test"]
    assert (alone.optim.lr, alone.seed, alone.optim.epochs) == (0.1, 1, 2)
    # The table is sorted by validation, with mean and deviation over seeds.
    table = report.table
    assert table["val_top1"].is_monotonic_decreasing
    assert table["seeds"].tolist() == [2, 2, 2, 2]
    best = table.iloc[0]
    of_best = report.runs[
        (report.runs["optim.lr"] == best["optim.lr"])
        & (report.runs["head.scaling"] == best["head.scaling"])
    ]
    assert best["val_top1"] == pytest.approx(of_best["val"].mean())
    assert best["val_std"] == pytest.approx(of_best["val"].std())
    assert best["test_top1"] == pytest.approx(of_best["test"].mean())
    written = pd.read_csv(tmp_path / "sweep" / "table.csv")
    assert written["val_top1"].tolist() == pytest.approx(table["val_top1"].tolist())
    lines = (tmp_path / "sweep" / "table.md").read_text().splitlines()
    assert len(lines) == 2 + 4
    assert f"{100 * best['val_top1']:.2f} ± {100 * best['val_std']:.2f}" in lines[2]
    # The same sweep, and a larger one, train nothing twice.
    assert sweep.run(asked).runs["reused"].all()
    larger = asked.model_copy(update={"set": ("optim.lr=0.0001,0.1,0.5", entries[1]), "seeds": 1})
    assert sweep.run(larger).runs["reused"].tolist() == [True] * 4 + [False] * 2


def test_heads_that_are_written_out_are_rows_of_their_own(
    make_single: CacheMaker, tmp_path: Path
) -> None:
    entry = "head={kind: naive, hidden: 2},{kind: naive, hidden: 3},linear"
    report = sweep.run(config(make_single(), tmp_path / "sweep", entry, "optim.epochs=1"))
    assert set(report.table["head"]) == {
        '{"kind": "naive", "hidden": 2}',
        '{"kind": "naive", "hidden": 3}',
        "linear",
    }
    assert report.table["seeds"].tolist() == [1, 1, 1]


def test_an_interrupted_sweep_leaves_its_table_and_goes_on(
    make_single: CacheMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = config(make_single(), tmp_path / "sweep", "optim.lr=0.1,0.2,0.3", "optim.epochs=2")
    original, calls = train.train_on, []

    def stopping(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(train, "train_on", stopping)
    with pytest.raises(KeyboardInterrupt):
        sweep.run(asked)
    assert len(pd.read_csv(tmp_path / "sweep" / "table.csv")) == 2
    assert sweep.run(asked).runs["reused"].tolist() == [True, True, False]


def test_a_failed_training_is_a_row_with_its_reason(
    make_single: CacheMaker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = ("head=linear,mop,nothing", "optim.epochs=1", "head.lrs=[0.1],[-1]")
    asked = config(make_single(), tmp_path / "sweep", *entries, quiet=False)
    report = sweep.run(asked)
    table = report.table
    assert table["head"].iloc[0] == "linear"
    assert table["error"].iloc[0] == ""
    errors = dict(zip(table["head"] + table["head.lrs"], table["error"], strict=True))
    assert "greater than 0" in errors["linear[-1]"]
    assert "no such option of mop" in errors["mop[0.1]"]
    assert "unknown kind 'nothing'" in errors["nothing[0.1]"]
    assert table["val_top1"].isna().tolist() == [False] + [True] * 5
    printed = capsys.readouterr().out
    assert "failed because" in printed
    assert "unknown kind 'nothing'" in printed


def test_a_sweep_without_any_result_is_an_error(make_single: CacheMaker, tmp_path: Path) -> None:
    asked = config(make_single(), tmp_path / "sweep", "head=nothing", "optim.epochs=1,2")
    with pytest.raises(RunError, match=r"none of the 2 trainings came to a result.*'nothing'"):
        sweep.run(asked)
    assert "failed because" in (tmp_path / "sweep" / "table.md").read_text()


def test_a_bug_is_no_row(
    make_single: CacheMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Linear, "loss", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sweep.run(config(make_single(), tmp_path / "sweep", "optim.epochs=1"))


def test_what_the_job_sets_itself_is_refused_in_a_grid(tmp_path: Path) -> None:
    for entry in ("seed=1,2", "run=x", "cache=y"):
        with pytest.raises(ConfigError, match="is for this job to set; leave it out"):
            sweep.run(config(tmp_path / "none", tmp_path / "sweep", entry))
    with pytest.raises(CacheError):
        sweep.run(config(tmp_path / "none", tmp_path / "sweep"))


def test_several_processes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"use torchrun with heads\.train"):
        sweep.run(config(tmp_path / "none", tmp_path / "sweep"))
