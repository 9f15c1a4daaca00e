"""Few-shot split files: JSON lists of [path, label, class name] for train, val and test.

They draw other splits of known sets than the official ones, so their figures belong in tables of
their own: a dataset that reads one takes another kind (`flowers102_few_shot`).
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from featcache.errors import DatasetError

SUFFIX = "_few_shot"
"""What the kind of such a dataset ends in."""


@dataclass(frozen=True)
class SplitFile:
    """N rows in file order, and the C class names in label order."""

    paths: list[str]
    labels: list[int]
    splits: list[str]
    classes: pd.DataFrame


def read_split_json(file: Path) -> SplitFile:
    """The rows of a split file; class index = its label, class name = its name.

    Raises:
        DatasetError: no such file, not of this form, an image listed twice, a label with two
            names, or labels with gaps.
    """
    if not file.is_file():
        raise DatasetError(f"{file}: no such file; expected a JSON of train, val and test")
    try:
        parts = json.loads(file.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DatasetError(f"{file}: not JSON ({error})") from None
    found = isinstance(parts, dict) and {"train", "test"} <= set(parts)
    if not found or not all(isinstance(parts.get(s, []), list) for s in ("train", "val", "test")):
        raise DatasetError(f"{file}: expected an object with lists train, val and test")
    rows: list[tuple[str, str, int, str]] = []
    for split in ("train", "val", "test"):
        for number, entry in enumerate(parts.get(split, [])):
            if not _is_row(entry):
                raise DatasetError(
                    f"{file}: row {number} of {split} is {json.dumps(entry)[:60]}; expected "
                    "[path, label, class name]"
                )
            rows.append((split, *entry))
    names = _names(file, rows)
    repeated = [
        path for path, count in Counter(path for _, path, _, _ in rows).items() if count > 1
    ]
    if repeated:
        raise DatasetError(f"{file}: {repeated[0]} is listed twice; expected each image once")
    return SplitFile(
        paths=[path for _, path, _, _ in rows],
        labels=[label for _, _, label, _ in rows],
        splits=[split for split, _, _, _ in rows],
        classes=pd.DataFrame({"name": names}, dtype=object),
    )


def _is_row(entry: Any) -> bool:
    return (
        isinstance(entry, list)
        and [type(value) for value in entry] == [str, int, str]
        and entry[0] != ""
        and entry[1] >= 0
    )


def _names(file: Path, rows: Sequence[tuple[str, str, int, str]]) -> list[str]:
    """Class names in label order."""
    names: dict[int, str] = {}
    for _, path, label, name in rows:
        if names.setdefault(label, name) != name:
            raise DatasetError(
                f"{file}: {path} calls label {label} {name!r}, others {names[label]!r}; expected "
                "one name a label"
            )
    for label in range(len(names)):
        if label not in names:
            raise DatasetError(
                f"{file}: no image has label {label}, but others reach {max(names)}; expected "
                "labels 0, 1, 2, … without gaps"
            )
    return [names[label] for label in range(len(names))]
