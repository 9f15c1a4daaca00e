"""Pictures of trainings: curves of one run, bars that compare several."""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from heads.metrics import LEVELS
from heads.run_folder import RunError, read_json, write_atomic

PALETTE = ("#2f6690", "#e07a2f", "#3a9d6e", "#b5446e", "#7a5bb0", "#8a8d91", "#c9a227", "#16425b")
_INK, _MUTED, _GRID = "#22303c", "#66727d", "#e3e7eb"

_TITLES = {
    "top1": "top-1",
    "top5": "top-5",
    "map": "mAP",
    "balanced_accuracy": "balanced",
    "micro_f1": "micro F1",
    "macro_f1": "macro F1",
    "top1_head": "many-shot",
    "top1_medium": "medium-shot",
    "top1_tail": "few-shot",
    "map_head": "mAP many-shot",
    "map_medium": "mAP medium-shot",
    "map_tail": "mAP few-shot",
}
_SINGLE = ("top1", "top5", "balanced_accuracy", "top1_head", "top1_medium", "top1_tail")
_MULTI = ("map", "map_head", "map_medium", "map_tail", "micro_f1", "macro_f1")


def draw_curves(
    history: Sequence[Mapping[str, Any]],
    path: str | Path,
    title: str,
    metric: str,
    best_epoch: int | None = None,
) -> None:
    """Writes the curves of a training as a PNG; see `curves`."""
    _write(curves(history, title, metric, best_epoch), path)


def curves(
    history: Sequence[Mapping[str, Any]], title: str, metric: str, best_epoch: int | None = None
) -> Figure:
    """Loss, validation metric and learning rate over epochs.

    The validation loss stands beside the training loss where it was recorded, and what a head has
    monitored (each modality alone, each stage) beside the validation metric.

    Args:
        history: records with epoch, loss, lr and `val_<metric>`, as in history.jsonl.
        title: line above it; "" = none.
        metric: name of the validation metric.
        best_epoch: the one that was picked, counted from 1; 0 = what training began with, which is
            not drawn; None = the best by validation.
    """
    epochs = np.asarray([line["epoch"] for line in history])
    values = np.asarray([line[f"val_{metric}"] for line in history])
    loss_name = "best_loss" if "best_loss" in history[0] else "loss"
    losses = np.asarray([line[loss_name] for line in history])
    rates = np.asarray([line["lr"] for line in history])
    picked = int(values.argmax()) if best_epoch is None else int((epochs == best_epoch).argmax())
    figure = _figure((11.0, 3.6))
    left, middle, right = figure.subplots(1, 3)
    marker = "o" if len(epochs) < 3 else None

    left.plot(epochs, losses, color=PALETTE[0], lw=2, marker=marker, label="training")
    drawn = losses
    if all("val_loss" in line for line in history):
        held_out = np.asarray([line["val_loss"] for line in history])
        left.plot(epochs, held_out, color=PALETTE[1], lw=1.6, marker=marker, label="validation")
        _legend(left)
        drawn = np.concatenate([losses, held_out])
    if drawn.min() > 0 and drawn.max() / drawn.min() > 20:
        left.set_yscale("log")
    _dress(left, "loss" if len(drawn) > len(losses) else "training loss")

    watched = list(history[-1].get("monitors", {}))
    low, high = float(values.min()), float(values.max())
    for index, name in enumerate(watched):
        line = np.asarray([record.get("monitors", {}).get(name, np.nan) for record in history])
        middle.plot(epochs, line, color=PALETTE[3 + index % 5], lw=1.2, marker=marker, label=name)
        low, high = min(low, float(np.nanmin(line))), max(high, float(np.nanmax(line)))
    middle.plot(epochs, values, color=PALETTE[2], lw=2, marker=marker, label="whole head")
    if best_epoch != 0:
        middle.plot(epochs[picked], values[picked], "o", color=PALETTE[1], ms=7, zorder=3)
    if watched:
        _legend(middle)
    room = max(high - low, 0.01)
    middle.set_ylim(max(0.0, low - 0.08 * room), high + 0.25 * room)
    after = picked < 0.6 * len(epochs)
    middle.annotate(
        f"{values[picked]:.2%} at epoch {epochs[picked]}" if best_epoch != 0 else "",
        (epochs[picked], values[picked]),
        xytext=(8 if after else -8, 8),
        textcoords="offset points",
        ha="left" if after else "right",
        color=_INK,
        fontsize=9.5,
    )
    middle.yaxis.set_major_formatter(_percent(room))
    _dress(middle, f"validation {_TITLES.get(metric, metric)}")

    right.plot(epochs, rates, color=PALETTE[4], lw=2, marker=marker)
    right.set_ylim(0, rates.max() * 1.1)
    right.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    right.yaxis.get_offset_text().set_color(_MUTED)
    _dress(right, "learning rate at the end of the epoch")
    for axes in (left, middle, right):
        axes.set_xlabel("epoch", color=_MUTED)
        axes.xaxis.get_major_locator().set_params(integer=True)
    if title:
        _title(figure, title)
    return figure


def comparison(runs: Sequence[str | Path]) -> list[dict[str, Any]]:
    """One record a run: run, head, cache, split, seconds, num_parameters, and every metric.

    Metrics are those of the test rows, or of the validation rows where there are none.

    Raises:
        RunError: if a run folder is missing or unfinished.
    """
    records = []
    for path in map(Path, runs):
        values = read_json(path / "metrics.json")
        head = read_json(path / "head.json")
        part = "test" if "test" in values else "val"
        records.append(
            {
                "run": path.name,
                "head": head["kind"],
                "cache": Path(head["cache"]["path"]).name,
                "split": part,
                "seconds": values["seconds"],
                "num_parameters": values["num_parameters"],
            }
            | values[part]
        )
    return records


def comparison_table(runs: Sequence[str | Path]) -> str:
    """The comparison as an aligned Markdown table, one line a run."""
    records = comparison(runs)
    names = compared_metrics(records)
    titles = ["head", "split", *(_TITLES.get(name, name) for name in names), "trained", "seconds"]
    lines = [
        [
            _label(record, records),
            record["split"],
            *(f"{record[name]:.2%}" if name in record else "-" for name in names),
            f"{record['num_parameters']:,}",
            f"{record['seconds']:.1f}",
        ]
        for record in records
    ]
    widths = [max(map(len, column)) for column in zip(titles, *lines, strict=True)]
    left = {0, 1}

    def row(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if index in left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = [
        "-" * width if index in left else "-" * (width - 1) + ":"
        for index, width in enumerate(widths)
    ]
    return "\n".join([row(titles), row(rule), *map(row, lines)])


def compared_metrics(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """The metrics worth comparing, among those that any record has: totals, groups, taxa."""
    held = {name for record in records for name in record}
    wanted = (*_SINGLE, *LEVELS) if "top1" in held else _MULTI
    names = [name for name in wanted if name in held]
    groups = [name for name in names if name.endswith(("_head", "_medium", "_tail"))]
    return names if len(groups) != 1 else [name for name in names if name not in groups]


def compare_runs(runs: Sequence[str | Path], path: str | Path, title: str = "") -> None:
    """Writes bars of every compared metric, one colour a run, as a PNG.

    Args:
        runs: run folders of the same task.
        path: where the picture goes.
        title: line above it; default the caches' names.

    Raises:
        RunError: if a run folder is missing or unfinished, or single- and multi-label are mixed.
    """
    records = comparison(runs)
    if not records or len({"top1" in record for record in records}) > 1:
        raise RunError("compare_runs needs at least one run, all single-label or all multi-label")
    names = compared_metrics(records)
    taxa = [name for name in names if name in LEVELS]
    if taxa:
        taxa = ["top1", *taxa]
    panels = [("", [name for name in names if name not in LEVELS]), ("taxonomy", taxa)]
    panels = [(label, group) for label, group in panels if group]
    widths = [len(group) for _, group in panels]
    bars = sum(widths) * len(records)
    figure = _figure((min(14.0, max(6.0, 2.2 + 0.42 * bars + 0.5 * sum(widths))), 4.2))
    all_axes = figure.subplots(1, len(panels), width_ratios=widths, squeeze=False)[0]
    width = 0.8 / len(records)
    for axes, (label, group) in zip(all_axes, panels, strict=True):
        for index, record in enumerate(records):
            known = [position for position, name in enumerate(group) if name in record]
            heights = [record[group[position]] for position in known]
            places = np.asarray(known) + (index - (len(records) - 1) / 2) * width
            drawn = axes.bar(
                places,
                heights,
                width * 0.92,
                color=PALETTE[index % len(PALETTE)],
                label=_label(record, records),
                zorder=2,
            )
            axes.bar_label(
                drawn,
                [f"{100 * height:.1f}" for height in heights],
                fontsize=8,
                color=_INK,
                padding=2,
                rotation=90 if len(records) > 4 else 0,
            )
        titles = dict(_TITLES, top1="species" if label == "taxonomy" else "top-1")
        axes.set_xticks(range(len(group)), [titles.get(name, name) for name in group])
        axes.set_xlim(-0.6, len(group) - 0.4)
        axes.set_ylim(0, 1.08)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        _dress(axes, label or f"{records[0]['split']} rows")
        axes.grid(visible=False, axis="x")
        axes.tick_params(axis="x", length=0, labelcolor=_INK)
    handles, labels = all_axes[0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=min(len(labels), 5),
        frameon=False,
        fontsize=10,
        labelcolor=_INK,
    )
    caches = " / ".join(dict.fromkeys(record["cache"] for record in records))
    _title(figure, title or caches)
    _write(figure, path)


def _label(record: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> str:
    """The head's kind, or the run's name where several runs have that kind."""
    same = [other for other in records if other["head"] == record["head"]]
    return str(record["head"] if len(same) == 1 else record["run"])


def _figure(size: tuple[float, float]) -> Figure:
    figure = Figure(figsize=size, dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _dress(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, color=_INK, pad=10)
    axes.grid(visible=True, color=_GRID, lw=0.8, zorder=0)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_MUTED, labelsize=9, length=3)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_GRID)


def _legend(axes: Axes) -> None:
    axes.legend(frameon=False, fontsize=8.5, labelcolor=_INK, handlelength=1.4)


def _title(figure: Figure, title: str) -> None:
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold", color=_INK)


def _percent(room: float) -> PercentFormatter:
    return PercentFormatter(1.0, decimals=max(0, 1 - math.floor(math.log10(100 * room))))


def _write(figure: Figure, path: str | Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_atomic(Path(path), buffer.getvalue())
