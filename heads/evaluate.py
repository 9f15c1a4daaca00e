"""Job: metrics of a trained head on a split of a cache.

python -m heads.evaluate --run runs/inat2021-linear-1a2b3c --split val
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor

from featcache.config import Config, run_job
from featcache.errors import CacheMismatchError, ConfigError
from featcache.join import open_joined, open_one_or_joined
from featcache.precision import resolve_device
from featcache.reader import Cache, open_cache
from featcache.shot_groups import BOUNDARIES, stated_groups
from featcache.storage import CachePath, Where, place
from heads import metrics
from heads.base import Head
from heads.data import FeatureTables, open_arrays
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
from heads.vocabulary import for_classes_of, unseen_classes


class MetricsConfig(Config):
    """How metrics are counted."""

    shot_boundaries: tuple[PositiveInt, PositiveInt] | None = None
    """Smallest number of training images of a medium and of a head class; fewer = tail. Unset = the
    groups that the dataset states (class metadata `group`), otherwise 20 and 100."""
    threshold: float = Field(default=0.5, gt=0, lt=1)
    """Probability from which on a class counts as predicted (multi-label), 0..1."""
    levels: tuple[str, ...] | None = None
    """Class metadata columns to report accuracy for, fine to coarse; unset = genus, family, order,
    class, phylum, kingdom, supercategory, as far as the class table has them."""

    @model_validator(mode="after")
    def _ascending(self) -> "MetricsConfig":
        if self.shot_boundaries is not None:
            low, high = self.shot_boundaries
            if low >= high:
                raise ValueError(f"shot_boundaries are {low} and {high}; the first must be lower")
        return self


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
class Scores:
    """Metrics of a split.

    Attributes:
        metrics: metric name -> share in 0..1 (or a count, for names that start with `num_`).
        per_class: C rows: class, name, group (if the dataset states it), num_train, num_rows and
            the class's own metrics.
    """

    metrics: dict[str, float]
    per_class: pd.DataFrame


@torch.inference_mode()
def score_split(
    head: Head,
    table: FeatureTables,
    part: Part,
    classes: pd.DataFrame,
    options: MetricsConfig,
) -> Scores:
    """All metrics of a head on the rows of `part`.

    Args:
        head: on the table's device, in evaluation mode.
        table: features of `part.rows`.
        part: rows with targets.
        classes: class table with the training counts that make the shot groups.
        options: see `MetricsConfig`.

    Raises:
        ConfigError: if a taxonomy level is not in the class table.
        RunError: if a score is NaN or infinite.
    """
    counts = classes["count"].to_numpy(np.int64)
    boundaries = options.shot_boundaries or BOUNDARIES
    groups = stated_groups(classes) if options.shot_boundaries is None else None
    logits = (_finite(head(*table.slice(*span)), span) for span in table.spans(len(classes)))
    if part.targets.ndim == 2:
        scores = np.concatenate([batch.float().cpu().numpy() for batch in logits])
        threshold = options.threshold if head.has_probabilities else None
        values = metrics.multi_label_metrics(
            scores, part.targets, counts, boundaries, threshold, groups
        )
        return Scores(values, _multi_label_table(scores, part.targets, classes, threshold))
    try:
        taxonomy = metrics.Taxonomy.from_classes(classes, options.levels)
    except KeyError as error:
        raise ConfigError(
            f"metrics.levels: no column {error.args[0]!r} in the class table; "
            f"it has {', '.join(map(str, classes.columns))}"
        ) from None
    targets = torch.from_numpy(part.targets).to(table.device)
    scored, start = [], 0
    for batch in logits:
        scored.append(metrics.score_rows(batch, targets[start : start + len(batch)], taxonomy))
        start += len(batch)
    rows = metrics.RowScores.concatenate(scored)
    values = metrics.single_label_metrics(rows, counts, boundaries, taxonomy, groups)
    return Scores(values, _single_label_table(rows, classes))


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
    for start, stop in table.spans(num_classes or 1024):
        features = table.slice(start, stop)
        monitors = dict(head.monitors(*features))
        watched |= monitors.keys()
        for name, logits in itertools.chain(head.candidates(*features), monitors.items()):
            _finite(logits, (start, stop))
            if with_loss and name not in watched:
                loss = _summed_cross_entropy(logits, targets[start:stop])
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
            ap = metrics.average_precision(np.concatenate(logits), part.targets)
            values[name] = float(np.nanmean(ap))
    return Validation(
        {name: value for name, value in values.items() if name not in watched},
        {name: value for name, value in values.items() if name in watched},
        min(losses.values()) / len(part) if losses else None,
    )


def _summed_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """0-d sum over rows of the softmax or (mean over classes) sigmoid cross-entropy."""
    logits = logits.float()
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


def metrics_table(values: Mapping[str, float]) -> str:
    """Metrics as aligned lines: shares in percent, counts as they are; says what is left out."""
    width = max(len(name) for name in values)
    lines = [
        f"  {name:<{width}}  " + (f"{value:>8}" if name.startswith("num_") else f"{value:8.2%}")
        for name, value in values.items()
    ]
    if "map" in values and "micro_f1" not in values:
        lines.append(
            "  no precision, recall and F1: plain cosines say which class is likelier, not from "
            "where on it is present; --head.cosine_threshold of heads.train says that"
        )
    return "\n".join(lines)


def evaluate_run(
    run: LoadedRun, cache: Cache, split: str, options: MetricsConfig, device: torch.device
) -> Scores:
    """Metrics of a loaded run on a split of a cache that fits it.

    Raises:
        CacheMismatchError: naming the field in which the cache differs from the training cache.
        RunError: if the split has no labelled row.
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
    table = FeatureTables(arrays, part.rows, device)
    scores = score_split(run.head.to(device), table, part, run.classes, options)
    if lost:
        scores.metrics["num_without_caption"] = lost
    return scores


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
    names = cache.split_names
    split = config.split or next(
        (n for n in ("test", "val") if n in names and has_labels(labelled_part(cache, n))), names[0]
    )
    scores = evaluate_run(loaded, cache, split, config.metrics, device)
    suffix = split if config.weights == "best" else f"{split}_{config.weights}"
    write_json(
        config.run / f"metrics_{suffix}.json",
        {"cache": str(path), "fingerprint": cache.fingerprint, "split": split} | scores.metrics,
    )
    table = config.run / f"classes_{suffix}.csv"
    write_atomic(table, scores.per_class.to_csv(index=False).encode())
    where = " + ".join(str(one.path) for one in cache.parts)
    print(f"{config.run}: {split} of {where}")
    if unseen:
        print(f"  {len(unseen)} of {cache.num_classes} classes by name alone, never trained on")
    print(metrics_table(scores.metrics))
    print(f"per class: {table}")
    return scores


def _finite(logits: Tensor, span: tuple[int, int]) -> Tensor:
    if not torch.isfinite(logits).all():
        raise RunError(
            f"a score of rows {span[0]}..{span[1]} is NaN or infinite; the head diverged, train it "
            "again with a lower optim.lr"
        )
    return logits


def _single_label_table(rows: metrics.RowScores, classes: pd.DataFrame) -> pd.DataFrame:
    num_classes = len(classes)
    right = np.bincount(rows.label[rows.rank == 0], minlength=num_classes)
    support = np.bincount(rows.label, minlength=num_classes)
    predicted = np.bincount(rows.predicted, minlength=num_classes)
    return _class_table(
        classes,
        support,
        {
            "num_predicted": predicted,
            "accuracy": np.where(support > 0, right / np.maximum(support, 1), np.nan),
            "precision": np.where(predicted > 0, right / np.maximum(predicted, 1), np.nan),
        },
    )


def _multi_label_table(
    scores: npt.NDArray[np.float32],
    targets: npt.NDArray[np.uint8],
    classes: pd.DataFrame,
    threshold: float | None,
) -> pd.DataFrame:
    support = targets.sum(0, dtype=np.int64)
    ranked = {"average_precision": metrics.average_precision(scores, targets)}
    if threshold is None:
        return _class_table(classes, support, ranked)
    predicted = scores >= np.log(threshold / (1 - threshold))
    precision, recall, f1 = metrics.precision_recall_f1(predicted, targets)
    counted = {"precision": precision, "recall": recall, "f1": f1}
    return _class_table(classes, support, {"num_predicted": predicted.sum(0), **ranked, **counted})


def _class_table(
    classes: pd.DataFrame, support: npt.NDArray[np.int64], columns: dict[str, Any]
) -> pd.DataFrame:
    head = {"class": np.arange(len(classes)), "name": classes["name"].to_numpy()}
    groups = stated_groups(classes)
    stated = {} if groups is None else {"group": groups}
    counts = {"num_train": classes["count"].to_numpy(), "num_rows": support}
    return pd.DataFrame(head | stated | counts | columns)


if __name__ == "__main__":
    run_job(EvaluateConfig, run)
