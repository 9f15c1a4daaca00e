"""Frozen and adapted backbones on one dataset: what heads come to, as a table, picture and page."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from featcache.precision import resolve_device
from featcache.reporting import page, style
from featcache.reporting.page import Fact, Section
from finetune.tuning.report import METRIC_TITLES
from heads.compare import Difference, compare, require_same_rows
from heads.evaluate import choose_split, open_known, outputs_of
from heads.progress import duration
from heads.run_folder import load_run, read_json, write_atomic
from heads.scoring import MetricsConfig

DRAWS = 1000
"""Of the bootstrap behind the intervals."""


@dataclass(frozen=True)
class Stage:
    """One backbone and what was trained on it.

    Attributes:
        name: what it is called, e.g. frozen or lora.
        zero_shot: run folder of a zero-shot head on its cache.
        linear: run folder of a linear head on its cache.
        adapted: folder that finetune.train wrote; None for the frozen one.
    """

    name: str
    zero_shot: Path
    linear: Path
    adapted: Path | None = None


@dataclass(frozen=True)
class Line:
    """A stage in numbers: shares in 0..1, None where there is no such thing.

    Attributes:
        name: of the stage.
        metric: top1 or map.
        zero_shot: test metric by class names.
        end_to_end: test metric of the head that was trained together with the backbone.
        linear: test metric of the linear head on the stage's cache.
        linear_val: its validation metric.
        gain: of that head over the frozen stage's, on the same test rows; None for that one.
        adapter_parameters: numbers trained in the backbone.
        seconds: of adapting it.
        epochs: of adapting it.
    """

    name: str
    metric: str
    zero_shot: float
    end_to_end: float | None
    linear: float
    linear_val: float
    gain: Difference | None
    adapter_parameters: int
    seconds: float | None
    epochs: int | None


def measure(stages: Sequence[Stage], device: str = "auto") -> list[Line]:
    """The stages in numbers; the first is the one that the others are compared with.

    Raises:
        UserError: if a folder is missing or unfinished, or rows differ.
    """
    return [_line(stage, None if stage is stages[0] else stages[0], device) for stage in stages]


def _line(stage: Stage, base: Stage | None, device: str) -> Line:
    head, zero_shot = (read_json(run / "metrics.json") for run in (stage.linear, stage.zero_shot))
    metric = head["metric"]
    tuned = None if stage.adapted is None else read_json(stage.adapted / "metrics.json")
    part = "test" if "test" in head else "val"
    return Line(
        name=stage.name,
        metric=metric,
        zero_shot=zero_shot[part][metric],
        end_to_end=None if tuned is None else tuned.get(f"{part}_acc_cls"),
        linear=head[part][metric],
        linear_val=head["val"][metric],
        gain=None if base is None else difference(stage.linear, base.linear, metric, device),
        adapter_parameters=0 if tuned is None else tuned["num_adapter_parameters"],
        seconds=None if tuned is None else tuned["seconds"],
        epochs=None if tuned is None else tuned["epochs"],
    )


def difference(run: Path, other: Path, metric: str, device: str = "auto") -> Difference:
    """`run` minus `other`, each on the cache it was trained on, over the same rows by id.

    Raises:
        CacheMismatchError: if the caches hold different rows.
        RunError: if a folder is missing or unfinished.
    """
    loaded = [load_run(run), load_run(other)]
    caches = [open_known(one, None, ()) for one in loaded]
    split = choose_split(caches[0])
    require_same_rows(caches[0], caches[1], split)
    options = MetricsConfig(bootstrap=DRAWS)
    where = resolve_device(device)
    outputs = [
        outputs_of(one, cache, split, options, where)[0]
        for one, cache in zip(loaded, caches, strict=True)
    ]
    return compare(outputs, loaded, split, options).differences[metric]


_COLUMNS = (
    "backbone",
    "by class names",
    "head trained with it",
    "linear head on its cache",
    "gain over frozen [95 %]",
    "numbers trained",
    "epochs",
    "adapting",
)


def table(lines: Sequence[Line]) -> str:
    """The lines as an aligned Markdown table."""
    rows = [list(_COLUMNS), *(_cells(line) for line in lines)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    texts = [
        "| "
        + " | ".join(
            cell.rjust(width) if number else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        + " |"
        for row in rows
    ]
    rule = "|".join("-" * (w + 1) + ":" if i else "-" * (w + 2) for i, w in enumerate(widths))
    return "\n".join([texts[0], f"|{rule}|", *texts[1:]])


def _cells(line: Line) -> list[str]:
    gain = line.gain
    return [
        line.name,
        f"{line.zero_shot:.1%}",
        "" if line.end_to_end is None else f"{line.end_to_end:.1%}",
        f"{line.linear:.1%}",
        ""
        if gain is None
        else f"{100 * gain.difference:+.1f} [{100 * gain.low:+.1f}, {100 * gain.high:+.1f}]",
        f"{line.adapter_parameters:,}" if line.adapter_parameters else "",
        "" if line.epochs is None else str(line.epochs),
        "" if line.seconds is None else duration(line.seconds),
    ]


def picture(lines: Sequence[Line], title: str) -> Figure:
    """Bars of the test metric by way of classifying, one group a backbone."""
    ways: tuple[tuple[str, list[float | None]], ...] = (
        ("by class names", [line.zero_shot for line in lines]),
        ("head trained with the backbone", [line.end_to_end for line in lines]),
        ("linear head on its cache", [line.linear for line in lines]),
    )
    made = style.figure(8.0, 1.3 + 0.85 * len(lines))
    axes = made.subplots()
    height = 0.8 / len(ways)
    handles = []
    for number, (label, values) in enumerate(ways):
        known = [place for place, value in enumerate(values) if value is not None]
        lengths = [float(value) for value in values if value is not None]
        at = np.asarray(known) + (number - (len(ways) - 1) / 2) * height
        handles.append(
            axes.barh(at, lengths, height * 0.9, color=style.PALETTE[number], label=label, zorder=2)
        )
        for y, length in zip(at, lengths, strict=True):
            axes.text(length + 0.005, y, f"{length:.1%}", va="center", fontsize=9, color=style.INK)
    base = lines[0].linear
    axes.axvline(base, color=style.MUTED, lw=1, ls=":", zorder=1)
    axes.set_yticks(range(len(lines)), [line.name for line in lines])
    axes.invert_yaxis()
    axes.set_xlim(0, min(1.1, 1.15 * max(max(line.linear, line.end_to_end or 0) for line in lines)))
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    style.dress(axes, title)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0, labelcolor=style.INK)
    axes.set_xlabel(
        f"test {METRIC_TITLES.get(lines[0].metric, lines[0].metric)}; dotted: frozen, linear head",
        color=style.MUTED,
        fontsize=9,
    )
    made.legend(
        handles=handles,
        loc="outside lower center",
        ncols=len(ways),
        frameon=False,
        fontsize=9.5,
        labelcolor=style.INK,
    )
    return made


def write_page(
    file: Path, lines: Sequence[Line], stages: Sequence[Stage], title: str, subtitle: str
) -> None:
    """Writes one self-contained HTML page: figures, table, costs, and where everything lies."""
    metric = METRIC_TITLES.get(lines[0].metric, lines[0].metric)
    facts = [
        Fact(f"{line.linear:.1%}", f"test {metric}, linear head on the cache of {line.name}")
        for line in lines
    ]
    body = page.chart(style.data_uri(picture(lines, "")), "Bars of the table below", narrow=True)
    body += page.table(_COLUMNS, [_cells(line) for line in lines], range(1, len(_COLUMNS)))
    body += page.paragraph(
        "Every figure is of the test rows; validation rows picked epochs and options. "
        f"Gain: the linear head on the adapted backbone's cache minus the one on the frozen "
        f"backbone's, in points, over the same test rows, with the 95 % interval of a paired "
        f"bootstrap of {DRAWS:,} draws.",
        note=True,
    )
    rows: list[list[Any]] = []
    for stage in stages:
        rows.append([stage.name, "linear head", stage.linear])
        rows.append([stage.name, "zero-shot head", stage.zero_shot])
        if stage.adapted is not None:
            rows.append([stage.name, "adapted backbone", stage.adapted])
    where = page.table(["backbone", "what", "folder"], rows)
    sections = [
        Section("comparison", "Frozen and adapted", body),
        Section("folders", "Where it is", where),
    ]
    write_atomic(file, page.page(title, subtitle, facts, sections).encode())
