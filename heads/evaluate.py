"""Job: metrics of a trained head on a split of a cache.

python -m heads.evaluate --run runs/inat2021-linear-1a2b3c --split val
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor

from featcache.config import Config, run_job
from featcache.errors import CacheMismatchError
from featcache.join import open_joined, open_one_or_joined
from featcache.precision import resolve_device
from featcache.reader import Cache, open_cache
from featcache.storage import CachePath, Where, place
from heads import metrics
from heads.base import Head
from heads.calibration import calibration_of
from heads.data import FeatureTables, HeadArrays, open_arrays
from heads.parts import Part, has_labels, labelled_part, require_labels
from heads.run_folder import (
    LoadedRun,
    RunError,
    Weights,
    load_run,
    steps_since,
    write_atomic,
    write_json,
)
from heads.scoring import MetricsConfig, Outputs, Scores, collect, finite, metrics_table, summarise
from heads.vocabulary import for_classes_of, unseen_classes


class EvaluateConfig(Config):
    """Metrics of a trained head on a split of a cache."""

    run: Path
    """Run folder that heads.train wrote."""
    weights: Weights = "best"
    """best = of the epoch that validated best; last = of the last one."""
    cache: CachePath | None = None
    """Cache to evaluate on; unset = the one (or the joined ones) it was trained on."""
    join: tuple[CachePath, ...] = ()
    """Further caches, joined by id, for a head that was trained on several; needs cache."""
    split: str | None = None
    """Split of the cache; unset = test if it has labels, otherwise val."""
    metrics: MetricsConfig = MetricsConfig()
    """How metrics are counted."""
    device: str = "auto"
    """auto (the GPU if there is one), cpu or cuda:N."""

    @model_validator(mode="after")
    def _join_needs_cache(self) -> "EvaluateConfig":
        if self.join and self.cache is None:
            raise ValueError(f"join={[str(one) for one in self.join]} needs cache")
        return self


@dataclass(frozen=True)
class Validation:
    """Top-1 (single label) or mAP (multi label) of what a head scores.

    Attributes:
        candidates: by name, of each model trained side by side; see `Head.candidates`.
        monitors: of what is only watched; see `Head.monitors`.
        loss: least of the candidates' cross-entropies (softmax or sigmoid, mean over rows and, of
            sigmoids, over classes), whatever they are trained on; None if not asked for.
    """

    candidates: dict[str, float]
    monitors: dict[str, float]
    loss: float | None = None

    @property
    def all(self) -> dict[str, float]:
        """Both, by name."""
        return self.candidates | self.monitors


@torch.inference_mode()
def score_candidates(
    head: Head, table: FeatureTables, part: Part, with_loss: bool = False
) -> Validation:
    """The main metric of each candidate and monitor of a head.

    Args:
        head: on the table's device, in evaluation mode.
        table: features of `part.rows`.
        part: rows with targets.
        with_loss: measure `Validation.loss` too.

    Raises:
        RunError: if a score is NaN or infinite.
    """
    num_classes = part.targets.shape[1] if part.targets.ndim == 2 else None
    right: dict[str, Any] = {}
    watched: set[str] = set()
    losses: dict[str, float] = {}
    targets = torch.from_numpy(part.targets).to(table.device)
    # A single-label part does not say C, but has most classes where they are many.
    for start, stop in table.spans(num_classes or int(part.targets.max()) + 1):
        features = table.slice(start, stop)
        monitors = dict(head.monitors(*features))
        watched |= monitors.keys()
        for name, logits in itertools.chain(head.candidates(*features), monitors.items()):
            finite(logits, (start, stop))
            if with_loss and name not in watched:
                loss = _summed_cross_entropy(logits, targets[start:stop], head.scored_classes)
                losses[name] = losses.get(name, 0.0) + float(loss)
            if num_classes is None:
                hits = (metrics.target_rank(logits, targets[start:stop]) == 0).sum()
                right[name] = right.get(name, 0) + hits
            else:
                right.setdefault(name, []).append(logits.float().cpu().numpy())
    if num_classes is None:
        values = {name: int(hits) / len(part) for name, hits in right.items()}
    else:
        values = {}
        for name, logits in right.items():
            columns = slice(None) if head.scored_classes is None else list(head.scored_classes)
            ap = metrics.average_precision(
                np.concatenate(logits)[:, columns], part.targets[:, columns]
            )
            if np.isnan(ap).all():
                raise RunError(
                    f"none of the {len(part)} rows of {part.name!r} that decide has a class that "
                    "the head scores; choose other rows by val_split or val_fraction"
                )
            values[name] = float(np.nanmean(ap))
    return Validation(
        {name: value for name, value in values.items() if name not in watched},
        {name: value for name, value in values.items() if name in watched},
        min(losses.values()) / len(part) if losses else None,
    )


def _summed_cross_entropy(
    logits: Tensor, targets: Tensor, columns: Sequence[int] | None = None
) -> Tensor:
    """0-d sum over rows of the softmax or (mean over classes) sigmoid cross-entropy.

    Args:
        logits: (B, C).
        targets: (B,) or (B, C).
        columns: classes that count, of sigmoids; None = all.
    """
    logits = logits.float()
    if columns is not None and targets.ndim == 2:
        own = list(columns)
        logits, targets = logits[:, own], targets[:, own]
    if targets.ndim == 1:
        return F.cross_entropy(logits, targets.long(), reduction="sum")
    return (
        F.binary_cross_entropy_with_logits(logits, targets.float(), reduction="none").mean(1).sum()
    )


def score_monitors(head: Head, table: FeatureTables, part: Part) -> dict[str, float]:
    """The main metric of each monitor of a head; see `score_candidates`."""
    if type(head).monitors is Head.monitors:  # spares a pass over the rows
        return {}
    return score_candidates(head, table, part).monitors


def main_metric(task: str) -> str:
    """Name of the metric that decides."""
    return "map" if task == "multi_label" else "top1"


def evaluate_run(
    run: LoadedRun, cache: Cache, split: str, options: MetricsConfig, device: torch.device
) -> Scores:
    """Metrics of a loaded run on a split of a cache that fits it.

    Raises:
        CacheMismatchError: naming the field in which the cache differs from the training cache.
        RunError: if the split has no labelled row.
    """
    outputs, part = outputs_of(run, cache, split, options, device)
    scores = summarise(outputs, run.classes, options, calibration_of(run))
    if part.without_caption:
        scores.metrics["num_without_caption"] = part.without_caption
    return scores


def outputs_of(
    run: LoadedRun, cache: Cache, split: str, options: MetricsConfig, device: torch.device
) -> tuple[Outputs, Part]:
    """What a head says about the rows of a split, and which rows these are.

    Raises:
        CacheMismatchError, RunError: see `evaluate_run`.
    """
    arrays, part = open_part(run, cache, split)
    table = FeatureTables(arrays, part.rows, device)
    head = run.head.to(device)
    return collect(head, table, part, run.classes, options, calibration_of(run)), part


def open_part(run: LoadedRun, cache: Cache, split: str) -> tuple[HeadArrays, Part]:
    """The arrays that a head reads in a cache, and the labelled rows of a split.

    Raises:
        CacheMismatchError, RunError: see `evaluate_run`.
    """
    run.require_fits(cache)
    require_labels(cache)
    arrays = open_arrays(cache, run.config)
    part = labelled_part(cache, split, arrays.readable)
    lost = part.without_caption
    if not has_labels(part):
        why = f"; {lost} have no caption, and the head reads nothing else" if lost else ""
        raise RunError(
            f"{cache.path}: split {split!r} has no valid labelled row to evaluate on{why}"
        )
    return arrays, part


def choose_split(cache: Cache) -> str:
    """The split that is reported unless one is named: test if it has labels, otherwise val."""
    names = cache.split_names
    known = (n for n in ("test", "val") if n in names and has_labels(labelled_part(cache, n)))
    return next(known, names[0])


def open_for(run: LoadedRun, path: Where | None, join: Sequence[Where]) -> Cache:
    """The caches named, or those that a head was trained on.

    Raises:
        CacheError, CacheMismatchError: if one is missing, or they cannot be joined.
    """
    members = run.members
    places = [place(one.path) for one in members] if path is None else [path, *join]
    try:
        if path is None and len(members) > 1:
            return open_joined({one.alias: place(one.path) for one in members})
        return open_one_or_joined(places[0], places[1:])
    except CacheMismatchError as error:  # often one has grown, and the others have not
        caches = [open_cache(one) for one in places]
        grown = [f"{one}: {steps}" for one, steps in steps_since(members, caches)]
        if not grown:
            raise
        raise CacheMismatchError("; ".join([str(error), *grown])) from None


def open_known(
    run: LoadedRun, path: Where | None, join: Sequence[Where], quiet: bool = False
) -> Cache:
    """`open_for`, and a line on how each cache changed since the head was trained.

    Raises:
        CacheError: see `open_for`.
        CacheMismatchError: likewise; or none is named, and what lies there now is another cache.
    """
    cache = open_for(run, path, join)
    trained_on = run.record["cache"]["fingerprint"]
    grown = run.growth_since(cache)
    if grown is not None:
        if not quiet:
            print(grown)
    elif path is None and cache.fingerprint != trained_on:
        raise CacheMismatchError(
            f"{run.record['cache']['path']}: fingerprint {cache.fingerprint}, the head was trained "
            f"on {trained_on}; name the cache with --cache if this one is meant"
        )
    return cache


def run(config: EvaluateConfig) -> Scores:
    """Evaluates, prints a table, and writes `metrics_<split>.json` and `classes_<split>.csv`.

    Those of the last weights have `_last` in their names.
    """
    loaded = load_run(config.run, weights=config.weights)
    path = config.cache or place(loaded.record["cache"]["path"])
    cache = open_known(loaded, config.cache, config.join)
    device = resolve_device(config.device)
    unseen = unseen_classes(loaded, cache)
    loaded = for_classes_of(loaded, cache, device)
    split = config.split or choose_split(cache)
    scores = evaluate_run(loaded, cache, split, config.metrics, device)
    suffix = split if config.weights == "best" else f"{split}_{config.weights}"
    record: dict[str, Any] = {"cache": str(path), "fingerprint": cache.fingerprint, "split": split}
    record |= scores.metrics
    if scores.intervals:
        options = config.metrics
        record["bootstrap"] = {"draws": options.bootstrap, "confidence": options.confidence}
        record["intervals"] = {name: list(ends) for name, ends in scores.intervals.items()}
    write_json(config.run / f"metrics_{suffix}.json", record)
    table = config.run / f"classes_{suffix}.csv"
    write_atomic(table, scores.per_class.to_csv(index=False).encode())
    where = " + ".join(str(one.path) for one in cache.parts)
    print(f"{config.run}: {split} of {where}")
    if unseen:
        print(f"  {len(unseen)} of {cache.num_classes} classes by name alone, never trained on")
    print(metrics_table(scores.metrics, scores.intervals))
    print(f"per class: {table}")
    return scores


if __name__ == "__main__":
    run_job(EvaluateConfig, run)
