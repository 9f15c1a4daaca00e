"""A manifest whose rows stay on disk: for datasets longer than memory."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from featcache.manifest import BLOCK_ROWS, Manifest, Task
from featcache.row_block import ROW_SCHEMA, RowBlock
from featcache.storage import StoreUrl

_PARTS_IN_MEMORY = 4


@dataclass(frozen=True)
class Part:
    """A run of rows that are loaded together, e.g. those of one tar.

    Attributes:
        name: what `load` knows it by.
        split: the split of all its rows.
        num_rows, num_captions: how many of each it has.
        num_bytes: about what its rows take in a cache's tables.
        label_counts: images by class index.
        first: how many of its rows are used, from its beginning; None = all.
    """

    name: str
    split: str
    num_rows: int
    num_captions: int
    num_bytes: int
    label_counts: Mapping[int, int]
    first: int | None = None


class StreamedManifest(Manifest):
    """Rows in parts that are loaded when they are asked for; a few parts are in memory at a time.

    Per part, not per row, it holds a name and a few numbers. `block`, `blocks`, `captions`,
    `split_ranges`, `limited` and `identity` work in that memory; everything else of a `Manifest`
    (`rows`, `ids`, `only`, …) loads all rows and is for datasets that are small after all.
    """

    parts: tuple[Part, ...]
    _load_part: Callable[[str], pa.Table]
    _load: Callable[[int], pa.Table]

    def __init__(
        self,
        *,
        kind: str,
        root: Path | StoreUrl,
        classes: pd.DataFrame,
        task: Task,
        parts: Sequence[Part],
        load: Callable[[str], pa.Table],
    ) -> None:
        """Checks nothing: ids have to be unique and labels in range by construction.

        Args:
            kind: dataset kind.
            root: what the rows' paths start from.
            classes: C rows with a unique `name` column; `count` is filled in.
            task: single_label, multi_label or unlabelled.
            parts: in row order; those of a split one behind the other.
            load: the rows of a part, by its name, as a table of `ROW_SCHEMA`.
        """
        used = tuple(part for part in parts if part.num_rows)
        counts = np.zeros(len(classes), np.int64)
        for part in used:
            if part.split == "train":
                for label, count in part.label_counts.items():
                    counts[label] += count
        values = {
            "kind": kind,
            "root": root,
            "classes": classes.assign(count=counts),
            "task": task,
            "parts": used,
            "_load_part": load,
            "_load": lru_cache(_PARTS_IN_MEMORY)(lambda number: used_rows(used[number], load)),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)  # the base class is frozen

    def __len__(self) -> int:
        return int(self._row_starts[-1])

    @cached_property
    def _row_starts(self) -> npt.NDArray[np.int64]:
        return np.cumsum([0, *(part.num_rows for part in self.parts)], dtype=np.int64)

    @cached_property
    def _caption_starts(self) -> npt.NDArray[np.int64]:
        return np.cumsum([0, *(part.num_captions for part in self.parts)], dtype=np.int64)

    @property
    def num_captions(self) -> int:
        """M, captions of all rows."""
        return int(self._caption_starts[-1])

    @property
    def num_bytes(self) -> int:
        """Bytes of the rows' strings and labels, about what the cache's tables take."""
        return sum(part.num_bytes for part in self.parts)

    @cached_property
    def split_ranges(self) -> dict[str, tuple[int, int]]:
        """Rows [start, stop) of each split, in storage order."""
        ranges: dict[str, tuple[int, int]] = {}
        for part, start in zip(self.parts, self._row_starts.tolist(), strict=False):
            first, stop = ranges.get(part.split, (start, start))
            assert stop == start, f"parts of split {part.split!r} are not one behind the other"
            ranges[part.split] = (first, start + part.num_rows)
        return ranges

    def block(self, start: int, stop: int) -> RowBlock:
        """The rows [start, stop)."""
        pieces = []
        for number in _overlapping(self._row_starts, start, stop):
            first = int(self._row_starts[number])
            table = self._load(number)
            pieces.append(table.slice(max(0, start - first), stop - max(start, first)))
        rows = pa.concat_tables(pieces) if pieces else ROW_SCHEMA.empty_table()
        return RowBlock(start, rows, self._captions_before(start))

    def _captions_before(self, row: int) -> int:
        number = int(np.searchsorted(self._row_starts, row, side="right")) - 1
        count = int(self._caption_starts[number])
        inside = row - int(self._row_starts[number])
        if inside:
            before = self._load(number).column("captions").slice(0, inside)
            count += int(pc.sum(pc.list_value_length(before)).as_py())
        return count

    def blocks(self, size: int = BLOCK_ROWS) -> Iterator[RowBlock]:
        """All rows in order, `size` at a time."""
        for start in range(0, len(self), size):
            yield self.block(start, min(start + size, len(self)))

    def captions(self, start: int, stop: int) -> list[str]:
        """Captions [start, stop), counted over all rows."""
        found: list[str] = []
        for number in _overlapping(self._caption_starts, start, stop):
            first = int(self._caption_starts[number])
            texts = pc.list_flatten(self._load(number).column("captions"))
            found += texts.slice(max(0, start - first), stop - max(start, first)).to_pylist()
        return found

    def limited(self, limit: int) -> Manifest:
        """The first `limit` rows of each split; rows spread over it would all have to be read."""
        parts = []
        for name, (start, stop) in self.split_ranges.items():
            left = min(limit, stop - start)
            for part in (part for part in self.parts if part.split == name):
                if left:
                    parts.append(part if part.num_rows <= left else self._cut(part, left))
                    left -= parts[-1].num_rows
        return StreamedManifest(
            kind=self.kind,
            root=self.root,
            classes=self.classes,
            task=self.task,
            parts=parts,
            load=self._load_part,
        )

    def _cut(self, part: Part, num_rows: int) -> Part:
        return cut(part, num_rows, self._load_part(part.name))

    @cached_property
    def rows(self) -> pa.Table:
        """All rows in memory."""
        return self.block(0, len(self)).rows.combine_chunks()


def used_rows(part: Part, load: Callable[[str], pa.Table]) -> pa.Table:
    """The rows of a part that are used."""
    table = load(part.name)
    return table if part.first is None else table.slice(0, part.first)


def cut(part: Part, num_rows: int, table: pa.Table) -> Part:
    """The first `num_rows` rows of a part whose rows are `table`."""
    rows = RowBlock(0, table.slice(0, num_rows))
    labels, counts = np.unique(rows.label_values, return_counts=True)
    return replace(
        part,
        num_rows=num_rows,
        num_captions=int(rows.caption_offsets[-1]),
        num_bytes=part.num_bytes * num_rows // part.num_rows,
        label_counts=dict(zip(labels.tolist(), counts.tolist(), strict=True)),
        first=num_rows,
    )


def _overlapping(starts: npt.NDArray[np.int64], start: int, stop: int) -> range:
    """Numbers of the parts that hold something of [start, stop)."""
    if start >= stop:
        return range(0)
    first = int(np.searchsorted(starts, start, side="right")) - 1
    return range(first, int(np.searchsorted(starts, stop, side="left")))
