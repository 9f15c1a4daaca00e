"""Hugging Face `datasets` on disk: folders that `save_to_disk` wrote, read without that package.

The folder of a DatasetDict has one folder a split, listed in `dataset_dict.json`; that of a Dataset
has `state.json`, `dataset_info.json` and `data-*.arrow`. Encoded images lie inside the Arrow files
and stay there: a row's path says file, row and column.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from featcache.datasets.splitting import ALIASES, SplitConfig, rarest_label
from featcache.errors import DatasetError
from featcache.formats.arrow_cells import open_arrow
from featcache.image_bytes import arrow_cell_path
from featcache.manifest import Manifest, Task

_LISTS = ("List", "LargeList", "Sequence")
_CAPTIONS = ("caption", "captions", "text")


class HuggingFaceConfig(SplitConfig):
    """A Dataset or DatasetDict of images that `save_to_disk` wrote."""

    kind: Literal["hugging_face"] = "hugging_face"
    """Dataset kind."""
    root: Path
    """Folder that was given to `save_to_disk`."""
    image_column: str | None = None
    """Column with the images; unset = the only one of type Image."""
    label_column: str | None = None
    """Column with a class, or a list of classes; unset = the only one of type ClassLabel (or list
    of ClassLabel), otherwise `label` or `labels` if there is one."""
    caption_columns: tuple[str, ...] | None = None
    """Columns with a caption or a list of captions; unset = `caption`, `captions` and `text` if
    there and of text type."""
    id_column: str | None = None
    """Column with an id that is unique over all splits; unset = split and row number."""

    def manifest(self) -> Manifest:
        """Rows in the order of the files within each split.

        Raises:
            DatasetError: one line: not such a folder, a damaged file, or columns that do not fit.
        """
        parts = _parts(self.root)
        columns = self._columns(parts)
        classes, task, labels = _labels(parts, columns.label, self.root)
        paths = [path for part in parts for path in part.image_paths(columns.image, self.root)]
        if self.id_column is None:
            ids = [f"{part.folder}/{n}".lstrip("/") for part in parts for n in range(len(part))]
        else:
            ids = [str(value) for part in parts for value in part.values(self.id_column)]
        captions = _captions(parts, columns.captions) if columns.captions else None
        if parts[0].folder:
            splits = [part.split for part in parts for _ in range(len(part))]
        else:
            splits = self.split(ids, rarest_label(*labels))
        return Manifest.build(
            kind=self.kind,
            root=self.root,
            ids=ids,
            paths=paths,
            splits=splits,
            labels=pa.LargeListArray.from_arrays(*map(pa.array, labels)),
            classes=classes,
            task=task,
            captions=captions,
        )

    def _columns(self, parts: "Sequence[_Part]") -> "_Columns":
        features = parts[0].features
        for part in parts[1:]:
            if part.features != features:
                differing = next(
                    name
                    for name in [*features, *part.features]
                    if features.get(name) != part.features.get(name)
                )
                _fail(
                    self.root / part.folder,
                    f"column {differing!r} has another type, or other classes, than in "
                    f"{parts[0].folder}; cast the splits to the same features and save again",
                )

        def pick(option: str, chosen: str | None, found: list[str], what: str) -> str | None:
            if chosen is not None:
                if chosen not in features:
                    have = ", ".join(features)
                    _fail(self.root, f"no column {chosen!r}; found {have}; set dataset.{option}")
                return chosen
            if len(found) > 1:
                names = " and ".join(found)
                _fail(self.root, f"columns {names} hold {what}; choose with dataset.{option}")
            return found[0] if found else None

        images = [name for name, feature in features.items() if _type(feature) == "Image"]
        image = pick("image_column", self.image_column, images, "images")
        if image is None:
            have = ", ".join(features)
            _fail(self.root, f"no column of type Image; found {have}; set dataset.image_column")
        named = [name for name, feature in features.items() if _class_names(feature) is not None]
        if not named:
            named = [name for name in features if name in ("label", "labels")][:1]
        texts = [name for name in _CAPTIONS if name in features and _is_text(features[name])]
        texts = [name for name in texts if name != self.label_column]
        if self.caption_columns is not None:
            texts = [
                str(pick("caption_columns", name, [], "text")) for name in self.caption_columns
            ]
        if self.id_column is not None:
            pick("id_column", self.id_column, [], "ids")
        label = pick("label_column", self.label_column, named, "classes")
        return _Columns(image, label, texts)


@dataclass(frozen=True)
class _Columns:
    image: str
    label: str | None
    captions: list[str]


@dataclass(frozen=True)
class _Part:
    """One saved Dataset.

    Attributes:
        folder: relative to the root; "" = the root itself.
        split: split name.
        features: feature description by column, as in `dataset_info.json`.
        files: Arrow files with their mapped tables.
    """

    folder: str
    split: str
    features: dict[str, Any]
    files: list[tuple[str, pa.Table]]

    def __len__(self) -> int:
        return sum(table.num_rows for _, table in self.files)

    def column(self, name: str) -> pa.ChunkedArray:
        """A column over all files."""
        chunks = [chunk for _, table in self.files for chunk in table.column(name).chunks]
        return pa.chunked_array(chunks, self.files[0][1].schema.field(name).type)

    def values(self, name: str) -> list[Any]:
        """A column's cells as Python values."""
        return list(self.column(name).to_pylist())

    def image_paths(self, column: str, root: Path) -> list[str]:
        """Each row's path: the cell, or the file that an empty cell names."""
        prefix = f"{self.folder}/" if self.folder else ""
        paths = []
        for file, table in self.files:
            found = [arrow_cell_path(prefix + file, row, column) for row in range(table.num_rows)]
            cells = table.column(column)
            if pa.types.is_struct(cells.type):
                empty = pc.is_null(pc.struct_field(cells, "bytes")).to_numpy()
                names = pc.struct_field(cells, "path")
                for row in np.flatnonzero(empty).tolist():
                    name = names[row].as_py()
                    if name:
                        found[row] = _relative(name, root)
            paths += found
        return paths


def _parts(root: Path) -> list[_Part]:
    if (root / "dataset_dict.json").is_file():
        names = _read_json(root / "dataset_dict.json").get("splits", [])
        if not names:
            _fail(root, "dataset_dict.json lists no split")
        parts = [_part(root, str(name)) for name in names]
        splits = [part.split for part in parts]
        for number, part in enumerate(parts):
            if part.split in splits[:number]:
                one = parts[splits.index(part.split)].folder
                _fail(root, f"{one} and {part.folder} both mean {part.split}; keep one of them")
        return parts
    if not (root / "state.json").is_file():
        found = "a file" if root.is_file() else "no such folder"
        if root.is_dir():
            found = "neither dataset_dict.json nor state.json in it"
        _fail(root, f"{found}; expected a folder that save_to_disk of Hugging Face datasets wrote")
    return [_part(root, "")]


def _part(root: Path, folder: str) -> _Part:
    place = root / folder
    state = _read_json(place / "state.json")
    if state.get("_indices_data_files") or state.get("_indices_files"):
        _fail(place, "saved as a selection of rows; call flatten_indices() and save again")
    try:
        names = [str(entry["filename"]) for entry in state["_data_files"]]
    except (KeyError, TypeError):
        _fail(place / "state.json", "lists no _data_files; copy the whole folder again")
    files = []
    for name in names:
        try:
            files.append((name, open_arrow(place / name)))
        except FileNotFoundError:
            _fail(place / name, "no such file, state.json lists it; copy the whole folder again")
        except (OSError, ValueError) as error:
            _fail(place / name, f"cannot be read: {error}")
    if not files:
        _fail(place, "state.json lists no data files, the dataset is empty")
    features = _read_json(place / "dataset_info.json").get("features")
    if not isinstance(features, dict):
        _fail(place / "dataset_info.json", "lists no features; copy the whole folder again")
    columns = {name: features.get(name) for name in files[0][1].column_names}
    return _Part(folder, ALIASES.get(folder.lower(), folder or "train"), columns, files)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_bytes())
    except FileNotFoundError:
        _fail(file, "no such file; expected a folder that save_to_disk wrote")
    except ValueError:
        _fail(file, "not JSON; copy the whole folder again")
    if not isinstance(value, dict):
        _fail(file, "expected a JSON object; copy the whole folder again")
    return value


def _labels(
    parts: Sequence[_Part], column: str | None, root: Path
) -> tuple[pd.DataFrame, Task, tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]]:
    """Class table, task, and offsets and class indices over the rows of all parts."""
    num_rows = sum(map(len, parts))
    if column is None:
        nothing = np.zeros(num_rows + 1, np.int64), np.zeros(0, np.int32)
        return pd.DataFrame({"name": []}, dtype=object), "unlabelled", nothing
    cells = pa.chunked_array([chunk for part in parts for chunk in part.column(column).chunks])
    kinds = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    several = any(of_kind(cells.type) for of_kind in kinds)
    if several:
        lengths = pc.fill_null(pc.list_value_length(cells), 0).to_numpy()
        values = pc.list_flatten(cells)
    else:
        values, lengths = cells, np.ones(num_rows, np.int64)
    names = _class_names(parts[0].features[column])
    if names is not None:
        index = pc.fill_null(values, -1).to_numpy().astype(np.int64)
    else:
        names, index = _collect(values, column, root)
    rows = np.repeat(np.arange(num_rows), lengths)
    known = index >= 0  # null or -1: no label, as in published test splits
    rows, index = rows[known], index[known]
    # Each class once a row, however many objects of it the row lists.
    first = np.sort(np.unique(np.stack([rows, index]), axis=1, return_index=True)[1])
    if len(first) < len(rows) and _class_names(parts[0].features[column]) is None:
        _fail(
            root,
            f"column {column!r} has a value twice in one row; expected lists of the row's classes, "
            "each once: cast the values to ClassLabel, or set dataset.label_column (numbers 0 and "
            "1 for every class are no such list)",
        )
    rows, index = rows[first], index[first]
    counts = np.bincount(rows, minlength=num_rows)
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    frame = pd.DataFrame({"name": names}, dtype=object)
    return frame, "multi_label" if several else "single_label", (offsets, index.astype(np.int32))


def _collect(
    values: pa.ChunkedArray, column: str, root: Path
) -> tuple[list[str], npt.NDArray[np.int64]]:
    """Class names of plain cells, sorted (numbers by value), and each cell's index; null = -1."""
    kind = values.type
    if not (
        pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)
    ):
        _fail(
            root,
            f"column {column!r} has type {kind}; expected a ClassLabel, text or whole numbers, "
            "one or a list: set dataset.label_column",
        )
    distinct = sorted(value for value in pc.unique(values).to_pylist() if value is not None)
    index = pc.index_in(values, pa.array(distinct, kind))
    return [str(value) for value in distinct], pc.fill_null(index, -1).to_numpy().astype(np.int64)


def _captions(parts: Sequence[_Part], columns: Sequence[str]) -> list[list[str]]:
    captions: list[list[str]] = [[] for _ in range(sum(map(len, parts)))]
    for column in columns:
        cells = (value for part in parts for value in part.values(column))
        for own, cell in zip(captions, cells, strict=True):
            texts = cell if isinstance(cell, list) else [cell]
            own += [str(text).strip() for text in texts if text is not None and str(text).strip()]
    return captions


def _type(feature: Any) -> str:
    return str(feature.get("_type", "")) if isinstance(feature, dict) else ""


def _element(feature: Any) -> Any:
    """A list feature's elements; the feature itself if it is no list."""
    if isinstance(feature, list) and len(feature) == 1:  # how older versions wrote lists
        return feature[0]
    return feature.get("feature") if _type(feature) in _LISTS else feature


def _class_names(feature: Any) -> list[str] | None:
    element = _element(feature)
    names = element.get("names") if _type(element) == "ClassLabel" else None
    return None if names is None else list(map(str, names))


def _is_text(feature: Any) -> bool:
    element = _element(feature)
    return _type(element) == "Value" and element.get("dtype") in ("string", "large_string")


def _relative(name: str, root: Path) -> str:
    path = Path(name)
    if path.is_absolute() and path.is_relative_to(root.absolute()):
        return path.relative_to(root.absolute()).as_posix()
    return name


def _fail(place: Path, message: str) -> NoReturn:
    raise DatasetError(f"{place}: {message}")
