"""What a training leaves beside its tensors: metrics, calibration, tables, pictures, a page."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from heads.base import Head
from heads.calibration import Calibration
from heads.data import FeatureTables
from heads.evaluate import score_monitors
from heads.parts import Part
from heads.run_folder import write_atomic
from heads.scoring import MetricsConfig, Scored, calibrate, score_part, with_intervals


def write_results(
    folder: Path,
    head: Head,
    reported: Sequence[tuple[Part, FeatureTables]],
    *,
    options: MetricsConfig,
    calibrating: bool,
    seed: int,
    classes: pd.DataFrame,
    values: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
    record: Mapping[str, Any],
    config: Mapping[str, Any],
    page: bool,
) -> dict[str, Any]:
    """Scores the picked head and fills its run folder; returns `val`, `test` and `monitors`.

    Args:
        folder: run folder.
        head: the picked one, on the device of the tables, in evaluation mode.
        reported: the validation rows and, if there are any, the test rows.
        options: how metrics are counted.
        calibrating: whether temperature and thresholds may be fitted to the validation rows.
        seed: of the training.
        classes: class table.
        values: the other entries of `metrics.json`.
        history: one record an epoch; empty for heads that are not trained.
        record: `head.json`.
        config: the resolved configuration, as plain values.
        page: whether the page is written.
    """
    part, table = reported[0]
    calibration = calibrate(head, table, part, seed) if calibrating else None
    if calibration is not None:
        calibration.write(folder)
    scored = [
        score_part(head, table, part, classes, options, calibration) for part, table in reported
    ]
    names = ("val", "test")[: len(scored)]
    found: dict[str, Any] = {
        name: one.scores.metrics for name, one in zip(names, scored, strict=True)
    }
    monitors = {
        name: score_monitors(head, table, part)
        for name, (part, table) in zip(names, reported, strict=True)
    }
    if monitors["val"]:
        found["monitors"] = monitors
    if len(scored) > 1:
        csv = scored[1].scores.per_class.to_csv(index=False).encode()
        write_atomic(folder / f"classes_{scored[1].name}.csv", csv)
    if history:
        from heads.pictures import draw_curves  # matplotlib takes a second to import

        title = f"{record['kind']} on {Path(str(config['cache'])).name}"
        draw_curves(
            history, folder / "curves.png", title, values["metric"], int(values["best_epoch"])
        )
    if page:
        write_page(
            folder,
            head,
            reported[-1][1],
            scored,
            classes=classes,
            options=options,
            calibration=calibration,
            config=config,
            record=record,
            values={**values, **found},
            history=history,
        )
    return found


def write_page(
    folder: Path,
    head: Head,
    table: FeatureTables,
    results: Sequence[Scored],
    *,
    classes: pd.DataFrame,
    options: MetricsConfig,
    calibration: Calibration | None,
    config: Mapping[str, Any],
    record: Mapping[str, Any],
    values: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
) -> None:
    """Writes `report.html` into a run folder; `heads.report` writes the same with more pictures.

    Args:
        folder: run folder.
        head: the picked one, on the table's device, in evaluation mode.
        table: features of the last part in `results`.
        results: parts that the head was scored on; the last one is shown.
        classes: class table.
        options: how metrics were counted.
        calibration: None = none was fitted.
        config: the resolved configuration, as plain values.
        record: `head.json`.
        values: `metrics.json`.
        history: one record an epoch.
    """
    from heads.reporting.run_page import RunPage, head_sections  # matplotlib takes a second

    main = results[-1]
    RunPage(
        folder=folder,
        record=record,
        values=values,
        config=config,
        history=history,
        classes=classes,
        main=with_intervals(main, classes, options, calibration),
        others=[(one.name, one.scores.metrics, {}) for one in results[:-1]],
        calibration=calibration,
        options=options,
        extra=list(head_sections(head, table, main.name, classes, options)),
        taxa=False,
    ).write()
