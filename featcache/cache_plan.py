"""What a cache is made of: its plan, and the groups, arrays and small tables it starts with."""

import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from featcache.chunks import (
    CHECKSUM_BYTES,
    ArrayFiles,
    make_folder,
    sealed,
    write_chunk,
    write_file,
)
from featcache.identity import Identity
from featcache.manifest import Manifest, class_hash

FORMAT = 1
TABLE_CHUNK_ROWS = 65_536
"""Rows of a chunk of the small per-row arrays."""
_REPORTED = ("torch", "open_clip_torch", "numpy", "zarr", "featcache")

ShardKind = Literal["image", "text"]


@dataclass(frozen=True)
class ArrayPlan:
    """An array to be created.

    Attributes:
        path: name in the group, e.g. `image/projected`.
        shape: (rows, ...).
        dtype: numpy name, e.g. `float16`.
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


@dataclass(frozen=True)
class Shard:
    """A range of rows that is extracted, written and marked done as one.

    Attributes:
        kind: "image" (rows of the image arrays) or "text" (captions).
        index: position among the shards of its kind.
        start, stop: rows [start, stop).
    """

    kind: ShardKind
    index: int
    start: int
    stop: int

    @property
    def key(self) -> str:
        """Name for logs, e.g. `image/00012`."""
        return f"{self.kind}/{self.index:05d}"


@dataclass(frozen=True)
class CachePlan:
    """Everything that `create` needs.

    Attributes:
        identity: what the cache will hold.
        manifest: rows and classes.
        arrays: feature arrays (`image/...`, `text/...`); the small ones are added by the store.
        shards: ranges of rows; each starts and ends at a chunk boundary of every array of its kind.
        attributes: further plain JSON values for the group (backbone, dataset, logit_scale, ...).
    """

    identity: Identity
    manifest: Manifest
    arrays: tuple[ArrayPlan, ...]
    shards: tuple[Shard, ...]
    attributes: dict[str, Any]

    @property
    def row_arrays(self) -> tuple[ArrayPlan, ...]:
        """Arrays written shard by shard: the feature arrays, and what is known of each image."""
        images = [shard for shard in self.shards if shard.kind == "image"]
        num_rows = len(self.manifest)
        chunk_rows = images[0].stop - images[0].start if images else num_rows
        named = {plan.path for plan in self.arrays}
        small = (
            ArrayPlan("rows/valid", (num_rows,), "bool", chunk_rows),
            ArrayPlan("rows/content", (num_rows,), "uint64", chunk_rows),
            ArrayPlan("rows/stamp", (num_rows,), "uint64", chunk_rows),
        )
        return self.arrays + tuple(plan for plan in small if plan.path not in named)

    @property
    def num_bytes(self) -> int:
        """Bytes on disk, tables of strings included (their length is that of the manifest's)."""
        return sum(plan.num_bytes for plan in self.row_arrays) + int(self.manifest.rows.nbytes)

    def describe(self) -> str:
        """Rows, shards, bytes per array and their sum, one line each."""
        lines = [
            f"{len(self.manifest)} rows, {self.manifest.num_classes} classes, "
            f"{len(self.shards)} shards"
        ]
        for plan in self.arrays:
            shape = " x ".join(str(size) for size in plan.shape)
            lines.append(f"  {plan.path:<16} {shape} {plan.dtype}, {human_bytes(plan.num_bytes)}")
        return "\n".join([*lines, f"  total            {human_bytes(self.num_bytes)}"])


def check_plan(plan: CachePlan) -> None:
    """Checks that no shard cuts a chunk.

    Raises:
        ValueError: naming the shard and the array.
    """
    for array in plan.row_arrays:
        kind = "text" if array.path.startswith("text/") else "image"
        for shard in plan.shards:
            ends = shard.stop % array.chunk_rows == 0 or shard.stop == array.shape[0]
            if shard.kind == kind and (shard.start % array.chunk_rows or not ends):
                raise ValueError(
                    f"shard {shard.key} ({shard.start}..{shard.stop}) cuts chunks of "
                    f"{array.chunk_rows} rows of {array.path}"
                )


def build(root: Path, plan: CachePlan) -> None:
    """Writes to `root` what a cache starts with: groups, array metadata, small tables."""
    manifest = plan.manifest
    shards: dict[str, list[tuple[int, int]]] = {"image": [], "text": []}
    for shard in sorted(plan.shards, key=lambda shard: shard.index):
        assert shard.index == len(shards[shard.kind]), f"shard {shard.key} is out of order"
        shards[shard.kind].append((shard.start, shard.stop))
    names: dict[str, list[str]] = {"image": [], "text": [], "table": []}
    for array in plan.row_arrays:
        names["text" if array.path.startswith("text/") else "image"].append(array.path)
    tables = _tables(manifest)
    names["table"] = list(tables)
    columns = [name for name in manifest.classes.columns if name not in ("name", "count")]
    attributes = {
        "root": str(manifest.root),
        "versions": _versions(),
        **plan.attributes,
        "format": FORMAT,
        "identity": plan.identity.record(),
        "fingerprint": plan.identity.fingerprint(),
        "task": manifest.task,
        "num_rows": len(manifest),
        "num_captions": manifest.num_captions,
        "splits": {name: list(rows) for name, rows in manifest.split_ranges.items()},
        "class_columns": columns,
        "class_hash": class_hash(manifest.classes["name"].tolist()),
        "shards": shards,
        "arrays": names,
        "complete": False,
    }
    _write_document(root, "", _group({"featcache": attributes}))
    for group in ("image", "text", "rows", "classes", "class_text", "shards"):
        _write_document(root, group, _group({}))
    for array in plan.row_arrays:
        _write_document(root, array.path, _array(array, {}))
        make_folder(root / array.path / "c")
    for kind, ranges in shards.items():
        done = ArrayPlan(f"shards/{kind}", (len(ranges),), "string", 1)
        _write_document(root, done.path, _array(done, {}))
    for name, data in tables.items():
        write_array(root, name, data, TABLE_CHUNK_ROWS, None)


def _tables(manifest: Manifest) -> dict[str, npt.NDArray[Any]]:
    """The small arrays that are known before anything is extracted."""
    strings = {
        "rows/id": manifest.ids,
        "rows/path": manifest.paths,
        "rows/split": manifest.splits,
        "rows/caption_values": manifest.caption_values,
    }
    for column in manifest.classes.columns:
        if column != "count":
            strings[f"classes/{column}"] = manifest.classes[column].astype(str).tolist()
    tables: dict[str, npt.NDArray[Any]] = {
        "rows/label_values": manifest.label_values,
        "rows/label_offsets": manifest.label_offsets,
        "text/offsets": manifest.caption_offsets,
        "classes/count": manifest.classes["count"].to_numpy(dtype=np.int64),
    }
    tables.update((name, np.array(values, dtype=object)) for name, values in strings.items())
    return tables


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
    dtype = "string" if data.dtype == object else str(data.dtype)
    plan = ArrayPlan(name, data.shape, dtype, max(1, min(chunk_rows, len(data))))
    _write_document(root, name, _array(plan, attributes or {}))
    files = ArrayFiles.open(root, name)
    if data.size == 0:
        return
    if files.dtype is not None:
        files.write(0, data, fill_value(dtype))
        return
    for chunk in range(files.num_chunks):
        strings = data[chunk * plan.chunk_rows : (chunk + 1) * plan.chunk_rows].tolist()
        strings += [""] * (plan.chunk_rows - len(strings))
        write_chunk(files.file(chunk), _encode_strings(strings), checksummed=True)


def _encode_strings(strings: list[str]) -> bytes:
    """Zarr's vlen-utf8: number of strings, then length in bytes and bytes of each."""
    encoded = [text.encode() for text in strings]
    parts = [len(encoded).to_bytes(4, "little")]
    for text in encoded:
        parts += (len(text).to_bytes(4, "little"), text)
    return b"".join(parts)


def _write_document(root: Path, name: str, document: Mapping[str, Any]) -> None:
    make_folder(root / name)
    write_file(root / name / "zarr.json", sealed(name, document))


def _group(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {"zarr_format": 3, "node_type": "group", "attributes": dict(attributes)}


def _array(plan: ArrayPlan, attributes: Mapping[str, Any]) -> dict[str, Any]:
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


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in _REPORTED}


def human_bytes(num_bytes: float) -> str:
    """A size for people, e.g. `12.3 MB`."""
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} GB"
