"""The one table that every dataset becomes: rows, classes, and hashes over them.

Rows are joined by `id`, never by position. They are kept in split order (train, val, test, then any
other name), inside a split in the order the dataset gives, so that a split is one contiguous range.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from featcache.errors import DatasetError
from featcache.identity import DatasetIdentity, ListHash, hash_strings
from featcache.row_block import ROW_SCHEMA, RowBlock
from featcache.storage import StoreUrl

Task = Literal["single_label", "multi_label", "unlabelled"]

BLOCK_ROWS = 16_384
"""Rows of a block where nothing else decides it."""

SPLITS = ("train", "val", "test")
"""Splits in storage order; other names follow, sorted."""


@dataclass(frozen=True)
class Manifest:
    """A dataset as one row table and one class table.

    Attributes:
        kind: dataset kind, e.g. `folder`.
        root: folder or address that the rows' paths start from.
        rows: Arrow table of `ROW_SCHEMA`, N rows.
        classes: C rows in index order; column `name` (unique), `count` (training images with the
            class) and any metadata as string columns (genus, family, …).
        task: how the labels are to be read.
    """

    kind: str
    root: Path | StoreUrl
    rows: pa.Table
    classes: pd.DataFrame
    task: Task

    @classmethod
    def build(
        cls,
        *,
        kind: str,
        root: str | Path,
        ids: Sequence[str] | pa.Array,
        paths: Sequence[str] | pa.Array,
        splits: Sequence[str] | pa.Array,
        labels: Sequence[Sequence[int]] | pa.Array,
        classes: pd.DataFrame,
        task: Task,
        captions: Sequence[Sequence[str]] | pa.Array | None = None,
    ) -> "Manifest":
        """A checked manifest with rows in split order and training counts filled in.

        Args:
            kind: dataset kind.
            root: folder that `paths` start from.
            ids: N unique strings.
            paths: N paths relative to `root`, with forward slashes.
            splits: N split names.
            labels: N lists of class indices; empty = unlabelled (single-label) or no positive.
            classes: C rows with a unique `name` column; further columns are metadata.
            task: single_label, multi_label or unlabelled.
            captions: N lists of captions; None = no captions.

        Raises:
            DatasetError: empty set, duplicate id or class name, label out of range, or more than
                one label in a single-label set.
        """
        try:
            rows = _rows(ids, paths, splits, labels, captions)
        except UnicodeEncodeError as error:
            shown = error.object.encode(errors="replace").decode()
            raise DatasetError(
                f"{root}: the {kind} dataset holds text that is not Unicode, {shown[:80]!r}; "
                "rename the file, or mend the text"
            ) from None
        if len(rows) == 0:
            raise DatasetError(
                f"{root}: the {kind} dataset has no rows; check the path and options"
            )
        _check_unique(rows.column("id"), f"{root}: id")
        names = classes["name"].astype(str)
        if names.duplicated().any():
            raise DatasetError(
                f"{root}: class {names[names.duplicated()].iloc[0]!r} is listed twice; "
                "class names must be unique"
            )
        _check_labels(rows, len(classes), task, str(root))
        rows = rows.take(pa.array(_split_order(rows.column("split"))))
        counts = _train_counts(rows, len(classes))
        table = classes.drop(columns=["count"], errors="ignore").reset_index(drop=True)
        table = table.fillna("").astype(str)
        return cls(kind, Path(root), rows.combine_chunks(), table.assign(count=counts), task)

    def __len__(self) -> int:
        return int(self.rows.num_rows)

    @property
    def num_classes(self) -> int:
        """C."""
        return len(self.classes)

    @cached_property
    def _whole(self) -> RowBlock:
        return RowBlock(0, self.rows)

    def block(self, start: int, stop: int) -> RowBlock:
        """The rows [start, stop); what extraction reads, a shard at a time."""
        rows = self.rows.slice(start, stop - start)
        return RowBlock(start, rows, int(self.caption_offsets[start]))

    def blocks(self, size: int = BLOCK_ROWS) -> Iterator[RowBlock]:
        """All rows in order, `size` at a time."""
        for start in range(0, len(self), size):
            yield self.block(start, min(start + size, len(self)))

    @property
    def num_bytes(self) -> int:
        """Bytes of the rows' strings and labels, about what the cache's tables take."""
        return int(self.rows.nbytes)

    @property
    def num_captions(self) -> int:
        """M, captions of all rows."""
        return int(self.caption_offsets[-1])

    def captions(self, start: int, stop: int) -> list[str]:
        """Captions [start, stop), counted over all rows."""
        return self.caption_values[start:stop]

    @cached_property
    def split_ranges(self) -> dict[str, tuple[int, int]]:
        """Rows [start, stop) of each split, in storage order."""
        names = self.rows.column("split").combine_chunks().dictionary_encode()
        counts = np.bincount(names.indices.to_numpy(), minlength=len(names.dictionary))
        ranges: dict[str, tuple[int, int]] = {}
        start = 0
        for name, count in zip(names.dictionary.to_pylist(), counts.tolist(), strict=True):
            ranges[name] = (start, start + count)
            start += count
        return ranges

    @cached_property
    def ids(self) -> list[str]:
        """The N row ids, in row order."""
        return self._whole.ids

    @cached_property
    def paths(self) -> list[str]:
        """The N paths relative to `root`, in row order."""
        return self._whole.paths

    @cached_property
    def splits(self) -> list[str]:
        """The N split names, in row order."""
        return self._whole.splits

    @cached_property
    def label_offsets(self) -> npt.NDArray[np.int64]:
        """(N+1,) start of each row's labels in `label_values`."""
        return self._whole.label_offsets

    @cached_property
    def label_values(self) -> npt.NDArray[np.int32]:
        """All rows' class indices, one after the other."""
        return self._whole.label_values

    @cached_property
    def caption_offsets(self) -> npt.NDArray[np.int64]:
        """(N+1,) start of each row's captions in `caption_values`."""
        return self._whole.caption_offsets

    @cached_property
    def caption_values(self) -> list[str]:
        """All M captions, one row's after the other."""
        return self._whole.captions

    def limited(self, limit: int) -> "Manifest":
        """`limit` rows of each split, at even steps: of n rows, row floor(i n / limit) for each i.

        Many datasets lie sorted by class, so that the first rows are of one class alone.
        """
        kept = []
        for start, stop in self.split_ranges.values():
            count = min(limit, stop - start)
            kept.append(start + np.arange(count) * (stop - start) // max(count, 1))
        return self.only(np.concatenate(kept))

    def only(self, kept: npt.NDArray[np.int64]) -> "Manifest":
        """The given rows, in ascending order; training counts are those of the kept rows."""
        rows = self.rows.take(pa.array(kept)).combine_chunks()
        classes = self.classes.assign(count=_train_counts(rows, self.num_classes))
        return Manifest(self.kind, self.root, rows, classes, self.task)

    @cached_property
    def identity(self) -> DatasetIdentity:
        """Hashes over rows, labels, classes and captions."""
        hashes = RowHashes()
        for block in self.blocks():
            hashes.update(block)
        return hashes.identity(self.kind, self.task, self.classes["name"].tolist())


def rows_hash(ids: ListHash, paths: ListHash, splits: ListHash) -> str:
    """Hash over ids, paths and splits."""
    return hash_strings([digest.hexdigest() for digest in (ids, paths, splits)])


class RowHashes:
    """The hashes of a `DatasetIdentity`, fed block by block in row order."""

    def __init__(self) -> None:
        self._num_rows = 0
        self._columns = {name: ListHash() for name in ("id", "path", "split")}
        self._labels, self._caption_counts, self._captions = ListHash(), ListHash(), ListHash()

    def update(self, block: RowBlock) -> None:
        """Takes the next rows."""
        self._num_rows += len(block)
        for name, digest in self._columns.items():
            digest.update_strings(block.rows.column(name))
        labels = block.label_values.astype("<i8")
        self._labels.update(np.diff(block.label_offsets), labels.data)
        self._caption_counts.update(np.diff(block.caption_offsets), b"")
        self._captions.update_strings(pc.list_flatten(block.rows.column("captions")))

    def identity(self, kind: str, task: Task, class_names: Sequence[str]) -> DatasetIdentity:
        """The identity of a dataset whose rows have all been taken."""
        captions = [self._caption_counts.hexdigest(), self._captions.hexdigest()]
        return DatasetIdentity(
            kind=kind,
            task=task,
            num_rows=self._num_rows,
            rows=rows_hash(*self._columns.values()),
            labels=self._labels.hexdigest(),
            classes=class_hash(class_names),
            captions=hash_strings(captions),
        )


def class_hash(names: Sequence[str]) -> str:
    """Hash over class names in index order: what a head compares before it reads a cache."""
    return hash_strings(list(names))


def _check_unique(column: pa.ChunkedArray, what: str) -> None:
    if pc.count_distinct(column).as_py() == len(column):
        return
    counts = pc.value_counts(column.combine_chunks())
    repeated = counts.filter(pc.greater(counts.field("counts"), 1))[0]
    raise DatasetError(
        f"{what} {repeated['values'].as_py()!r} occurs {repeated['counts'].as_py()} times; "
        "ids must be unique"
    )


def _rows(
    ids: Sequence[str] | pa.Array,
    paths: Sequence[str] | pa.Array,
    splits: Sequence[str] | pa.Array,
    labels: Sequence[Sequence[int]] | pa.Array,
    captions: Sequence[Sequence[str]] | pa.Array | None,
) -> pa.Table:
    """The rows as Arrow; see `Manifest.build`."""
    values = [ids, paths, splits, labels, [[]] * len(ids) if captions is None else captions]
    columns = [pa.array(one, field.type) for one, field in zip(values, ROW_SCHEMA, strict=True)]
    return pa.table(columns, schema=ROW_SCHEMA)


def _check_labels(rows: pa.Table, num_classes: int, task: Task, root: str) -> None:
    values = pc.list_flatten(rows.column("labels"))
    if len(values):
        bounds = pc.min_max(values).as_py()
        if bounds["min"] < 0 or bounds["max"] >= num_classes:
            bad = bounds["min"] if bounds["min"] < 0 else bounds["max"]
            raise DatasetError(f"{root}: label {bad} lies outside 0..{num_classes - 1}")
    if task == "single_label":
        longest = pc.max(pc.list_value_length(rows.column("labels"))).as_py()
        if longest > 1:
            raise DatasetError(f"{root}: a row of a single-label set has {longest} labels")


def _split_order(column: pa.ChunkedArray) -> npt.NDArray[np.int64]:
    encoded = column.combine_chunks().dictionary_encode()
    names = encoded.dictionary.to_pylist()
    known = {name: rank for rank, name in enumerate(SPLITS)}
    ranks = {name: rank for rank, name in enumerate(sorted(set(names) - set(SPLITS)), len(SPLITS))}
    rank_of = np.asarray([{**ranks, **known}[name] for name in names])
    return np.argsort(rank_of[encoded.indices.to_numpy()], kind="stable")


def _train_counts(rows: pa.Table, num_classes: int) -> npt.NDArray[np.int64]:
    train = rows.filter(pc.equal(rows.column("split"), "train"))
    values = pc.list_flatten(train.column("labels")).to_numpy()
    return np.bincount(values, minlength=num_classes).astype(np.int64)


__all__ = [
    "BLOCK_ROWS",
    "ROW_SCHEMA",
    "SPLITS",
    "Manifest",
    "RowBlock",
    "RowHashes",
    "Task",
    "class_hash",
    "rows_hash",
]
