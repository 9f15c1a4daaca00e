"""Zero-shot accuracy of a split: from features and class vectors to metrics and tables."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from heads.run_folder import write_atomic, write_json
from heads.scoring import Outputs


@dataclass(frozen=True)
class TableFiles:
    """What an evaluation writes: `<name>.txt`, `<name>.csv`, `<name>.json`."""

    text: Path
    classes: Path
    metrics: Path

    @classmethod
    def of(cls, folder: Path, name: str) -> "TableFiles":
        """The files of a dataset called `name`."""
        safe = "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in name)
        return cls(*(folder / f"{safe}.{suffix}" for suffix in ("txt", "csv", "json")))


def class_accuracies(outputs: Outputs, per_class: pd.DataFrame) -> pd.DataFrame:
    """The class table of `heads.scoring.summarise` with `top1` and `top5` instead of `accuracy`.

    Classes are counted by their index, so that two of one name stay two.

    Args:
        outputs: of a single-label set.
        per_class: C rows in index order.
    """
    assert outputs.rows is not None, "not single-label"
    rows = outputs.rows
    support = np.bincount(rows.label, minlength=len(per_class))
    columns: dict[str, npt.NDArray[Any]] = {}
    for k in (1, 5):
        right = np.bincount(rows.label[rows.rank < k], minlength=len(per_class))
        columns[f"top{k}"] = np.where(support > 0, right / np.maximum(support, 1), np.nan)
    return per_class.drop(columns="accuracy").assign(**columns)


def table_text(metrics: Mapping[str, float], per_class: pd.DataFrame) -> str:
    """Totals, then a line a class in index order; shares in percent, `-` for a class without rows.

    Args:
        metrics: with `top1` and `top5`, or `map` of a multi-label set.
        per_class: C rows with `name` and `top1`, `top5`, or `average_precision`.
    """
    if "top1" in metrics:
        totals = {"Top 1 accuracy": metrics["top1"], "Top 5 accuracy": metrics["top5"]}
        columns = {"Top-1": "top1", "Top-5": "top5"}
    else:
        totals = {"Mean average precision": metrics["map"]}
        columns = {"AP": "average_precision"}
    lines = [f"{title}: {100 * value:.2f}" for title, value in totals.items()]
    lines += ["", "  ".join([*(f"{title:>6}" for title in columns), "Class name"])]
    for _, row in per_class.iterrows():
        shares = [row[column] for column in columns.values()]
        cells = ["     -" if np.isnan(share) else f"{100 * share:6.2f}" for share in shares]
        lines.append("  ".join([*cells, str(row["name"])]))
    return "\n".join(lines) + "\n"


def write_tables(
    files: TableFiles,
    metrics: Mapping[str, float],
    per_class: pd.DataFrame,
    record: Mapping[str, Any],
) -> None:
    """Writes the three files, each whole or not at all.

    Args:
        files: where.
        metrics: see `table_text`.
        per_class: likewise.
        record: what was evaluated and how, JSON values.
    """
    files.text.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(files.text, table_text(metrics, per_class).encode())
    write_atomic(files.classes, per_class.to_csv(index=False).encode())
    write_json(files.metrics, {**record, **metrics})
