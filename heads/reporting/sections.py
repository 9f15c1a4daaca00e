"""Sections of a run's page, from its scores and what lies in its folder."""

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from featcache.reporting import page, style
from featcache.reporting.page import Section
from featcache.shot_groups import BOUNDARIES, group_names, stated_groups
from heads import pictures
from heads.calibration import Calibration
from heads.metrics import Taxonomy
from heads.reporting import class_bars, label_graph, modality_weights, reliability, taxon_confusion
from heads.scoring import Intervals, Outputs, Scored

_MOST_LISTED = 2000
_SHOWN_CONFUSIONS = 15
_MOST_STATEMENTS = 2_000_000
"""Statements in a reliability diagram, at most; beyond, rows are taken at even steps."""


def metric_section(
    columns: Sequence[tuple[str, Mapping[str, float], Intervals]], confidence: float, draws: int
) -> Section:
    """Every metric of every part; intervals where there are any.

    Args:
        columns: name of the rows, their metrics, and intervals of these (empty = none).
        confidence: share of the draws in an interval, 0..1.
        draws: how many there were; 0 = none.
    """
    header = ["metric"]
    for name, _, intervals in columns:
        header += [name, f"{confidence:.0%} interval"] if intervals else [name]
    rows = []
    for metric in dict.fromkeys(metric for _, values, _ in columns for metric in values):
        row = [metric]
        for _, values, intervals in columns:
            row.append(_value(metric, values[metric]) if metric in values else "")
            if intervals:
                ends = intervals.get(metric)
                row.append("" if ends is None else f"{ends[0]:.2%} .. {ends[1]:.2%}")
        rows.append(row)
    body = page.table(header, rows, numbers=range(1, len(header)))
    if draws:
        body += page.paragraph(
            f"Intervals: {draws:,} draws of the rows with replacement. They say how the figures "
            "would move on other rows of this kind, not how another training would differ.",
            note=True,
        )
    return Section("metrics", "Metrics", body)


def curve_section(history: Sequence[Mapping[str, Any]], metric: str, best_epoch: int) -> Section:
    """Loss, validation metric and learning rate over epochs."""
    made = pictures.curves(history, "", metric, best_epoch)
    text = f"loss, validation {metric} and learning rate over {len(history)} epochs"
    return Section("training", "Training", page.chart(style.data_uri(made), text))


def monitor_section(monitors: Mapping[str, Mapping[str, float]], metric: str) -> Section:
    """What parts of a head score alone.

    Args:
        monitors: by name of the rows, metric of each part.
        metric: what it is.
    """
    parts = dict.fromkeys(name for found in monitors.values() for name in found)
    columns = list(monitors.values())
    rows = [
        [name, *(_value(metric, found[name]) if name in found else "" for found in columns)]
        for name in parts
    ]
    body = page.table([f"{metric} of", *monitors], rows, numbers=range(1, len(monitors) + 1))
    return Section("parts", "Parts alone", body)


def class_section(
    part: Scored, classes: pd.DataFrame, boundaries: tuple[int, int] | None
) -> Section:
    """Bars of every class, and the table with a line a class."""
    table = part.scores.per_class
    metric = "accuracy" if "accuracy" in table.columns else "average_precision"
    counts = classes["count"].to_numpy(np.int64)
    names = [str(name).replace("_", " ") for name in classes["name"]]
    groups = class_groups(classes, boundaries)
    values = table[metric].to_numpy(np.float64)
    label = metric.replace("_", " ")
    text = f"{label} of each class on {part.name}, by number of training images"
    made = class_bars.draw(values, counts, groups, names, label)
    body = page.chart(style.data_uri(made), text)
    if np.isnan(values).any():
        missing = int(np.isnan(values).sum())
        body += page.paragraph(f"Classes without rows ({missing:,}) are marked by a cross.", True)
    if len(table) <= _MOST_LISTED:
        shown = table.assign(name=names, group=groups).sort_values(
            "num_train", ascending=False, kind="stable"
        )
        columns = ["name", "group", *(c for c in table.columns if c not in _HIDDEN)]
        rows = [[_cell(value) for value in row] for row in shown[columns].itertuples(index=False)]
        header = [name.replace("_", " ") for name in columns]
        listing = page.table(header, rows, numbers=range(2, len(columns)))
        body += page.folded("All classes as a table", listing)
    return Section("classes", "Classes", body)


_HIDDEN = {"class", "name", "group"}


def confusion_section(part: Scored, classes: pd.DataFrame, taxa: bool) -> Section:
    """What a single-label head takes for what: classes, taxa, the largest confusions.

    Args:
        part: what is shown.
        classes: class table.
        taxa: draw each level of the taxonomy too.
    """
    rows, taxonomy = part.outputs.rows, part.outputs.taxonomy or Taxonomy({})
    assert rows is not None, "not single-label"
    names = [str(name).replace("_", " ") for name in classes["name"]]
    wrong = rows.label != rows.predicted
    body = page.paragraph(f"{int(wrong.sum()):,} of {len(rows):,} rows of {part.name} are wrong.")
    if not wrong.any():
        return Section("confusion", "Confusion", body)
    if taxonomy.codes:
        shares = [
            f"{_same(code, rows.label[wrong], rows.predicted[wrong]):.0%} are of the right {level}"
            for level, code in taxonomy.codes.items()
        ]
        body += page.paragraph(f"Of the wrong answers, {', '.join(shares)}.")
    some = len(names) > taxon_confusion.MOST_DRAWN
    made = taxon_confusion.draw_classes(rows.label, rows.predicted, names, taxonomy.codes)
    text = "Classes in the order of their taxonomy" if taxonomy.codes else "Classes"
    text += f"; the {taxon_confusion.MOST_DRAWN} with the largest confusions" if some else ""
    if taxonomy.codes:
        text += f"; frames: the same {' and '.join(list(taxonomy.codes)[:2])}"
    body += page.paragraph(f"{text}. Shares of the true class.", note=True)
    body += page.chart(style.data_uri(made), text, narrow=len(names) <= 20)
    for level, code in taxonomy.codes.items() if taxa else ():
        named = _taxon_names(classes[level], code)
        if 2 <= len(named) < len(names):
            drawn = taxon_confusion.draw_taxa(rows.label, rows.predicted, code, named)
            picture = page.chart(style.data_uri(drawn), f"confusion of {level}", narrow=True)
            body += page.folded(f"By {level} ({len(named):,})", picture)
    listing = [
        [names[true], names[taken], num, f"{num / max(int((rows.label == true).sum()), 1):.0%}"]
        for true, taken, num in taxon_confusion.largest(
            rows.label, rows.predicted, _SHOWN_CONFUSIONS
        )
    ]
    header = ["true", "predicted", "rows", "of the class"]
    body += "<h3>Largest confusions</h3>\n" + page.table(header, listing, numbers=[2, 3])
    return Section("confusion", "Confusion", body)


def calibration_section(part: Scored, calibration: Calibration) -> Section:
    """Reliability as trained and at the fitted temperature; searched thresholds."""
    confidences, correct = statements(part.outputs, calibration)
    made = reliability.draw(confidences, correct)
    text = (
        f"Temperature {calibration.temperature:.3g}, fitted on {calibration.num_rows:,} rows of "
        f"{calibration.split}: negative log-likelihood {calibration.nll_before:.4f} before, "
        f"{calibration.nll_after:.4f} after; calibration error {calibration.ece_before:.1%} and "
        f"{calibration.ece_after:.1%} there. Shown: {part.name}."
    )
    body = page.paragraph(text) + page.chart(style.data_uri(made), text)
    if calibration.thresholds is not None:
        assert calibration.micro_f1_before is not None, "multi-label"
        assert calibration.micro_f1_after is not None, "multi-label"
        values = calibration.threshold_array()
        body += page.paragraph(
            f"Thresholds searched there, one a class, raise micro-F1 from "
            f"{calibration.micro_f1_before:.2%} to {calibration.micro_f1_after:.2%} on the rows "
            f"that they were searched on; they lie between {values.min():.2f} and "
            f"{values.max():.2f} (median {np.median(values):.2f})."
        )
        names = [str(name) for name in part.scores.per_class["name"]]
        if len(names) <= _MOST_LISTED:
            rows = [[n, f"{t:.2f}"] for n, t in zip(names, calibration.thresholds, strict=True)]
            listing = page.table(["class", "threshold"], rows, numbers=[1])
            body += page.folded("All thresholds", listing)
    return Section("calibration", "Calibration", body)


def statements(
    outputs: Outputs, calibration: Calibration
) -> tuple[Mapping[str, npt.NDArray[np.floating]], npt.NDArray[np.bool_]]:
    """Probabilities before and after scaling, by name, and which of the statements are true."""
    if outputs.rows is not None:
        rows = outputs.rows
        return {"as trained": rows.confidence, "calibrated": rows.calibrated}, rows.rank == 0
    assert outputs.scores is not None, "neither rows nor scores"
    own = slice(None) if outputs.columns is None else list(outputs.columns)
    step = max(1, outputs.scores[:, own].size // _MOST_STATEMENTS)
    scores = outputs.scores[::step, own].astype(np.float64)
    found: dict[str, npt.NDArray[np.floating]] = {
        name: (0.5 * (1 + np.tanh(0.5 * scores / temperature))).ravel()
        for name, temperature in (("as trained", 1.0), ("calibrated", calibration.temperature))
    }
    return found, (outputs.targets[::step, own] > 0).ravel()


def modality_section(
    weights: npt.NDArray[np.floating], names: Sequence[str], where: str
) -> Section:
    """How a head that weighs modalities spreads its trust over the rows."""
    made = modality_weights.draw(weights, names)
    text = f"Weight of each modality in each of the {len(weights):,} rows of {where}."
    missing = weights.sum(1) == 0
    if missing.any():
        text += f" {int(missing.sum()):,} rows have none of them."
    chart = page.chart(style.data_uri(made), text, narrow=len(names) <= 2)
    return Section("modalities", "Modalities", page.paragraph(text) + chart)


def graph_section(
    edges: npt.NDArray[np.floating],
    classes: pd.DataFrame,
    boundaries: tuple[int, int] | None,
) -> Section:
    """The graph of labels that a head passes messages on."""
    names = [str(name) for name in classes["name"]]
    made = label_graph.draw(edges, names, class_groups(classes, boundaries))
    off = edges.copy()
    np.fill_diagonal(off, 0)
    text = (
        f"{int((off > 0).sum()):,} edges between {len(names):,} labels; the heavier, the wider. "
        "Blue: head classes, green: medium, orange: tail."
    )
    if len(names) > label_graph.MOST_LABELS:
        text += f" Drawn: the {label_graph.MOST_LABELS} labels with the heaviest edges."
    chart = page.chart(style.data_uri(made), text, narrow=True)
    return Section("graph", "Label graph", page.paragraph(text) + chart)


def option_section(config: Mapping[str, Any], record: Mapping[str, Any]) -> Section:
    """What was trained with what: all options, cache, versions."""
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td><code>{escape(value)}</code></td></tr>\n"
        for name, value in _leaves(config)
    )
    body = f"<table><tbody>{rows}</tbody></table>\n"
    cache = record["cache"]
    body += page.paragraph(
        f"Trained on {cache['path']}, fingerprint {cache['fingerprint']}. Written with "
        f"{', '.join(f'{name} {version}' for name, version in record['versions'].items())}.",
        note=True,
    )
    return Section("options", "Options", body)


def class_groups(classes: pd.DataFrame, boundaries: tuple[int, int] | None) -> list[str]:
    """C of head, medium, tail: as the dataset states them, unless boundaries are given."""
    stated = stated_groups(classes) if boundaries is None else None
    counts = classes["count"].to_numpy(np.int64)
    return group_names(counts, boundaries or BOUNDARIES) if stated is None else stated


def _same(
    code: npt.NDArray[np.int64], true: npt.NDArray[np.int64], taken: npt.NDArray[np.int64]
) -> float:
    known = code[true] >= 0
    return float((code[true] == code[taken])[known].mean()) if known.any() else 0.0


def _taxon_names(column: "pd.Series[Any]", code: npt.NDArray[np.int64]) -> list[str]:
    names = [""] * (int(code.max(initial=-1)) + 1)
    for name, number in zip(column, code.tolist(), strict=True):
        if number >= 0:
            names[number] = str(name)
    return names


def _value(name: str, value: float) -> str:
    return f"{value:,}" if name.startswith("num_") else f"{value:.2%}"


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        return "" if np.isnan(value) else f"{value:.1%}"
    return value


def _leaves(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, "unset" if value is None else str(value)
