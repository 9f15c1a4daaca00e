"""Job: many trainings on one cache that is read once, and a table of them.

python -m heads.sweep --cache cache/birds --set head=linear,mop --set optim.lr=1e-3,1e-2 --seeds 3
"""

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pydantic import PositiveInt, field_validator

from featcache.config import Config, merge, run_job
from featcache.errors import ConfigError, UserError
from featcache.identity import fingerprint
from featcache.join import open_one_or_joined
from featcache.precision import resolve_device
from featcache.reader import Cache
from featcache.storage import CachePath
from heads import train
from heads.distributed import Group, ending_at_once
from heads.option_grid import (
    Grid,
    combinations,
    grid_of,
    nested,
    read_grids,
    read_options,
    rejoined,
)
from heads.parts import require_labels
from heads.progress import ProgressLine, duration
from heads.run_folder import RunError, write_atomic
from heads.shelf import Shelf
from heads.train import TrainConfig

_OWN = ("cache", "join", "run", "device", "quiet", "restart", "report")
"""Training options that this job sets itself."""


class SweepConfig(Config):
    """Train many configurations on one cache and sort them by their validation metric."""

    cache: CachePath
    """Feature cache that featcache.extract wrote."""
    join: tuple[CachePath, ...] = ()
    """Further caches of the same dataset, joined by id; see heads.train."""
    base: Path | None = None
    """YAML file of heads.train options that all trainings share; its cache is not read."""
    set: tuple[str, ...] = ()
    """Options of heads.train and their values, repeatable: `--set head.kind=linear,mop --set
    optim.lr=1e-3,1e-2` trains all four combinations."""
    grid: Path | None = None
    """YAML file of options and lists of values (`optim.lr: [0.001, 0.01]`): all combinations; or a
    list of such mappings, one grid after the other. Each is combined with `set`."""
    seeds: PositiveInt = 1
    """Trainings of each combination, with seeds from the base's on, 1 or more."""
    run: Path | None = None
    """Folder of the table and of all run folders; unset = runs/<cache>-sweep."""
    restart: bool = False
    """Train anew what the folder holds already."""
    device: str = "auto"
    """auto (the GPU if there is one), cpu or cuda:N."""
    quiet: bool = False
    """Print nothing but warnings and errors."""

    @field_validator("set", mode="before")
    @classmethod
    def _whole_entries(cls, value: Any) -> Any:
        return rejoined(value) if isinstance(value, list | tuple) else value


@dataclass(frozen=True)
class SweepReport:
    """What a sweep came to.

    Attributes:
        folder: where everything is.
        runs: one row a training, in the order of the grid: its options, seed, metrics, run folder,
            and the reason if it failed.
        table: one row a combination, best validation metric first, failed ones last.
    """

    folder: Path
    runs: pd.DataFrame
    table: pd.DataFrame


def run(config: SweepConfig) -> SweepReport:
    """Trains what is not there yet; the table on disk is up to date after each training.

    Raises:
        ConfigError: a grid that cannot be read, or several processes.
        CacheError: a cache that cannot be trained on at all.
        RunError: if all trainings failed; the table is written before.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("heads.sweep is one process; use torchrun with heads.train")
    folder = config.run or Path("runs") / f"{config.cache.name}-sweep"
    plan = _plan(config)
    cache = open_one_or_joined(config.cache, config.join)
    require_labels(cache)
    group = Group(0, 1, resolve_device(config.device))
    shelf, progress = Shelf(), ProgressLine(config.quiet)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "config.yaml", config.to_yaml().encode())
    rows: list[dict[str, Any]] = []
    num_trained, started = 0, time.perf_counter()
    for number, (options, values) in enumerate(plan, 1):
        values |= {
            "cache": config.cache,
            "join": config.join,
            "restart": config.restart,
            "device": config.device,
            "quiet": True,
            "report": False,  # a second each; heads.report writes the page of one worth a look
        }
        outcome = _train(cache, folder, values, group, shelf)
        own = {path: shown(value) for path, value in options.items()}
        # `head` may be an option with more than a kind: two such are two rows of the table.
        rows.append({**own, **{name: v for name, v in outcome.items() if name not in own}})
        report = _tabulate(folder, rows)
        num_trained += not outcome["reused"]
        left = (time.perf_counter() - started) / max(num_trained, 1) * (len(plan) - number)
        told = ", ".join(f"{path} {shown(value)}" for path, value in options.items())
        came_to = outcome["error"] or f"val {outcome['metric']} {outcome['val']:.2%}"
        progress.show(f"{number}/{len(plan)}  {told}: {came_to}  {duration(left)} left")
    progress.close()
    if not config.quiet:
        print((folder / "table.md").read_text(), end="")
        print(f"mean ± standard deviation over {config.seeds} seed(s), sorted by validation")
        print(f"folder: {folder}")
    if all(row["error"] for row in rows):
        raise RunError(
            f"none of the {len(rows)} trainings came to a result; the first: {rows[0]['error']}; "
            f"{folder / 'table.md'} has all reasons"
        )
    return report


def _plan(config: SweepConfig) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Options that differ, and all options, of each training.

    Raises:
        ConfigError: if the files or entries are not what they should be.
    """
    base = {} if config.base is None else read_options(config.base)
    base = {name: value for name, value in base.items() if name not in _OWN}
    grids: list[Grid] = [{}] if config.grid is None else read_grids(config.grid)
    plan = []
    for options in combinations(grids, grid_of(config.set)):
        for path in options:
            if path.split(".")[0] in (*_OWN, "seed"):
                raise ConfigError(f"{path} is for this job to set; leave it out of the grid")
        values = merge(base, nested(options))
        first = int(values.get("seed", 0))
        for seed in range(first, first + config.seeds):
            plan.append(({**options, "seed": seed}, {**values, "seed": seed}))
    return plan


def _train(
    cache: Cache, folder: Path, values: Mapping[str, Any], group: Group, shelf: Shelf
) -> dict[str, Any]:
    """The row of one training; what a user can set right is its `error`, not the sweep's end."""
    failed: dict[str, Any] = {"metric": "", "val": None, "test": None, "reused": False}
    try:
        asked = TrainConfig.from_values(values)
        computed = {name: v for name, v in asked.record().items() if name not in _OWN}
        digest = fingerprint(computed | {"cache": cache.fingerprint})[:8]
        own = folder / f"{asked.head.kind}-{digest}"
        failed |= {"head": asked.head.kind, "run": str(own)}
        report = train.train_on(cache, asked.model_copy(update={"run": own}), group, shelf)
    except UserError as error:
        return {**failed, "error": " ".join(str(error).split())}
    metrics = report.metrics
    metric = metrics["metric"]
    return {
        "metric": metric,
        "val": metrics["val"][metric],
        "test": metrics["test"][metric] if "test" in metrics else None,
        "head": asked.head.kind,
        "candidate": metrics["candidate"],
        "best_epoch": metrics["best_epoch"],
        "epochs": metrics["epochs"],
        "parameters": metrics["num_parameters"],
        "seconds": metrics["seconds"],
        "reused": report.reused,
        "run": str(report.run),
        "error": "",
    }


def _tabulate(folder: Path, rows: Sequence[Mapping[str, Any]]) -> SweepReport:
    """Writes `runs.csv`, `table.csv` and `table.md`; test rows never decide the order."""
    runs = pd.DataFrame(rows)
    metric = next((row["metric"] for row in rows if row["metric"]), "")
    paths = [name for name in runs.columns[: list(runs.columns).index("metric")] if name != "seed"]
    # Trainings without an option differ from those with any value of it.
    keys = runs[paths].fillna("").astype(str).agg("\0".join, axis=1) if paths else runs["seed"] * 0
    table = []
    for _, group in runs.groupby(keys, sort=False):
        done, first = group[group["error"] == ""], group.iloc[0]
        errors = group["error"][group["error"] != ""]
        table.append(
            {
                **{path: first[path] for path in paths},
                f"val_{metric}": done["val"].astype(float).mean(),
                "val_std": _deviation(done["val"]),
                f"test_{metric}": done["test"].astype(float).mean(),
                "test_std": _deviation(done["test"]),
                "seeds": len(done),
                "seconds": done["seconds"].sum() if len(done) else 0.0,
                "error": errors.iloc[0] if len(errors) else "",
            }
        )
    result = pd.DataFrame(table).sort_values(
        f"val_{metric}", ascending=False, kind="stable", na_position="last", ignore_index=True
    )
    write_atomic(folder / "runs.csv", runs.to_csv(index=False).encode())
    write_atomic(folder / "table.csv", result.to_csv(index=False).encode())
    write_atomic(folder / "table.md", markdown(result, paths, metric).encode())
    return SweepReport(folder, runs, result)


def markdown(table: pd.DataFrame, paths: Sequence[str], metric: str) -> str:
    """The table in percent, one line a combination; columns that are empty throughout are left out.

    Args:
        table: of `SweepReport`.
        paths: options that differ.
        metric: name of the main metric.
    """
    lines = [[*paths, f"val {metric}", f"test {metric}", "seeds", "seconds", "failed because"]]
    for _, row in table.iterrows():
        scores = [
            ""
            if np.isnan(row[f"{part}_{metric}"])
            else f"{100 * row[f'{part}_{metric}']:.2f}"
            + (f" ± {100 * row[f'{part}_std']:.2f}" if row["seeds"] > 1 else "")
            for part in ("val", "test")
        ]
        options = ["" if pd.isna(row[path]) else str(row[path]) for path in paths]
        seconds = f"{row['seconds']:.1f}" if row["seeds"] else ""
        lines.append([*options, *scores, str(row["seeds"]), seconds, str(row["error"])])
    filled = [any(line[column] for line in lines[1:]) for column in range(len(lines[0]))]
    cells = [
        [cell.replace("|", "\\|") for cell, kept in zip(line, filled, strict=True) if kept]
        for line in lines
    ]
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    text = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"
        for line in cells
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([text[0], rule, *text[1:]]) + "\n"


def shown(value: Any) -> str:
    """A value of an option as one cell."""
    return value if isinstance(value, str) else json.dumps(value)


def _deviation(values: "pd.Series[Any]") -> float:
    """Over n - 1; 0 of one value."""
    return float(values.astype(float).std()) if len(values) > 1 else 0.0


if __name__ == "__main__":
    with ending_at_once():
        run_job(SweepConfig, run)
