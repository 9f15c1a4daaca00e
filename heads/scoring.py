"""Scores of rows and the metrics of them: what training, evaluation, comparison and reports share.

`collect` runs a head over rows and keeps what metrics need; `summarise` turns that into metrics,
their confidence intervals and a table with a line a class.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator
from torch import Tensor

from featcache.config import Config
from featcache.errors import ConfigError
from featcache.shot_groups import BOUNDARIES, stated_groups
from heads import bootstrap, metrics
from heads.base import Head
from heads.calibration import Calibration, chosen_rows, fit_multi_label, fit_single_label
from heads.data import FeatureTables
from heads.metrics import RowScores, Taxonomy
from heads.parts import Part
from heads.run_folder import RunError

Intervals = Mapping[str, tuple[float, float]]
"""Metric name -> low and high end of its confidence interval."""


_USUAL_DRAWS = 1000
_CHEAP_VALUES = 1 << 27
"""Weights of rows, for each class and draw, that are gone through in about a second."""
_CLASS_METRICS = ("average_precision", "precision", "recall", "f1")
"""Columns of a multi-label class table that rest on the class's scores."""
_SINGLE_LABEL_PASSES = 8
"""Passes over the weights of a row that single-label metrics take together."""


class MetricsConfig(Config):
    """How metrics are counted."""

    shot_boundaries: tuple[PositiveInt, PositiveInt] | None = None
    """Smallest number of training images of a medium and of a head class; fewer = tail. Unset = the
    groups that the dataset states (class metadata `group`), otherwise 20 and 100."""
    threshold: float | Literal["searched"] = Field(default=0.5)
    """Probability from which on a class counts as predicted (multi-label), 0..1; `searched` = one
    for each class, searched on the validation rows by the training."""
    top_k: PositiveInt | None = None
    """Count the k best classes of each row as predicted instead (multi-label), as published
    zero-shot figures do; rows without a label are then left out of precision, recall and F1."""
    levels: tuple[str, ...] | None = None
    """Class metadata columns to report accuracy for, fine to coarse; unset = genus, family, order,
    class, phylum, kingdom, supercategory, as far as the class table has them."""
    bootstrap: NonNegativeInt = 0
    """Draws of rows, with replacement, for confidence intervals; 0 = none, 1000 is usual."""
    bootstrap_seed: NonNegativeInt = 0
    """Seed of these draws, 0 or more."""
    confidence: float = Field(default=0.95, gt=0, lt=1)
    """Share of the draws inside an interval, 0..1."""

    @model_validator(mode="after")
    def _ascending(self) -> "MetricsConfig":
        if self.shot_boundaries is not None:
            low, high = self.shot_boundaries
            if low >= high:
                raise ValueError(f"shot_boundaries are {low} and {high}; the first must be lower")
        if isinstance(self.threshold, float) and not 0 < self.threshold < 1:
            raise ValueError(f"threshold is {self.threshold:g}; it has to be between 0 and 1")
        return self


@dataclass(frozen=True)
class Outputs:
    """What a head says about N rows, as far as metrics need it.

    Attributes:
        targets: (N,) int64 classes, or (N, C) uint8 multi-hot.
        rows: numbers of each row, for single-label heads.
        scores: (N, C) float32 logits, for multi-label heads.
        taxonomy: levels that `rows` were scored at; None for multi-label heads.
        only_rank: whether the scores have no threshold that means anything.
        columns: classes that metrics look at, where the head has no score for the others.
    """

    targets: npt.NDArray[Any]
    rows: RowScores | None
    scores: npt.NDArray[np.float32] | None
    taxonomy: Taxonomy | None
    only_rank: bool = False
    columns: Sequence[int] | None = None


@dataclass(frozen=True)
class Scores:
    """Metrics of a split.

    Attributes:
        metrics: metric name -> share in 0..1 (or a count, for names that start with `num_`).
        per_class: C rows: class, name, group (if the dataset states it), num_train, num_rows and
            the class's own metrics, NaN for classes that the head has no score for.
        intervals: confidence intervals of the metrics that have one; empty unless asked for.
        draws: draws of rows that they rest on; 0 = none.
    """

    metrics: dict[str, float]
    per_class: pd.DataFrame
    intervals: Intervals = field(default_factory=dict)
    draws: int = 0


@dataclass(frozen=True)
class Scored:
    """A part of a cache that a head was scored on.

    Attributes:
        name: of its rows, such as `test` or `train (held out)`.
        outputs: what the head says.
        scores: metrics of it.
    """

    name: str
    outputs: Outputs
    scores: Scores


def score_part(
    head: Head,
    table: FeatureTables,
    part: Part,
    classes: pd.DataFrame,
    options: MetricsConfig,
    calibration: Calibration | None = None,
) -> Scored:
    """All metrics of a head on the rows of `part`; see `collect` and `summarise`."""
    outputs = collect(head, table, part, classes, options, calibration)
    return Scored(part.name, outputs, summarise(outputs, classes, options, calibration))


def with_intervals(
    scored: Scored,
    classes: pd.DataFrame,
    options: MetricsConfig,
    calibration: Calibration | None = None,
) -> Scored:
    """The same with confidence intervals, if they were asked for or cost about a second at most.

    Args:
        scored: see `score_part`, and its other arguments.
        classes: class table.
        options: as counted.
        calibration: as collected.
    """
    outputs = scored.outputs
    values = outputs.targets.size * (_SINGLE_LABEL_PASSES if outputs.rows is not None else 1)
    if scored.scores.intervals or values * _USUAL_DRAWS > _CHEAP_VALUES:
        return scored
    options = options.model_copy(update={"bootstrap": _USUAL_DRAWS})
    return replace(scored, scores=summarise(outputs, classes, options, calibration))


@torch.inference_mode()
def calibrate(head: Head, table: FeatureTables, part: Part, seed: int) -> Calibration | None:
    """Temperature and thresholds from validation rows; None for heads whose scores only rank.

    Args:
        head: on the table's device, in evaluation mode.
        table: features of `part.rows`.
        part: validation rows with targets: neither trained on nor reported.
        seed: which rows are taken where there are more than a temperature needs.
    """
    if not head.has_probabilities:
        return None
    if part.targets.ndim == 2:
        spans = table.spans(part.targets.shape[1])
        scores = [head(*table.slice(*span)).float().cpu().numpy() for span in spans]
        columns = head.scored_classes
        if columns is None:
            return fit_multi_label(np.concatenate(scores), part.targets, part.name)
        own = list(columns)
        found = fit_multi_label(np.concatenate(scores)[:, own], part.targets[:, own], part.name)
        thresholds = np.full(part.targets.shape[1], 0.5)
        thresholds[own] = found.threshold_array()
        return replace(found, thresholds=thresholds.tolist())
    num_classes = head(*table.slice(0, 1)).shape[1]
    chosen = torch.from_numpy(chosen_rows(len(part), num_classes, seed))
    pieces = (chosen[start : start + 4096] for start in range(0, len(chosen), 4096))
    logits = torch.cat([head(*table.batch(rows)).float() for rows in pieces])
    labels = torch.from_numpy(part.targets).to(table.device)[chosen.to(table.device)]
    return fit_single_label(logits, labels, part.name)


@torch.inference_mode()
def collect(
    head: Head,
    table: FeatureTables,
    part: Part,
    classes: pd.DataFrame,
    options: MetricsConfig,
    calibration: Calibration | None = None,
) -> Outputs:
    """What a head says about the rows of `part`.

    Args:
        head: on the table's device, in evaluation mode.
        table: features of `part.rows`.
        part: rows with targets.
        classes: class table, C rows.
        options: see `MetricsConfig`.
        calibration: temperature for calibrated probabilities; None = as trained.

    Raises:
        ConfigError: if a taxonomy level is not in the class table.
        RunError: if a score is NaN or infinite.
    """
    batches = (
        (finite(head(*table.slice(*span)), span), part.targets[slice(*span)])
        for span in table.spans(len(classes))
    )
    columns = head.scored_classes
    return gather(
        batches,
        classes,
        options,
        calibration,
        only_rank=not head.has_probabilities,
        columns=columns,
    )


def gather(
    batches: Iterable[tuple[Tensor, npt.NDArray[Any]]],
    classes: pd.DataFrame,
    options: MetricsConfig,
    calibration: Calibration | None = None,
    *,
    only_rank: bool = False,
    columns: Sequence[int] | None = None,
) -> Outputs:
    """What metrics need of logits, batch by batch; see `collect`.

    Args:
        batches: at least one: (b, C) finite logits, and the (b,) int64 or (b, C) uint8 targets of
            these rows.
        classes: class table, C rows.
        options: see `MetricsConfig`.
        calibration: see `collect`.
        only_rank: see `Outputs`.
        columns: likewise.

    Raises:
        ConfigError: if a taxonomy level is not in the class table.
    """
    try:
        taxonomy = Taxonomy.from_classes(classes, options.levels)
    except KeyError as error:
        raise ConfigError(
            f"metrics.levels: no column {error.args[0]!r} in the class table; "
            f"it has {', '.join(map(str, classes.columns))}"
        ) from None
    temperature = 1.0 if calibration is None else calibration.temperature
    targets, rows, scores = [], [], []
    for logits, own in batches:
        targets.append(own)
        if own.ndim == 2:
            scores.append(logits.float().cpu().numpy())
            continue
        labels = torch.from_numpy(own).to(logits.device)
        rows.append(metrics.score_rows(logits, labels, taxonomy, temperature))
    known = np.concatenate(targets)
    if scores:
        return Outputs(known, None, np.concatenate(scores), None, only_rank, columns)
    return Outputs(known, RowScores.concatenate(rows), None, taxonomy)


def summarise(
    outputs: Outputs,
    classes: pd.DataFrame,
    options: MetricsConfig,
    calibration: Calibration | None = None,
) -> Scores:
    """Metrics of what a head said.

    With a calibration, `ece_calibrated` is that of the scaled probabilities, and a multi-label head
    has `micro_f1_searched` and `macro_f1_searched` at the thresholds of the validation rows.

    Args:
        outputs: see `collect`.
        classes: class table with the training counts that make the shot groups.
        options: see `MetricsConfig`.
        calibration: as given to `collect`.

    Raises:
        RunError: if searched thresholds are asked for and there are none.
    """
    counts = classes["count"].to_numpy(np.int64)
    boundaries = options.shot_boundaries or BOUNDARIES
    groups = stated_groups(classes) if options.shot_boundaries is None else None
    draw = {"num": options.bootstrap, "seed": options.bootstrap_seed}
    replicates: bootstrap.Replicates = {}
    if outputs.rows is not None:
        rows = outputs.rows
        values = metrics.single_label_metrics(rows, counts, boundaries, outputs.taxonomy, groups)
        if calibration is not None:
            values["ece_calibrated"] = metrics.expected_calibration_error(
                rows.calibrated, rows.rank == 0
            )
        if options.bootstrap:
            replicates = bootstrap.single_label_replicates(
                rows, counts, boundaries, outputs.taxonomy, groups, **draw
            )
        table = _single_label_table(rows, classes)
    else:
        scores, targets = outputs.scores, outputs.targets
        assert scores is not None, "neither rows nor scores"
        predicted = predicted_classes(outputs, options, calibration)
        table = _multi_label_table(scores, targets, classes, predicted)
        if outputs.columns is not None:
            own = list(outputs.columns)
            scores, targets, counts = scores[:, own], targets[:, own], counts[own]
            table.loc[~table["class"].isin(own), table.columns.isin(_CLASS_METRICS)] = np.nan
            predicted = None if predicted is None else predicted[:, own]
            groups = None if groups is None else [groups[index] for index in own]
            if calibration is not None:
                thresholds = calibration.threshold_array()[own].tolist()
                calibration = replace(calibration, thresholds=thresholds)
        values = metrics.multi_label_metrics(scores, targets, counts, boundaries, None, groups)
        if not outputs.only_rank:
            values["ece"] = metrics.multi_label_calibration_error(scores, targets)
        counted = slice(None) if options.top_k is None else targets.any(1)
        if predicted is not None and len(targets[counted]):
            values |= metrics.threshold_metrics(predicted[counted], targets[counted])
        if calibration is not None:
            values |= _calibrated_metrics(scores, targets, calibration)
        if options.bootstrap:
            shown = predicted if options.top_k is None else None
            replicates = bootstrap.multi_label_replicates(
                scores, targets, counts, boundaries, groups, shown, **draw
            )
    intervals = bootstrap.percentile_intervals(replicates, options.confidence)
    known = {name: ends for name, ends in intervals.items() if name in values}
    return Scores(values, table, known, options.bootstrap)


def predicted_classes(
    outputs: Outputs, options: MetricsConfig, calibration: Calibration | None
) -> npt.NDArray[np.bool_] | None:
    """(N, C) what counts as predicted by a multi-label head; None = its scores only rank.

    Raises:
        RunError: if searched thresholds are asked for and there are none.
    """
    scores = outputs.scores
    assert scores is not None, "not multi-label"
    if options.top_k is not None:
        return metrics.best_classes(scores, options.top_k)
    if outputs.only_rank:
        return None
    if options.threshold != "searched":
        return metrics.predictions(scores, options.threshold)
    if calibration is None or calibration.thresholds is None:
        raise RunError(
            "metrics.threshold=searched: this run holds no searched thresholds of these weights "
            "and classes; train it again, or give a probability such as 0.5"
        )
    return metrics.predictions(scores, calibration.threshold_array(), calibration.temperature)


def metrics_table(values: Mapping[str, float], intervals: Intervals | None = None) -> str:
    """Metrics as aligned lines: shares in percent, counts as they are; says what is left out."""
    width = max(len(name) for name in values)
    lines = []
    for name, value in values.items():
        line = f"  {name:<{width}}  "
        line += f"{value:>8}" if name.startswith("num_") else f"{value:8.2%}"
        if intervals and name in intervals:
            low, high = intervals[name]
            line += f"   {low:7.2%} ..{high:8.2%}"
        lines.append(line)
    if "map" in values and "micro_f1" not in values:
        lines.append(
            "  no precision, recall and F1: plain cosines say which class is likelier, not from "
            "where on it is present; --head.cosine_threshold of heads.train says that, "
            "--metrics.top_k K counts the K best"
        )
    return "\n".join(lines)


def finite(logits: Tensor, span: tuple[int, int]) -> Tensor:
    """The logits, if none is NaN or infinite.

    Raises:
        RunError: otherwise, naming the rows `span`.
    """
    if not torch.isfinite(logits).all():
        raise RunError(
            f"a score of rows {span[0]}..{span[1]} is NaN or infinite; the head diverged, train it "
            "again with a lower optim.lr"
        )
    return logits


def _calibrated_metrics(
    scores: npt.NDArray[np.float32], targets: npt.NDArray[np.uint8], calibration: Calibration
) -> dict[str, float]:
    temperature = calibration.temperature
    predicted = metrics.predictions(scores, calibration.threshold_array(), temperature)
    found = metrics.threshold_metrics(predicted, targets)
    return {
        "ece_calibrated": metrics.multi_label_calibration_error(scores, targets, temperature),
        "micro_f1_searched": found["micro_f1"],
        "macro_f1_searched": found["macro_f1"],
    }


def _single_label_table(rows: RowScores, classes: pd.DataFrame) -> pd.DataFrame:
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
    predicted: npt.NDArray[np.bool_] | None,
) -> pd.DataFrame:
    support = targets.sum(0, dtype=np.int64)
    ranked = {"average_precision": metrics.average_precision(scores, targets)}
    if predicted is None:
        return _class_table(classes, support, ranked)
    precision, recall, f1 = metrics.precision_recall_f1(predicted, targets)
    counted = {"precision": precision, "recall": recall, "f1": f1}
    return _class_table(classes, support, {"num_predicted": predicted.sum(0), **ranked, **counted})


def _class_table(
    classes: pd.DataFrame, support: npt.NDArray[np.int64], columns: Mapping[str, npt.NDArray[Any]]
) -> pd.DataFrame:
    head = {"class": np.arange(len(classes)), "name": classes["name"].to_numpy()}
    groups = stated_groups(classes)
    stated = {} if groups is None else {"group": groups}
    counts = {"num_train": classes["count"].to_numpy(), "num_rows": support}
    return pd.DataFrame(head | stated | counts | dict(columns))
