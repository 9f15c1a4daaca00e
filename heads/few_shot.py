"""Job: the few-shot protocol: heads trained on 1, 2, 4, 8 and 16 rows a class, several times.

python -m heads.few_shot --cache cache/garden --heads zero_shot,linear,mop,tip_adapter --seeds 3
"""

import itertools
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pydantic import Field, PositiveInt, field_validator

from featcache.config import Config, run_job
from featcache.errors import ConfigError
from featcache.join import open_one_or_joined
from featcache.precision import resolve_device
from featcache.storage import CachePath
from heads import train
from heads.distributed import Group
from heads.option_grid import nested, one_value, rejoined
from heads.parts import require_labels
from heads.progress import ProgressLine, duration
from heads.run_folder import write_atomic
from heads.shelf import Shelf
from heads.train import TrainConfig

_ASSIGNMENT = re.compile(r"[^:=,]+:[\w.]+=")
_SEPARATE = ("cache", "join", "run", "shots", "shots_seed", "val_shots", "seed", "device")
"""Training options that this job sets itself."""


class FewShotConfig(Config):
    """Train heads on a few rows a class and tabulate test metrics over shots and seeds."""

    cache: CachePath
    """Feature cache with a labelled test split."""
    join: tuple[CachePath, ...] = ()
    """Further caches of the same dataset, joined by id; see heads.train."""
    heads: tuple[str, ...] = Field(
        default=("zero_shot", "linear", "mop", "tip_adapter"), min_length=1
    )
    """Heads, each by its kind or as name=kind, so that one kind can be there several times:
    `linear,small=linear`."""
    set: tuple[str, ...] = ()
    """Training options of single heads as head:option=value, repeatable:
    `--set linear:optim.epochs=100 --set small:head.lrs=[0.01]`; see heads.train."""
    shots: tuple[PositiveInt, ...] = Field(default=(1, 2, 4, 8, 16), min_length=1)
    """Training rows a class, each 1 or more."""
    val_shots: PositiveInt = 4
    """Most validation rows a class, 1 or more; min(shots, this) pick epoch and candidate."""
    seeds: PositiveInt = 3
    """Times that each cell is trained: on other rows, from other initial values; 1 or more."""
    run: Path | None = None
    """Folder of the table and of all run folders; unset = runs/<cache>-few-shot."""
    restart: bool = False
    """Train anew what the folder holds already."""
    device: str = "auto"
    """auto (the GPU if there is one), cpu or cuda:N."""
    quiet: bool = False
    """Print nothing but warnings and errors."""

    @field_validator("set", mode="before")
    @classmethod
    def _whole_entries(cls, value: Any) -> Any:
        return rejoined(value, _ASSIGNMENT) if isinstance(value, list | tuple) else value


@dataclass(frozen=True)
class FewShotReport:
    """What the protocol came to.

    Attributes:
        folder: where everything is.
        metric: name of the main metric.
        cells: one row for each training: head, kind, shots, seed, run, val, and the test metrics.
        table: one row for each head and number of shots: mean and std of the main metric, seeds.
    """

    folder: Path
    metric: str
    cells: pd.DataFrame
    table: pd.DataFrame


def run(config: FewShotConfig) -> FewShotReport:
    """Trains what is not there yet, and writes the table as CSV, Markdown and picture.

    Raises:
        ConfigError: a head or an option that does not exist, or several processes.
        CacheError: a cache that a head cannot read, or that has no labelled test rows.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("heads.few_shot is one process; use torchrun with heads.train")
    folder = config.run or Path("runs") / f"{config.cache.name}-few-shot"
    plan = {name: _training(config, name, kind) for name, kind in _named(config.heads).items()}
    grid = list(itertools.product(config.shots, range(config.seeds), plan))
    cache = open_one_or_joined(config.cache, config.join)
    require_labels(cache)
    group, shelf = Group(0, 1, resolve_device(config.device)), Shelf()
    progress = ProgressLine(config.quiet)
    records: list[dict[str, Any]] = []
    metric, trained_seconds, num_trained = "", 0.0, 0
    for done, (shots, seed, name) in enumerate(grid):
        one = plan[name].model_copy(
            update={
                "run": folder / name / f"{shots}-shot-seed-{seed}",
                "shots": shots,
                "shots_seed": seed,
                "seed": seed,
            }
        )
        trained = train.train_on(cache, one, group, shelf)
        values = trained.metrics
        if "test" not in values:
            raise ConfigError(
                f"{config.cache}: has no labelled test split; the table reports test rows, so "
                "name one with --set HEAD:test_split=NAME for each head"
            )
        metric = values["metric"]
        records.append(
            {
                "head": name,
                "kind": one.head.kind,
                "shots": shots,
                "seed": seed,
                "run": str(trained.run),
                "candidate": values["candidate"],
                "num_train_rows": values["num_train_rows"],
                "seconds": values["seconds"],
                f"val_{metric}": values["val"][metric],
                **values["test"],
            }
        )
        if not trained.reused:
            trained_seconds += values["seconds_total"]
            num_trained += 1
        left = trained_seconds / max(num_trained, 1) * (len(grid) - done - 1)
        progress.show(
            f"{done + 1}/{len(grid)}  {name}, {shots} shots, seed {seed}: "
            f"{metric} {values['test'][metric]:.2%}  {duration(left)} left"
        )
    progress.close()
    cells = pd.DataFrame(records)
    report = FewShotReport(folder, metric, cells, summarise(cells, metric))
    _write(report, config)
    if not config.quiet:
        print(markdown(report.table, list(plan)))
        print(f"mean ± standard deviation of {metric} over {config.seeds} seeds, test rows")
        print(f"folder: {folder}")
    return report


def summarise(cells: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Mean, standard deviation (over n - 1; 0 of one seed) and count of each head and shots."""
    groups = cells.groupby(["head", "shots"], sort=False)[metric]
    table = groups.agg(mean="mean", std="std", seeds="count").reset_index()
    return table.fillna({"std": 0.0})


def markdown(table: pd.DataFrame, heads: Sequence[str]) -> str:
    """A table in percent: one row a head, one column for each number of shots."""
    shots = sorted(table["shots"].unique())
    columns = (table[column].tolist() for column in ("head", "shots", "mean", "std"))
    text = {
        (head, count): f"{100 * mean:.1f} ± {100 * std:.1f}"
        for head, count, mean, std in zip(*columns, strict=True)
    }
    lines = [["head", *(f"{count} shot{'s' if count > 1 else ''}" for count in shots)]]
    lines += [[name, *(text[name, count] for count in shots)] for name in heads]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    rows = [
        " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) for line in lines
    ]
    rule = "|".join(["-" * (widths[0] + 2), *("-" * (w + 1) + ":" for w in widths[1:])])
    return "\n".join([f"| {rows[0]} |", f"|{rule}|", *(f"| {row} |" for row in rows[1:])])


def _write(report: FewShotReport, config: FewShotConfig) -> None:
    from heads.reporting import shot_curves  # matplotlib takes a second to import

    folder, metric = report.folder, report.metric
    heads = list(dict.fromkeys(report.cells["head"]))
    write_atomic(folder / "config.yaml", config.to_yaml().encode())
    write_atomic(folder / "cells.csv", report.cells.to_csv(index=False).encode())
    write_atomic(folder / "table.csv", report.table.to_csv(index=False).encode())
    write_atomic(folder / "table.md", (markdown(report.table, heads) + "\n").encode())
    curves = {
        name: {
            int(shots): np.asarray(rows[metric]).tolist()
            for shots, rows in report.cells[report.cells["head"] == name].groupby("shots")
        }
        for name in heads
    }
    made = shot_curves.draw(curves, f"test {metric}", f"few-shot on {config.cache.name}")
    made.savefig(folder / "curves.png")


def _named(heads: Sequence[str]) -> dict[str, str]:
    """Name -> kind.

    Raises:
        ConfigError: if two have one name.
    """
    named: dict[str, str] = {}
    for entry in heads:
        name, _, kind = entry.partition("=")
        if name in named:
            raise ConfigError(
                f"heads: {name!r} is there twice; name one of them, as in other={kind or name}"
            )
        named[name] = kind or name
    return named


def _training(config: FewShotConfig, name: str, kind: str) -> TrainConfig:
    """The training options of a head, shots and seed aside.

    Raises:
        ConfigError: an unknown kind or option, an illegal value, or one that this job sets.
    """
    options: dict[str, Any] = {"head.kind": kind}
    for entry in config.set:
        if not _ASSIGNMENT.match(entry):
            raise ConfigError(f"set: {entry!r} is not of the form head:option=value")
        head, _, assignment = entry.partition(":")
        if head not in _named(config.heads):
            known = ", ".join(_named(config.heads))
            raise ConfigError(f"set: {entry!r} names head {head!r}, expected one of {known}")
        if head != name:
            continue
        option, value = one_value(assignment)
        if option.split(".")[0] in _SEPARATE:
            raise ConfigError(f"set: {option} is for this job to set; leave out {entry!r}")
        options[option] = value
    values = nested(options) | {
        "cache": config.cache,
        "join": config.join,
        "val_shots": config.val_shots,
        "device": config.device,
        "restart": config.restart,
        "quiet": True,
        "report": False,
    }
    try:
        return TrainConfig.from_values(values)
    except ConfigError as error:
        raise ConfigError(f"head {name}: {error}") from None


if __name__ == "__main__":
    run_job(FewShotConfig, run)
