"""Small arrays of a cache, written and read a chunk at a time.

The tables of strings and labels have a row an image, so a dataset longer than memory has tables
longer than memory: they are filled as its rows come, and nobody has to hold one as a whole.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from featcache.layout.chunks import (
    CHECKSUM_BYTES,
    ArrayFiles,
    make_folder,
    require,
    sealed,
    write_chunk,
    write_file,
)

TABLE_CHUNK_ROWS = 65_536
"""Rows of a chunk of the small per-row arrays."""


@dataclass(frozen=True)
class ArrayPlan:
    """An array to be created.

    Attributes:
        path: name in the group, e.g. `image/projected`.
        shape: (rows, ...).
        dtype: numpy name, e.g. `float16`, or `string`.
        chunk_rows: rows of a chunk file.
        checksummed: whether chunks carry a crc32c.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    chunk_rows: int
    checksummed: bool = True

    @property
    def num_bytes(self) -> int:
        """Bytes on disk, the filled-up last chunk and the checksums included."""
        chunks = -(-self.shape[0] // self.chunk_rows)
        row_bytes = int(np.prod(self.shape[1:], dtype=np.int64)) * np.dtype(self.dtype).itemsize
        return chunks * (self.chunk_rows * row_bytes + CHECKSUM_BYTES * self.checksummed)


class TableWriter:
    """An array whose length is known when all of it has come; at most two chunks are in memory.

    Use as a context manager: leaving it writes the rest and the metadata, unless there was an
    error.
    """

    def __init__(self, root: Path, name: str, dtype: str, chunk_rows: int = TABLE_CHUNK_ROWS):
        """Writes nothing yet.

        Args:
            root: folder of the group.
            name: array.
            dtype: numpy name or `string`.
            chunk_rows: rows of a chunk file; fewer if the array turns out shorter.
        """
        self.num_rows = 0
        self._root, self._name, self._dtype, self._chunk_rows = root, name, dtype, chunk_rows
        self._waiting: list[Any] = []
        self._num_waiting = 0
        self._chunk = 0
        self._row_shape: tuple[int, ...] = ()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()

    def add(self, values: npt.NDArray[Any] | list[str] | pa.Array | pa.ChunkedArray) -> None:
        """Takes the next rows: numbers, or strings in a list or an Arrow array."""
        if self._dtype == "string":
            strings: Any = values if isinstance(values, list) else cast(Any, values).to_pylist()
            # Encoded at once: as bytes they take a third of what strings do.
            rows: Any = [_encode_string(text) for text in strings]
        else:
            rows = np.asarray(values, self._dtype)
            self._row_shape = rows.shape[1:]
        self.num_rows += len(rows)
        while len(rows):
            room = self._chunk_rows - self._num_waiting
            part = rows[:room]
            self._waiting.append(b"".join(part) if self._dtype == "string" else part)
            self._num_waiting += len(part)
            rows = rows[room:]
            if self._num_waiting == self._chunk_rows:
                self._write(self._chunk_rows)

    def close(self, attributes: Mapping[str, Any] | None = None) -> None:
        """Writes what is left, and the array's metadata with `attributes`."""
        chunk_rows = self._chunk_rows if self._chunk else max(1, self.num_rows)
        if self._num_waiting and 0 not in self._row_shape:
            self._write(chunk_rows)
        shape = (self.num_rows, *self._row_shape)
        plan = ArrayPlan(self._name, shape, self._dtype, min(chunk_rows, self._chunk_rows))
        write_document(self._root, self._name, array_document(plan, attributes or {}))

    def _write(self, chunk_rows: int) -> None:
        if self._dtype == "string":
            # Zarr's vlen-utf8: the number of strings, then the strings.
            filling = _encode_string("") * (chunk_rows - self._num_waiting)
            content: Any = b"".join([chunk_rows.to_bytes(4, "little"), *self._waiting, filling])
        else:
            values = np.full((chunk_rows, *self._row_shape), fill_value(self._dtype), self._dtype)
            np.concatenate(self._waiting, out=values[: self._num_waiting])
            content = values.reshape(-1).view(np.uint8)
        key = [str(self._chunk), *["0"] * len(self._row_shape)]
        write_chunk(self._root.joinpath(self._name, "c", *key), content, checksummed=True)
        self._waiting, self._num_waiting = [], 0
        self._chunk += 1


def write_array(
    root: Path,
    name: str,
    data: npt.NDArray[Any],
    chunk_rows: int,
    attributes: Mapping[str, Any] | None,
) -> None:
    """Writes a whole array with its metadata.

    Args:
        root: folder of the group.
        name: array.
        data: numbers, or an object array of `str`.
        chunk_rows: rows of a chunk file.
        attributes: plain JSON values kept with it.
    """
    strings = data.dtype == object
    writer = TableWriter(root, name, "string" if strings else str(data.dtype), chunk_rows)
    writer.add(data.tolist() if strings else data)
    writer.close(attributes)


def read_strings(files: ArrayFiles) -> Iterator[list[str]]:
    """The strings of a table, a chunk at a time, in order.

    Raises:
        CacheCorruptError: naming a damaged file.
    """
    files.fetch()
    for chunk in range(files.num_chunks):
        yield read_string_chunk(files, chunk)


def read_string_chunk(files: ArrayFiles, chunk: int) -> list[str]:
    """The strings of one chunk, without those that fill it up.

    Raises:
        CacheCorruptError: if the file is damaged.
    """
    files.fetch([chunk])
    require(files.problem(chunk))
    data = files.file(chunk).read_bytes()
    num = min(files.chunk_rows, files.shape[0] - chunk * files.chunk_rows)
    strings, place = [], 4
    for _ in range(num):
        size = int.from_bytes(data[place : place + 4], "little")
        strings.append(data[place + 4 : place + 4 + size].decode())
        place += 4 + size
    return strings


def _encode_string(text: str) -> bytes:
    """Length in bytes, then the bytes."""
    encoded = text.encode()
    return len(encoded).to_bytes(4, "little") + encoded


def write_document(root: Path, name: str, document: Mapping[str, Any]) -> None:
    """Writes a sealed `zarr.json`, and its folder if missing."""
    make_folder(root / name)
    write_file(root / name / "zarr.json", sealed(name, document))


def group_document(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """`zarr.json` of a group."""
    return {"zarr_format": 3, "node_type": "group", "attributes": dict(attributes)}


def array_document(plan: ArrayPlan, attributes: Mapping[str, Any]) -> dict[str, Any]:
    """`zarr.json` of an array of whole-row chunks without compression."""
    fill = fill_value(plan.dtype)
    if plan.dtype == "string":
        encoding: dict[str, Any] = {"name": "vlen-utf8", "configuration": {}}
    elif np.dtype(plan.dtype).itemsize == 1:
        encoding = {"name": "bytes"}
    else:
        encoding = {"name": "bytes", "configuration": {"endian": "little"}}
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(plan.shape),
        "data_type": plan.dtype,
        "chunk_grid": {
            "name": "regular",
            "configuration": {"chunk_shape": [plan.chunk_rows, *plan.shape[1:]]},
        },
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": "NaN" if isinstance(fill, float) else fill,
        "codecs": [encoding, {"name": "crc32c"}] if plan.checksummed else [encoding],
        "attributes": dict(attributes),
        "storage_transformers": [],
    }


def fill_value(dtype: str) -> bool | int | float | str:
    """What an unwritten element reads as: NaN for floats, so that nobody takes it for a feature."""
    if dtype == "string":
        return ""
    if dtype.startswith("float"):
        return float("nan")
    return False if dtype == "bool" else 0
