"""A range of a dataset's rows: what extraction and the cache's tables read at a time.

A dataset may be longer than memory, so nobody asks for all of its rows; everybody asks for blocks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

ROW_SCHEMA = pa.schema(
    [
        ("id", pa.large_string()),
        ("path", pa.large_string()),
        ("split", pa.large_string()),
        ("labels", pa.large_list(pa.int32())),
        ("captions", pa.large_list(pa.large_string())),
    ]
)
"""One row an image. `path` is relative to the manifest's root; a row of a single-label set has one
label or, when unlabelled, none."""


@dataclass(frozen=True)
class RowBlock:
    """Rows [start, stop) of a dataset.

    Attributes:
        start: number of the first row.
        rows: Arrow table of `ROW_SCHEMA`, n rows.
        caption_start: number of the first caption, counted over all rows before.
    """

    start: int
    rows: pa.Table
    caption_start: int = 0

    @classmethod
    def of(
        cls,
        ids: Sequence[str],
        paths: Sequence[str],
        captions: Sequence[Sequence[str]] | None = None,
    ) -> "RowBlock":
        """Rows that belong to no dataset: unlabelled, of no split, counted from 0."""
        none: list[list[str]] = [[]] * len(ids)
        columns = [ids, paths, [""] * len(ids), none, none if captions is None else captions]
        arrays = [
            pa.array(list(column), field.type)
            for column, field in zip(columns, ROW_SCHEMA, strict=True)
        ]
        return cls(0, pa.table(arrays, schema=ROW_SCHEMA))

    def __len__(self) -> int:
        return int(self.rows.num_rows)

    @property
    def stop(self) -> int:
        """Number of the row behind the last one."""
        return self.start + len(self)

    @cached_property
    def ids(self) -> list[str]:
        """The n row ids."""
        return list(self.rows.column("id").to_pylist())

    @cached_property
    def paths(self) -> list[str]:
        """The n paths, as `image_bytes.read_bytes` takes them."""
        return list(self.rows.column("path").to_pylist())

    @cached_property
    def splits(self) -> list[str]:
        """The n split names."""
        return list(self.rows.column("split").to_pylist())

    @cached_property
    def label_offsets(self) -> npt.NDArray[np.int64]:
        """(n+1,) start of each row's labels in `label_values`."""
        return _offsets(self.rows.column("labels"))

    @cached_property
    def label_values(self) -> npt.NDArray[np.int32]:
        """The rows' class indices, one row's after the other."""
        values = pc.list_flatten(self.rows.column("labels"))
        return np.asarray(values.to_numpy(), dtype=np.int32)

    @cached_property
    def caption_offsets(self) -> npt.NDArray[np.int64]:
        """(n+1,) start of each row's captions in `captions`."""
        return _offsets(self.rows.column("captions"))

    @cached_property
    def captions(self) -> list[str]:
        """The rows' captions, one row's after the other."""
        return list(pc.list_flatten(self.rows.column("captions")).to_pylist())


def _offsets(column: pa.ChunkedArray) -> npt.NDArray[np.int64]:
    lengths = pc.list_value_length(column).to_numpy()
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
