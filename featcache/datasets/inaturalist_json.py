"""The annotation JSON of iNaturalist: images, annotations, and categories with a taxonomy."""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from featcache.errors import DatasetError
from featcache.formats.json_arrays import read_arrays

LEVELS = ("genus", "family", "order", "class", "phylum", "kingdom", "supercategory")
"""Taxonomy fields of a category, from fine to coarse."""

_IMAGE_COLUMNS = {"id": pa.int64(), "file_name": pa.large_string()}
_ANNOTATION_COLUMNS = {"image_id": pa.int64(), "category_id": pa.int64()}


@dataclass
class Split:
    """The images of one split: names, image ids and class indices (-1 = unlabelled)."""

    split: str
    file: Path
    names: pa.Array
    numbers: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]

    def only(self, kept: npt.NDArray[np.bool_]) -> "Split":
        """The images where `kept`, (N,), is true."""
        return Split(
            self.split,
            self.file,
            self.names.filter(pa.array(kept)),
            self.numbers[kept],
            self.labels[kept],
        )


def in_order(file: Path, categories: list[Any]) -> list[dict[str, Any]]:
    """The categories by ascending id, checked.

    Raises:
        DatasetError: an entry without a whole-numbered id or a name, or an id that occurs twice.
    """
    for index, entry in enumerate(categories):
        good = isinstance(entry, dict) and type(entry.get("id")) is int
        if not good or not str(entry.get("name") or "").strip():
            raise DatasetError(
                f"{file}: category {index} is {str(entry)[:60]}; expected an object with a "
                "whole-numbered id and a name"
            )
    ordered = sorted(categories, key=lambda entry: int(entry["id"]))
    for before, after in pairwise(entry["id"] for entry in ordered):
        if before == after:
            raise DatasetError(f"{file}: category id {after} is listed twice; keep one entry")
    return ordered


def class_table(categories: list[dict[str, Any]]) -> pd.DataFrame:
    """Classes with lower-cased metadata, in the order of the categories.

    A Latin name that two categories share (one of a plant, one of an animal) gets its kingdom, or
    whatever tells the two apart, in brackets.
    """
    numbers = [int(entry["id"]) for entry in categories]
    latin = [_text(entry, "name") for entry in categories]
    columns = {
        "name": _unique_names(latin, categories, numbers),
        "scientific_name": [name.lower() for name in latin],
        "common_name": [_text(entry, "common_name").lower() for entry in categories],
        "species": [name.lower() for name in latin],
        **{level: [_text(entry, level).lower() for entry in categories] for level in LEVELS},
    }
    frame = pd.DataFrame(
        {name: texts for name, texts in columns.items() if any(texts)}, dtype=object
    )
    return frame.assign(category_id=numbers)


def _text(entry: dict[str, Any], field: str) -> str:
    value = entry.get(field)
    return "" if value is None else " ".join(str(value).split())


def _unique_names(
    names: list[str], categories: list[dict[str, Any]], numbers: list[int]
) -> list[str]:
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        rows.setdefault(name, []).append(row)
    unique = list(names)
    for name, same in rows.items():
        if len(same) == 1:
            continue
        for field in ("kingdom", "phylum", "class", "order", "family", "common_name"):
            marks = [_text(categories[row], field) for row in same]
            if all(marks) and len(set(marks)) == len(marks):
                break
        else:
            marks = [f"category {numbers[row]}" for row in same]
        for row, mark in zip(same, marks, strict=True):
            unique[row] = f"{name} ({mark})"
    return unique


def read_split(file: Path, with_categories: bool) -> tuple[pa.Table, pa.Table | None, list[Any]]:
    """Images (id, file_name), annotations (image_id, category_id) if any, and categories.

    Raises:
        DatasetError: malformed JSON, no images, or an image without a file name.
    """
    arrays: dict[str, Any] = {"images": _IMAGE_COLUMNS, "annotations": _ANNOTATION_COLUMNS}
    found = read_arrays(file, {**arrays, "categories": None} if with_categories else arrays)
    images = found.get("images")
    if images is None or len(images) == 0:
        raise DatasetError(f"{file}: no 'images'; expected annotations in COCO's form")
    if pc.any(pc.equal(images.column("file_name"), "")).as_py():
        raise DatasetError(f"{file}: an image has an empty file_name")
    annotations = found.get("annotations")
    if annotations is not None and len(annotations) == 0:
        annotations = None
    return images, annotations, found.get("categories", [])


def join(
    split: str,
    file: Path,
    images: pa.Table,
    annotations: pa.Table | None,
    numbers: npt.NDArray[np.int64],
) -> Split:
    """Images with their class, joined by image id.

    Args:
        split: name of the split.
        file: where it was read from, for messages.
        images: N rows (id, file_name).
        annotations: rows (image_id, category_id), or None.
        numbers: (C,) category ids, ascending.
    """
    ids = images.column("id").to_numpy()
    order = np.argsort(ids, kind="stable")
    ranked = ids[order]
    same = np.flatnonzero(ranked[1:] == ranked[:-1])
    if len(same):
        raise DatasetError(f"{file}: image id {ranked[same[0]]} is listed twice; keep one entry")
    labels = np.full(len(ids), -1, np.int64)
    if annotations is not None:
        pictured = annotations.column("image_id").to_numpy()
        places = np.minimum(np.searchsorted(ranked, pictured), len(ranked) - 1)
        lost = np.flatnonzero(ranked[places] != pictured)
        if len(lost):
            raise DatasetError(
                f"{file}: {len(lost)} annotations are of images that are not listed, e.g. image id "
                f"{pictured[lost[0]]}; is it the annotation file of this split?"
            )
        named = annotations.column("category_id").to_numpy()
        classes = np.minimum(np.searchsorted(numbers, named), len(numbers) - 1)
        unknown = np.flatnonzero(numbers[classes] != named)
        if len(unknown):
            raise DatasetError(
                f"{file}: category id {named[unknown[0]]} is not among the {len(numbers)} "
                "categories; expected the categories.json of the same version"
            )
        rows = order[places]
        labels[rows] = classes
        if len(differs := np.flatnonzero(labels[rows] != classes)):
            raise DatasetError(
                f"{file}: image id {pictured[differs[0]]} has two annotations of different "
                "categories; expected one each"
            )
    elif split != "test":
        raise DatasetError(
            f"{file}: no 'annotations'; {split} needs them (only test may go without)"
        )
    return Split(split, file, images.column("file_name").combine_chunks(), ids, labels)
