"""A table of images: CSV or Parquet with paths, labels, captions and splits in columns."""

import csv
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from featcache.datasets.base import require_some_image
from featcache.datasets.path_lists import read_lines
from featcache.datasets.splitting import ALIASES, SplitConfig, rarest_label
from featcache.errors import DatasetError
from featcache.manifest import Manifest, Task

SEPARATORS = (";", "|", ",")
"""Looked for between several labels in one cell; blanks otherwise."""

JSON_CAPTIONS = re.compile(r'null|\[\s*(\]|".*\]|null\s*(,.*)?\])', re.DOTALL)
"""A cell of captions that is JSON: null, or a list of strings and nulls. Other text that happens to
start with a bracket is a caption."""


class TableConfig(SplitConfig):
    """One row an image, or several with the same image and one caption each."""

    kind: Literal["table"] = "table"
    """Dataset kind."""
    file: Path
    """CSV (UTF-8, with a header; .tsv: tabs) or Parquet file."""
    root: Path | None = None
    """Folder that the paths start from; unset = the file's own folder."""
    path_column: str = "path"
    """Column with the image's path."""
    id_column: str | None = None
    """Column with a unique id; unset = `id` if there is one, otherwise the path."""
    label_column: str | None = None
    """Column with one class, a name or a number; unset = `label` if there is one."""
    labels_column: str | None = None
    """Column with several classes (a cell with separators or a JSON list, in Parquet also a list);
    unset = `labels` if there is one."""
    label_separator: str | None = None
    """Text between the classes of one cell; unset = the one of ; | , that occurs, otherwise
    blanks."""
    caption_columns: tuple[str, ...] | None = None
    """Columns with a caption or a (JSON) list of captions; unset = `caption` and `captions` if
    there. Empty cells count for no caption."""
    split_column: str | None = None
    """Column with train, val, test or another name; unset = `split` if there is one, otherwise the
    rows are split here."""
    repeated_rows: Literal["error", "captions"] = "error"
    """What several rows with one id mean: a mistake, or more captions of the same image."""
    classes: Path | None = None
    """Class names, one a line, in index order; or a .csv with a `name` column, other columns being
    metadata. Unset = all labels found, sorted, numbers by value."""

    def manifest(self) -> Manifest:
        """Rows in file order within each split.

        Raises:
            DatasetError: one line naming the file and, where there is one, the row.
        """
        table = read_table(self.file)
        root = self.file.parent if self.root is None else self.root
        columns = self._columns(table)
        paths = [_relative(text, root, table, row) for row, text in enumerate(table[columns.path])]
        ids = paths if columns.id is None else [_text(value) for value in table[columns.id]]
        captions = caption_lists(table, columns.captions)
        splits = None if columns.split is None else _split_names(table, columns.split)
        found = self._labels(table, columns)
        if self.repeated_rows == "captions":
            kept = _merge(table, ids, paths, splits, found, captions)
            table = table.only(kept)
            ids, paths = [ids[row] for row in kept], [paths[row] for row in kept]
            found = [found[row] for row in kept]
            captions = None if captions is None else [captions[row] for row in kept]
            splits = None if splits is None else [splits[row] for row in kept]
        else:
            _check_ids(table, ids, "path" if columns.id is None else columns.id)
        classes, index = self._classes(found, table)
        labels = [[index(name, row) for name in names] for row, names in enumerate(found)]
        offsets = np.concatenate([[0], np.cumsum([len(row) for row in labels])]).astype(np.int64)
        values = np.asarray([label for row in labels for label in row], np.int32)
        if splits is None:
            splits = self.split(ids, rarest_label(offsets, values))
        task: Task = "multi_label" if columns.labels else "single_label"
        if not len(values):
            task = "unlabelled"
        require_some_image(
            root, paths, f"check dataset.root, and dataset.path_column of {self.file}"
        )
        return Manifest.build(
            kind=self.kind,
            root=root,
            ids=ids,
            paths=paths,
            splits=splits,
            labels=pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(values)),
            classes=classes,
            task=task,
            captions=captions,
        )

    def _columns(self, table: "Table") -> "_Columns":
        def pick(option: str, chosen: str | None, usual: str) -> str | None:
            if chosen is None:
                return usual if usual in table.columns else None
            if chosen not in table.columns:
                have = ", ".join(table.columns)
                table.fail(f"no column {chosen!r}; found {have}; set dataset.{option}")
            return chosen

        path = pick("path_column", self.path_column, "path")
        label = pick("label_column", self.label_column, "label")
        labels = pick("labels_column", self.labels_column, "labels")
        if label and labels:
            if self.label_column and self.labels_column:
                table.fail("label_column and labels_column are both set; keep one")
            if not (self.label_column or self.labels_column):
                table.fail(
                    "has both a column 'label' and a column 'labels'; set dataset.label_column "
                    "or dataset.labels_column"
                )
            label, labels = (label, None) if self.label_column else (None, labels)
        usual = tuple(name for name in ("caption", "captions") if name in table.columns)
        captions = usual if self.caption_columns is None else self.caption_columns
        return _Columns(
            path=str(path),
            id=pick("id_column", self.id_column, "id"),
            label=label,
            labels=labels,
            captions=[str(pick("caption_columns", name, name)) for name in captions],
            split=pick("split_column", self.split_column, "split"),
        )

    def _labels(self, table: "Table", columns: "_Columns") -> list[list[str]]:
        """Each row's class names, as written."""
        if columns.label is not None:
            texts = [_text(value) for value in table[columns.label]]
            return [[text] if text else [] for text in texts]
        if columns.labels is None:
            return [[] for _ in range(len(table))]
        cells = table[columns.labels]
        separator = self.label_separator
        if separator is None:
            separator = _separator(cells, table)
        found = []
        for row, cell in enumerate(cells):
            names = [_text(value) for value in _items(cell, separator.strip() or None, table, row)]
            names = [name for name in names if name]
            if len(set(names)) < len(names):
                table.fail("a label occurs twice in one cell; expected each once", row)
            found.append(names)
        return found

    def _classes(
        self, found: list[list[str]], table: "Table"
    ) -> tuple[pd.DataFrame, Callable[[str, int], int]]:
        """Class table, and a function from a label and its row to the class index."""
        if self.classes is None:
            distinct = {name for names in found for name in names}
            numeric = all(_is_integer(name) for name in distinct)
            names = sorted(distinct, key=(lambda n: (int(n), n)) if numeric else None)
            frame = pd.DataFrame({"name": names}, dtype=object)
        else:
            frame = read_classes(self.classes)
            names = frame["name"].tolist()
        known = {name: number for number, name in enumerate(names)}
        by_number = not any(_is_integer(name) for name in names)

        def index(label: str, row: int) -> int:
            number = known.get(label)
            if number is None and by_number and _is_integer(label):
                number = int(label) if 0 <= int(label) < len(names) else None
            if number is None:
                table.fail(
                    f"label {label!r} is not in {self.classes}; expected one of its {len(names)} "
                    "names or a number from 0",
                    row,
                )
            return number

        return frame, index


@dataclass(frozen=True)
class _Columns:
    path: str
    id: str | None
    label: str | None
    labels: str | None
    captions: list[str]
    split: str | None


@dataclass(frozen=True)
class Table:
    """Columns of a file, and where each row stands in it.

    Attributes:
        file: where it was read from.
        columns: cells by column name.
        lines: each row's place in the file, for messages.
        unit: what `lines` counts: "line" or "row".
    """

    file: Path
    columns: dict[str, list[Any]]
    lines: Sequence[int]
    unit: str

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, column: str) -> list[Any]:
        return self.columns[column]

    def only(self, rows: Sequence[int]) -> "Table":
        """The given rows; only their places are kept."""
        return Table(self.file, {}, [self.lines[row] for row in rows], self.unit)

    def where(self, row: int) -> str:
        """A row's place in words."""
        return f"{self.unit} {self.lines[row]}"

    def fail(self, message: str, row: int | None = None) -> NoReturn:
        """Raises `DatasetError` naming the file and, if given, the row."""
        place = f"{self.file}" if row is None else f"{self.file} {self.where(row)}"
        raise DatasetError(f"{place}: {message}")


def read_table(file: Path) -> Table:
    """A CSV, TSV or Parquet file's columns; CSV cells are strings.

    Raises:
        DatasetError: missing, not UTF-8, or malformed file, with the line.
    """
    if not file.is_file():
        raise DatasetError(f"{file}: no such file; expected a CSV or Parquet table")
    if file.suffix.lower() in (".parquet", ".pq"):
        try:
            table = pq.read_table(file)
        except (pa.ArrowInvalid, OSError) as error:
            raise DatasetError(f"{file}: not Parquet ({str(error).splitlines()[0]})") from None
        if len(set(table.column_names)) < len(table.column_names):
            raise DatasetError(f"{file}: a column name occurs twice")
        columns = {name: table.column(name).to_pylist() for name in table.column_names}
        return Table(file, columns, range(1, table.num_rows + 1), "row")
    return _read_csv(file, "\t" if file.suffix.lower() == ".tsv" else ",")


def _read_csv(file: Path, delimiter: str) -> Table:
    rows: list[list[str]] = []
    lines: list[int] = []
    with file.open(newline="", encoding="utf-8-sig") as stream:
        reader = csv.reader(stream, delimiter=delimiter, strict=True)
        start = 1
        try:
            header = [name.strip() for name in next(reader, [])]
            start = reader.line_num + 1
            for row in reader:
                if row:
                    if len(row) != len(header):
                        raise DatasetError(
                            f"{file} line {start}: found {len(row)} fields, expected "
                            f"{len(header)} as in the header; quote fields with commas"
                        )
                    rows.append(row)
                    lines.append(start)
                start = reader.line_num + 1
        except csv.Error as error:
            raise DatasetError(f"{file} line {start}: malformed quotes ({error})") from None
        except UnicodeDecodeError as error:
            raise DatasetError(f"{file}: not UTF-8 ({error.reason}); save it as UTF-8") from None
    if not header:
        raise DatasetError(f"{file}: empty; expected a header line with column names")
    if len(set(header)) < len(header):
        raise DatasetError(f"{file}: a column name occurs twice in the header")
    if not rows:
        raise DatasetError(f"{file}: a header but no rows")
    cells = [list(column) for column in zip(*rows, strict=True)]
    return Table(file, dict(zip(header, cells, strict=True)), lines, "line")


def read_classes(file: Path) -> pd.DataFrame:
    """Class table of a file: one name a line, or a .csv with a `name` column and metadata.

    Raises:
        DatasetError: missing, empty, or a name that occurs twice.
    """
    if file.suffix.lower() in (".csv", ".tsv", ".parquet"):
        table = read_table(file)
        if "name" not in table.columns:
            table.fail(f"no column 'name'; found {', '.join(table.columns)}")
        frame = pd.DataFrame(
            {name: [_text(value) for value in cells] for name, cells in table.columns.items()},
            dtype=object,
        )
    else:
        names = [line.text for line in read_lines(file, "class names, one a line")]
        frame = pd.DataFrame({"name": names}, dtype=object)
    repeated = frame["name"][frame["name"].duplicated()]
    if len(repeated):
        raise DatasetError(f"{file}: class {repeated.iloc[0]!r} is listed twice")
    if frame.empty or (frame["name"] == "").any():
        raise DatasetError(f"{file}: an empty class name, or no names at all")
    return frame


def _text(value: Any) -> str:
    """A cell as text; missing values are empty, whole floating-point numbers integers."""
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip()


def _is_integer(text: str) -> bool:
    return text.isascii() and text.removeprefix("-").isdigit()


def _items(cell: Any, separator: str | None, table: Table, row: int) -> list[Any]:
    """A list cell's elements; text is a JSON list or split at the separator (None = blanks)."""
    if isinstance(cell, list | tuple):
        return list(cell)
    text = _text(cell)
    if text.startswith("[") and text.endswith("]"):
        return _json_list(text, table, row)
    return text.split(separator)


def _json_list(text: str, table: Table, row: int) -> list[Any]:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        table.fail(f"found {text[:40]!r}, which is no JSON list ({error.msg})", row)
    return [] if values is None else list(values)


def _separator(cells: Iterable[Any], table: Table) -> str:
    texts = [cell for cell in cells if isinstance(cell, str) and not cell.lstrip().startswith("[")]
    found = [mark for mark in SEPARATORS if any(mark in text for text in texts)]
    if len(found) > 1:
        table.fail(
            f"labels contain both {found[0]!r} and {found[1]!r}; set dataset.label_separator"
        )
    return found[0] if found else " "


def _relative(value: Any, root: Path, table: Table, row: int) -> str:
    text = _text(value)
    if not text:
        table.fail("the image's path is empty", row)
    path = Path(text)
    if not path.is_absolute():
        return text
    try:
        return path.relative_to(root.absolute()).as_posix()
    except ValueError:
        table.fail(f"{text} is outside {root}; set dataset.root to a folder above it", row)


def caption_lists(table: Table, columns: Sequence[str]) -> list[list[str]] | None:
    """Each row's captions: cells hold one each or a JSON list of several; None without columns."""
    if not columns:
        return None
    captions: list[list[str]] = [[] for _ in range(len(table))]
    for column in columns:
        for row, cell in enumerate(table[column]):
            if isinstance(cell, list | tuple):
                texts: list[Any] = list(cell)
            elif isinstance(cell, str) and JSON_CAPTIONS.fullmatch(cell.strip()):
                texts = _json_list(cell, table, row)
            else:
                texts = [cell]
            captions[row] += [text for text in map(_text, texts) if text]
    return captions


def _split_names(table: Table, column: str) -> list[str]:
    names = []
    for row, value in enumerate(table[column]):
        text = _text(value)
        if not text:
            table.fail(f"column {column!r} is empty; expected train, val or test", row)
        names.append(ALIASES.get(text.lower(), text))
    return names


def _check_ids(table: Table, ids: Sequence[str], column: str) -> None:
    first: dict[str, int] = {}
    for row, text in enumerate(ids):
        if not text:
            table.fail(f"the id in column {column!r} is empty", row)
        if text in first:
            table.fail(
                f"{column} {text!r} was already on {table.where(first[text])}; ids must be unique "
                "(dataset.repeated_rows captions: such rows are captions of one image)",
                row,
            )
        first[text] = row


def _merge(
    table: Table,
    ids: Sequence[str],
    paths: Sequence[str],
    splits: Sequence[str] | None,
    found: Sequence[list[str]],
    captions: list[list[str]] | None,
) -> list[int]:
    """First row of each id; the captions of the others are added to it."""
    first: dict[str, int] = {}
    for row, text in enumerate(ids):
        one = first.setdefault(text, row)
        if one == row:
            continue
        for what, column in (("path", paths), ("split", splits), ("label", found)):
            if column is not None and column[row] != column[one]:
                table.fail(f"{text!r} has another {what} than on {table.where(one)}", row)
        if captions is not None:
            captions[one] += captions[row]
    return list(first.values())
