"""Tables of predictions on disk: .csv, .parquet or .json, and back.

A row's classes are a list. Parquet and JSON have lists; in a CSV they are a cell, the names between
"; ". If any class of the set has a ";" in its name, or begins with "[", every cell of the file is a
JSON list instead, so that it is always known which of the two a cell is.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from featcache.errors import ConfigError

SEPARATOR = "; "
"""Between the classes of a CSV cell."""

SUFFIXES = (".csv", ".parquet", ".json")
"""Kinds of tables."""


def needs_json(class_names: Sequence[str]) -> bool:
    """Whether cells with these classes are JSON lists."""
    return any(SEPARATOR.strip() in name or name.startswith("[") for name in class_names)


def table_bytes(frame: pd.DataFrame, suffix: str, class_names: Sequence[str]) -> bytes:
    """A table of predictions as a file's content.

    Args:
        frame: a column `classes`, if there is one, holds lists of names.
        suffix: one of `SUFFIXES`.
        class_names: all C of them.
    """
    if suffix == ".parquet":
        return bytes(frame.to_parquet(index=False))
    if suffix == ".json":
        records = [
            {name: _plain(value) for name, value in row.items()} for row in frame.to_dict("records")
        ]
        lines = ",\n".join(json.dumps(record, ensure_ascii=False) for record in records)
        return f"[\n{lines}\n]\n".encode()
    if "classes" in frame.columns:
        as_json = needs_json(class_names)
        cells = [
            json.dumps(names, ensure_ascii=False) if as_json else SEPARATOR.join(names)
            for names in frame["classes"]
        ]
        frame = frame.assign(classes=cells)
    return frame.to_csv(index=False, float_format="%.6g").encode()


def read_predictions(file: Path, class_names: Sequence[str]) -> pd.DataFrame:
    """A table that `table_bytes` wrote; `classes`, if it is there, holds lists again.

    Args:
        file: .csv, .parquet or .json.
        class_names: all C of them.

    Raises:
        ConfigError: no such file, or it is no table of predictions.
    """
    if not file.is_file():
        raise ConfigError(f"predictions: no such file: {file}; python -m heads.predict writes one")
    if file.suffix == ".parquet":
        frame = pd.read_parquet(file)
    elif file.suffix == ".json":
        frame = pd.DataFrame(json.loads(file.read_text(encoding="utf-8")))
    else:  # a class may be called "None" or "NA"
        frame = pd.read_csv(file, dtype=str, keep_default_na=False)
    if not {"id", "class_1"} <= set(frame.columns):
        raise ConfigError(f"{file}: expected columns id and class_1, as heads.predict writes them")
    if "classes" in frame.columns:
        as_json = needs_json(class_names)
        frame["classes"] = [_names(cell, as_json, file) for cell in frame["classes"]]
    return frame


def _names(cell: Any, as_json: bool, file: Path) -> list[str]:
    if not isinstance(cell, str):  # parquet and JSON hold lists
        return [str(name) for name in cell]
    if not as_json:
        return cell.split(SEPARATOR) if cell else []
    try:
        return [str(name) for name in json.loads(cell)]
    except ValueError:
        raise ConfigError(
            f"{file}: found classes {cell[:40]!r}, expected a JSON list, because class names of "
            "this set hold semicolons; predict again with heads.predict"
        ) from None


def _plain(value: Any) -> Any:
    """A value for JSON; probabilities with six digits, as in a CSV."""
    return float(f"{value:.6g}") if isinstance(value, float | np.floating) else value
