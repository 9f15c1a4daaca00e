"""Job: predictions as a Kaggle submission, `ImageID,Labels` with original label ids.

    python -m featcache.submission --predictions predictions.csv --cache cache/kaggle \
        --order data/kaggle/test.csv --out submission.csv

`heads.predict --submission FILE` writes the same at once.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from featcache.config import Config, run_job
from featcache.datasets.kaggle_records import read_records
from featcache.errors import ConfigError, DatasetError
from featcache.reader import open_cache
from featcache.storage import CachePath

SEPARATOR = "; "
"""Between the classes of a cell in a table of predictions."""


class SubmissionConfig(Config):
    """Writes predictions as a Kaggle submission."""

    predictions: Path
    """Table that heads.predict wrote, .csv or .parquet."""
    cache: CachePath
    """Cache of the dataset; its class table maps class names to label ids."""
    order: Path | None = None
    """test.csv or a sample submission, whose images and order the submission takes; unset = those
    of the predictions."""
    out: Path
    """CSV to write."""


def run(config: SubmissionConfig) -> pd.DataFrame:
    """Writes and returns the submission.

    Raises:
        ConfigError: if the predictions' table has other columns.
        DatasetError: if an image of the order was not predicted at all.
    """
    file = config.predictions
    if not file.is_file():
        raise ConfigError(f"predictions: no such file: {file}; python -m heads.predict writes one")
    table = pd.read_parquet(file) if file.suffix == ".parquet" else pd.read_csv(file, dtype=str)
    if not {"id", "class_1"} <= set(table.columns):
        raise ConfigError(f"{file}: expected columns id and class_1, as heads.predict writes them")
    classes = open_cache(config.cache, verify=False, allow_incomplete=True).classes
    labels = labels_of(table, classes)
    order = list(labels) if config.order is None else read_order(config.order)
    frame, num_empty = submission(order, labels)
    write_submission(config.out, frame)
    print(f"{len(frame):,} rows: {config.out}" + describe_empty(num_empty))
    return frame


def labels_of(table: pd.DataFrame, classes: pd.DataFrame) -> dict[str, list[int]]:
    """Label ids by row id, from a table of predictions.

    Where no class reaches the threshold, the best one counts: every image has a label there.

    Args:
        table: as `heads.predict` writes it.
        classes: class table; column `label_id`, or names that are numbers.

    Raises:
        ConfigError: if classes have no label ids.
    """
    names = [str(name) for name in classes["name"]]
    numbers = [str(value) for value in classes.get("label_id", classes["name"])]
    if not all(number.isascii() and number.isdigit() for number in numbers):
        raise ConfigError(
            f"class {names[0]!r} has no label id: the class table has no column label_id, and its "
            "names are no numbers; submissions are for datasets of kind kaggle_csv"
        )
    label_id = dict(zip(names, map(int, numbers), strict=True))
    above = table["classes"] if "classes" in table.columns else pd.Series([""] * len(table))
    found = {}
    for name, cell, best in zip(table["id"], above, table["class_1"], strict=True):
        chosen = cell.split(SEPARATOR) if isinstance(cell, str) and cell else [str(best)]
        found[str(name)] = sorted(label_id[one] for one in chosen)
    return found


def labels_from_scores(
    probabilities: npt.NDArray[np.floating],
    label_ids: npt.NDArray[np.int64],
    thresholds: float | npt.NDArray[np.floating] = 0.5,
) -> list[list[int]]:
    """N lists of label ids: those at or above their threshold, or else those closest to it.

    Args:
        probabilities: (N, C), 0..1.
        label_ids: (C,) original label ids, in class order.
        thresholds: one for all, or (C,).
    """
    gap = np.asarray(probabilities, np.float64) - thresholds
    chosen = (gap >= 0) | ((gap == gap.max(1, keepdims=True)) & ~(gap >= 0).any(1, keepdims=True))
    return [sorted(label_ids[row].tolist()) for row in chosen]


def read_order(file: Path) -> list[str]:
    """ImageIDs of a test file or a sample submission, in order.

    Raises:
        DatasetError: one line naming file and line.
    """
    return [record.name for record in read_records(file, labelled=False)]


def submission(
    order: Sequence[str], labels: Mapping[str, Sequence[int]], unreadable: Sequence[str] = ()
) -> tuple[pd.DataFrame, int]:
    """The submission's rows, and how many have no label because their image cannot be read.

    Args:
        order: ImageIDs.
        labels: label ids by ImageID.
        unreadable: ImageIDs that may be missing in `labels`: they get an empty cell.

    Raises:
        DatasetError: if another image of the order was not predicted.
    """
    known = set(unreadable)
    missing = [name for name in order if name not in labels and name not in known]
    if missing:
        raise DatasetError(
            f"{len(missing)} of {len(order)} images were not predicted, the first is {missing[0]}; "
            "predict the whole test split"
        )
    cells = [" ".join(map(str, labels.get(name, ()))) for name in order]
    frame = pd.DataFrame({"ImageID": list(order), "Labels": cells})
    return frame, sum(not cell for cell in cells)


def write_submission(file: Path, frame: pd.DataFrame) -> None:
    """Writes `ImageID,Labels`, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        frame.to_csv(partial, index=False, lineterminator="\n")
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def describe_empty(num_empty: int) -> str:
    """What to say about rows without labels; "" if there are none."""
    return f" ({num_empty:,} without labels: unreadable images)" if num_empty else ""


if __name__ == "__main__":
    run_job(SubmissionConfig, run)
