"""Job: predictions as a Kaggle submission, `ImageID,Labels` with original label ids.

    python -m featcache.submission --predictions predictions.csv --cache cache/kaggle \
        --order data/kaggle/test.csv --out submission.csv

`heads.predict --submission FILE` writes the same at once.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from featcache.config import Config, run_job
from featcache.datasets.kaggle_records import read_records
from featcache.errors import ConfigError, DatasetError
from featcache.prediction_table import read_predictions
from featcache.reader import open_cache
from featcache.storage import CachePath


class SubmissionConfig(Config):
    """Writes predictions as a Kaggle submission."""

    predictions: Path
    """Table that heads.predict wrote, .csv, .parquet or .json."""
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
        ConfigError: if there is no table of predictions, or it has other columns.
        DatasetError: if no image of the order was predicted.
    """
    classes = open_cache(config.cache, verify=False, allow_incomplete=True).classes
    table = read_predictions(config.predictions, [str(name) for name in classes["name"]])
    labels = labels_of(table, classes)
    order = list(labels) if config.order is None else read_order(config.order)
    frame = submission(order, labels)
    write_submission(config.out, frame)
    print(summary(config.out, frame))
    return frame


def labels_of(table: pd.DataFrame, classes: pd.DataFrame) -> dict[str, list[int]]:
    """Label ids by row id, from a table of predictions.

    Where no class reaches its threshold, the one closest to it counts (column `nearest`; without
    that column all thresholds are equal, and it is the best one): every image has a label there.

    Args:
        table: as `heads.predict` makes it, `classes` being lists of names.
        classes: class table; column `label_id`, or names that are numbers.

    Raises:
        ConfigError: if classes have no label ids, or a predicted one is not in the class table.
    """
    names = [str(name) for name in classes["name"]]
    numbers = [str(value) for value in classes.get("label_id", classes["name"])]
    if not all(number.isascii() and number.isdigit() for number in numbers):
        raise ConfigError(
            f"class {names[0]!r} has no label id: the class table has no column label_id, and its "
            "names are no numbers; submissions are for datasets of kind kaggle_csv"
        )
    label_id = dict(zip(names, map(int, numbers), strict=True))
    above: Any = table["classes"] if "classes" in table.columns else [[]] * len(table)
    closest = table["nearest" if "nearest" in table.columns else "class_1"]
    found = {}
    for name, present, best in zip(table["id"], above, closest, strict=True):
        chosen = list(present) or [str(best)]
        unknown = [one for one in chosen if one not in label_id]
        if unknown:
            raise ConfigError(
                f"{name}: predicted class {unknown[0]!r} is none of the {len(names)} of the class "
                "table; name the cache that the head was trained on"
            )
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


def submission(order: Sequence[str], labels: Mapping[str, Sequence[int]]) -> pd.DataFrame:
    """The submission's rows; an image that was not predicted (unreadable, missing) has no labels.

    Args:
        order: ImageIDs.
        labels: label ids by ImageID.

    Raises:
        DatasetError: if none of the images was predicted.
    """
    if not any(name in labels for name in order):
        raise DatasetError(
            f"none of the {len(order)} images was predicted, the first is {order[0]}; predict the "
            "images of the test split"
        )
    cells = [" ".join(map(str, labels.get(name, ()))) for name in order]
    return pd.DataFrame({"ImageID": list(order), "Labels": cells})


def summary(file: Path, frame: pd.DataFrame) -> str:
    """A line about a written submission, naming what is missing in it."""
    empty = frame["ImageID"][frame["Labels"] == ""].tolist()
    missing = f"; {len(empty):,} not predicted and left empty, e.g. {empty[0]}" if empty else ""
    return f"{len(frame):,} rows: {file}{missing}"


def write_submission(file: Path, frame: pd.DataFrame) -> None:
    """Writes `ImageID,Labels`, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        frame.to_csv(partial, index=False, lineterminator="\n")
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


if __name__ == "__main__":
    run_job(SubmissionConfig, run)
