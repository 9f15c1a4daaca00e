"""One self-contained page about a fine-tuning: frozen and adapted side by side, with costs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import PercentFormatter

from featcache.reporting import page, style
from featcache.reporting.page import Fact, Section
from finetune.tuning import head_folder
from finetune.tuning.examples import Material
from finetune.tuning.frozen import Frozen
from heads.calibration import read_calibration
from heads.data import FeatureTables
from heads.models.linear import Linear
from heads.parts import Part
from heads.pictures import draw_curves
from heads.progress import duration
from heads.reporting import sections
from heads.run_folder import read_json, write_atomic
from heads.scoring import MetricsConfig, score_part

FILE = "report.html"
METRIC_TITLES = {"top1": "top-1", "map": "mAP"}


def write_report(
    folder: Path,
    name: str,
    head: Linear,
    reported: Sequence[tuple[Part, FeatureTables]],
    material: Material,
    values: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
    frozen: Frozen | None,
    config: Mapping[str, Any],
    options: MetricsConfig,
) -> None:
    """Writes `report.html`, and `curves.png` of a training with validation.

    Args:
        folder: result folder, with the head's run folder in it.
        name: what the result is called.
        head: the trained one, on the device of the tables.
        reported: rows and features as the adapted backbone gives them; the last are shown.
        material: what was trained on.
        values: metrics.json.
        history: one record an epoch.
        frozen: what the adapted backbone is compared with; None = nothing.
        config: the resolved configuration, as plain values.
        options: how metrics are counted.
    """
    metric, classes = str(values["metric"]), material.classes
    own = folder / head_folder.FOLDER
    calibration = read_calibration(own)
    scored = [score_part(head, t, part, classes, options, calibration) for part, t in reported]
    main = scored[-1]
    columns = [(one.name, one.scores.metrics, one.scores.intervals) for one in scored]
    if frozen is not None:
        columns += [(f"{role}, frozen", found, {}) for role, found in frozen.metrics.items()]
    shown = [
        compare_section(values, frozen),
        sections.metric_section(columns, options.confidence, main.scores.draws),
    ]
    if values["selected_on"] == "val":  # without validation there is nothing to draw over epochs
        best = int(values["best_epoch"])
        draw_curves(history, folder / "curves.png", name, metric, best)
        shown.append(sections.curve_section(history, metric, best))
    shown.append(sections.class_section(main, classes, options.shot_boundaries))
    if main.outputs.rows is not None:
        shown.append(sections.confusion_section(main, classes, taxa=False))
    if calibration is not None:
        shown.append(sections.calibration_section(main, calibration))
    shown.append(sections.option_section(config, read_json(own / "head.json")))
    adapter = str(config["adapter"]["kind"])
    base = str(config["backbone"].get("model", config["backbone"]["kind"]))
    subtitle = f"{Path(base).name} with adapter {adapter} on {material.kind}"
    content = page.page(name, subtitle, _facts(values, frozen), shown)
    write_atomic(folder / FILE, content.encode())


def _facts(values: Mapping[str, Any], frozen: Frozen | None) -> list[Fact]:
    metric = str(values["metric"])
    title = METRIC_TITLES.get(metric, metric)
    role = "test" if any(name.startswith("test_acc") for name in values) else "val"
    role = role if any(name.startswith(f"{role}_acc") for name in values) else "train"
    facts = [
        Fact(f"{values[f'{role}_acc_{kind}']:.2%}", f"{title} by {label}, {role}")
        for kind, label in (("cls", "head"), ("txt", "class names"))
        if f"{role}_acc_{kind}" in values
    ]
    if frozen is not None and role in frozen.accuracy:
        facts.append(Fact(f"{frozen.accuracy[role]:.2%}", f"{title} of frozen features, {role}"))
    return [
        *facts,
        Fact(f"{values['num_parameters']:,}", "numbers trained"),
        Fact(f"{values['num_train_rows']:,}", "images trained on"),
        Fact(duration(values["seconds"]), f"training, {values['epochs']:,} epochs"),
    ]


def compare_section(values: Mapping[str, Any], frozen: Frozen | None) -> Section:
    """What adapting gained, and what it cost."""
    metric = str(values["metric"])
    title = METRIC_TITLES.get(metric, metric)
    series = accuracies(values, frozen)
    roles = [
        role for role in ("train", "val", "test") if any(role in one for one in series.values())
    ]
    header = [f"{title} of", *roles]
    rows = [
        [label, *(f"{found[role]:.2%}" if role in found else "" for role in roles)]
        for label, found in series.items()
    ]
    body = page.table(header, rows, numbers=range(1, len(header)))
    drawn = _draw(series, [role for role in roles if role != "train"] or roles, title)
    body += page.chart(style.data_uri(drawn), f"{title} of each way", narrow=True)
    body += "<h3>What it cost</h3>\n"
    body += page.table(
        ["", *([] if frozen is None else ["frozen"]), "adapted"], costs(values, frozen)
    )
    if frozen is None:
        text = "Give --cache, or --init_head, to see a head on frozen features beside it."
    elif frozen.extraction_seconds is None:
        text = f"The cache {frozen.cache} is gone, so what its extraction took is not known."
    else:
        each = "the last blocks forwards and backwards over the tokens of every image"
        if values["inputs"] == "pixels":
            each = "the backbone forwards over every image, and backwards as far as it is trained"
        text = (
            f"Frozen: {frozen.run}. Its cache is extracted once, for all heads; each epoch of "
            f"adapting runs {each}."
        )
    return Section("comparison", "Frozen and adapted", body + page.paragraph(text, note=True))


def accuracies(values: Mapping[str, Any], frozen: Frozen | None) -> dict[str, dict[str, float]]:
    """By way and by role: frozen features, adapted by head, adapted by class names."""
    found: dict[str, dict[str, float]] = {}
    if frozen is not None:
        found["frozen, linear head"] = dict(frozen.accuracy)
    for kind, label in (("cls", "adapted, linear head"), ("txt", "adapted, class names")):
        own = {
            r: values[f"{r}_acc_{kind}"]
            for r in ("train", "val", "test")
            if f"{r}_acc_{kind}" in values
        }
        if own:
            found[label] = own
    return found


def costs(values: Mapping[str, Any], frozen: Frozen | None) -> list[list[str]]:
    """Rows of the table of costs: what, frozen (if there is one), adapted."""
    images = values["num_train_rows"] * values["epochs"]
    adapted = {
        "numbers trained": f"{values['num_parameters']:,}",
        "on disk": f"{values['adapter_bytes'] / 1e6:,.2f} MB",
        "extraction before it": "none" if values["inputs"] == "pixels" else "the same",
        "training": f"{values['seconds']:,.1f} s",
        "training, per image and epoch": f"{values['seconds'] / images * 1e3:,.2f} ms",
        "encoding a new image": f"{1e3 / values['encoding_images_per_second']:,.2f} ms",
    }
    if frozen is None:
        return [[what, cost] for what, cost in adapted.items()]
    if values["inputs"] == "tokens":
        del adapted["encoding a new image"]  # measured from tokens, not from images
    own = {
        "numbers trained": f"{frozen.num_parameters:,}",
        "on disk": f"{frozen.num_parameters * 4 / 1e6:,.2f} MB",
        "extraction before it": "not known",
        "training": f"{frozen.seconds:,.1f} s",
        "training, per image and epoch": f"{frozen.seconds / frozen.rows_seen * 1e3:,.2f} ms",
        "encoding a new image": "not known",
    }
    if frozen.extraction_seconds is not None and frozen.extraction_images:
        each = frozen.extraction_seconds / frozen.extraction_images
        own["extraction before it"] = (
            f"{frozen.extraction_seconds:,.1f} s for {frozen.extraction_images:,} images"
        )
        own["encoding a new image"] = f"{each * 1e3:,.2f} ms"
    return [[what, own[what], cost] for what, cost in adapted.items()]


def _draw(series: Mapping[str, Mapping[str, float]], roles: Sequence[str], title: str) -> Any:
    """Bars of each way, grouped by rows."""
    made = style.figure(7.0, 2.6)
    axes = made.subplots()
    height = 0.8 / max(len(series), 1)
    colors = {"frozen, linear head": style.MUTED}
    palette = iter(style.PALETTE)
    places = np.arange(len(roles))
    for number, (label, found) in enumerate(series.items()):
        color = colors.get(label) or next(palette)
        at = places + (number - (len(series) - 1) / 2) * height
        lengths = [found.get(role, 0.0) for role in roles]
        axes.barh(at, lengths, height * 0.9, color=color, label=label, zorder=2)
        for y, length in zip(at, lengths, strict=True):
            if length:
                axes.text(
                    length + 0.01, y, f"{length:.1%}", va="center", fontsize=9, color=style.INK
                )
    axes.set_yticks(places, roles)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.1)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    style.dress(axes)
    axes.set_xlabel(title, color=style.MUTED, fontsize=9)
    handles, labels = axes.get_legend_handles_labels()
    made.legend(handles, labels, loc="outside upper right", ncols=3, frameon=False, fontsize=9.5)
    return made
