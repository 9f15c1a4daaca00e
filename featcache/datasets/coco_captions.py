"""COCO captions: several human captions an image, and object classes if asked for.

Reference: Chen et al., Microsoft COCO Captions, 2015; files `captions_*.json`, `instances_*.json`.
"""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from featcache.datasets.base import DatasetConfig, require_some_image
from featcache.errors import DatasetError
from featcache.formats.json_arrays import read_arrays
from featcache.manifest import Manifest

_IMAGES = {"id": pa.int64(), "file_name": pa.large_string()}


class CocoCaptionsConfig(DatasetConfig):
    """Images of `train2017` and `val2017` with their captions from `annotations/`."""

    kind: Literal["coco_captions"] = "coco_captions"
    """Dataset kind."""
    root: Path
    """Folder with `annotations/captions_train2017.json` and the images in `train2017/`, ..."""
    year: str = Field(default="2017", pattern=r"^[A-Za-z0-9_-]*$")
    """What follows train and val in the names of files and folders."""
    splits: tuple[Literal["train", "val"], ...] = Field(default=("train", "val"), min_length=1)
    """Splits to read."""
    instances: bool = False
    """Read object classes as labels too, from `instances_*.json`: a multi-label set; without it the
    set is unlabelled."""
    uncaptioned: Literal["keep", "drop"] = "keep"
    """What happens to images without a caption: they stay as rows without one, or are left out."""

    def manifest(self) -> Manifest:
        """Rows in the order of the files within each split; ids are paths from `root`.

        An image's captions stay in the file's order, with blanks around them cut off; empty ones
        are no captions. Class order: ascending category id; class metadata: `category_id` and
        `supercategory`.

        Raises:
            DatasetError: one line: a missing or malformed file, an image listed twice, annotations
                of images that are not listed, or splits with different categories.
        """
        names = list(dict.fromkeys(self.splits))
        parts = [self._part(name) for name in names]
        paths = pa.concat_arrays([part["paths"] for part in parts])
        require_some_image(self.root, paths.slice(0, 20).to_pylist())
        classes, labels = pd.DataFrame({"name": []}, dtype=object), None
        if self.instances:
            classes = parts[0]["classes"]
            for name, part in zip(names, parts, strict=True):
                if not part["classes"].equals(classes):
                    raise DatasetError(
                        f"{self._file('instances', name)}: other categories than in "
                        f"{self._file('instances', names[0]).name}; expected the same"
                    )
            labels = _joined([part["labels"] for part in parts], pa.int32())
        captions = _joined([part["captions"] for part in parts], pa.large_string())
        splits = [
            name for name, part in zip(names, parts, strict=True) for _ in range(len(part["paths"]))
        ]
        manifest = Manifest.build(
            kind=self.kind,
            root=self.root,
            ids=paths,
            paths=paths,
            splits=splits,
            labels=[[]] * len(paths) if labels is None else labels,
            classes=classes,
            task="unlabelled" if labels is None else "multi_label",
            captions=captions,
        )
        if self.uncaptioned == "keep":
            return manifest
        kept = np.flatnonzero(np.diff(manifest.caption_offsets))
        if not len(kept):
            raise DatasetError(f"{self.root}: no image has a caption; set dataset.uncaptioned keep")
        return manifest.only(kept)

    def _file(self, what: str, split: str) -> Path:
        return self.root / "annotations" / f"{what}_{split}{self.year}.json"

    def _part(self, split: str) -> dict[str, Any]:
        """Paths, captions, and with `instances` labels and classes, of one split."""
        file = self._file("captions", split)
        captions = {"image_id": pa.int64(), "caption": pa.large_string()}
        found = _read(file, {"images": _IMAGES, "annotations": captions})
        images, notes = found["images"], found["annotations"]
        ids = images.column("id").combine_chunks()
        names = images.column("file_name").combine_chunks()
        for what, column in (("id", ids), ("file_name", names)):
            if pc.count_distinct(column).as_py() < len(column):
                counts = pc.value_counts(column)
                one = counts.filter(pc.greater(counts.field("counts"), 1))[0]["values"]
                raise DatasetError(
                    f"{file}: the image with {what} {one.as_py()!r} is listed twice; keep one"
                )
        texts = pc.utf8_trim_whitespace(notes.column("caption").combine_chunks())
        rows = _rows(file, notes, ids)
        filled = pc.not_equal(texts, "").to_numpy(zero_copy_only=False)
        part: dict[str, Any] = {
            "paths": _below(f"{split}{self.year}", names),
            "captions": _lists(rows[filled], texts.filter(pa.array(filled)), len(ids)),
        }
        if self.instances:
            part["classes"], part["labels"] = _objects(self._file("instances", split), ids)
        return part


def _objects(file: Path, ids: pa.Array) -> tuple[pd.DataFrame, pa.Array]:
    """Class table, and each image's class indices, ascending.

    Args:
        file: `instances_*.json`.
        ids: image ids in row order.
    """
    wanted = {"image_id": pa.int64(), "category_id": pa.int64()}
    found = _read(file, {"annotations": wanted, "categories": None})
    classes, categories = _classes(file, found["categories"])
    notes = found["annotations"]
    rows = _rows(file, notes, ids)
    column = notes.column("category_id").combine_chunks()
    index = pc.index_in(column, pa.array(categories, pa.int64()))
    if index.null_count:
        bad = column.filter(pc.is_null(index))[0].as_py()
        raise DatasetError(f"{file}: category_id {bad} is not among its categories")
    # Each class once an image, however many objects of it there are.
    pairs = np.unique(rows * len(categories) + index.to_numpy().astype(np.int64))
    values = pa.array(pairs % len(categories), pa.int32())
    return classes, _lists(pairs // len(categories), values, len(ids))


def _read(file: Path, arrays: dict[str, Any]) -> dict[str, Any]:
    found = read_arrays(file, arrays)
    for name in arrays:
        if name not in found:
            raise DatasetError(f"{file}: no array {name!r}; expected COCO's own layout")
    if "images" in found and not len(found["images"]):
        raise DatasetError(f"{file}: lists no images")
    return found


def _below(folder: str, names: pa.Array) -> pa.Array:
    text = pa.large_string()
    return pc.binary_join_element_wise(pa.scalar(folder, text), names, pa.scalar("/", text))


def _rows(file: Path, notes: pa.Table, ids: pa.Array) -> npt.NDArray[np.int64]:
    """(A,) number of the image of each annotation."""
    image_ids = notes.column("image_id").combine_chunks()
    index = pc.index_in(image_ids, ids)
    if index.null_count:
        first = image_ids.filter(pc.is_null(index))[0].as_py()
        raise DatasetError(
            f"{file}: {index.null_count} annotations are of images that are not listed, the first "
            f"of image_id {first}; use the images and annotations of one release"
        )
    rows: npt.NDArray[np.int64] = index.to_numpy().astype(np.int64)
    return rows


def _lists(rows: npt.NDArray[np.int64], values: pa.Array, num_rows: int) -> pa.Array:
    """Lists of the values of each row, in the given order."""
    counts = np.bincount(rows, minlength=num_rows)
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    order = pa.array(np.argsort(rows, kind="stable"))
    return pa.LargeListArray.from_arrays(pa.array(offsets), values.take(order))


def _joined(lists: list[pa.Array], element: pa.DataType) -> pa.Array:
    return pa.concat_arrays([part.cast(pa.large_list(element)) for part in lists])


def _classes(file: Path, categories: list[Any]) -> tuple[pd.DataFrame, list[int]]:
    """Class table and category ids, by ascending id."""
    try:
        rows = sorted((int(one["id"]), str(one["name"])) for one in categories)
        above = {int(one["id"]): str(one.get("supercategory", "")) for one in categories}
    except (KeyError, TypeError, ValueError):
        raise DatasetError(f"{file}: expected categories with a number `id` and a `name`") from None
    ids = [number for number, _ in rows]
    if not ids or len(set(ids)) < len(ids):
        raise DatasetError(f"{file}: no categories, or an id that occurs twice")
    columns = {
        "name": [name for _, name in rows],
        "category_id": [str(number) for number in ids],
        "supercategory": [above[number] for number in ids],
    }
    return pd.DataFrame(columns, dtype=object), ids
