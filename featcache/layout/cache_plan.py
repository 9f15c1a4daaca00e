"""What a cache is made of: its plan, and the groups, arrays and small tables it starts with."""

import importlib.metadata
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from featcache.identity import Identity
from featcache.layout.chunks import make_folder
from featcache.layout.quantize import SCALE
from featcache.layout.tables import (
    TABLE_CHUNK_ROWS,
    ArrayPlan,
    TableWriter,
    array_document,
    group_document,
    write_array,
    write_document,
)
from featcache.manifest import Manifest, class_hash

FORMAT = 1
_REPORTED = ("torch", "open_clip_torch", "numpy", "zarr", "featcache")

ShardKind = Literal["image", "text"]


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
        return sum(plan.num_bytes for plan in self.row_arrays) + self.manifest.num_bytes

    def describe(self) -> str:
        """Rows, shards, bytes per array and their sum, one line each."""
        lines = [
            f"{len(self.manifest)} rows, {self.manifest.num_classes} classes, "
            f"{len(self.shards)} shards"
        ]
        sizes = {plan.path: plan.num_bytes for plan in self.arrays}
        width = max(16, *map(len, sizes))
        for plan in self.arrays:
            shape = " x ".join(str(size) for size in plan.shape)
            line = f"  {plan.path:<{width}} {shape} {plan.dtype}, {human_bytes(plan.num_bytes)}"
            if plan.dtype == "int8":
                whole = plan.num_bytes + sizes[plan.path + SCALE]
                half = replace(plan, dtype="float16")
                line += (
                    f" ({human_bytes(whole)} with scales; float16 would take "
                    f"{human_bytes(half.num_bytes)})"
                )
            lines.append(line)
        return "\n".join([*lines, f"  {'total':<{width}} {human_bytes(self.num_bytes)}"])


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
    names["table"] = _write_tables(root, manifest)
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
    write_document(root, "", group_document({"featcache": attributes}))
    for group in ("image", "text", "rows", "classes", "class_text", "shards"):
        write_document(root, group, group_document({}))
    for array in plan.row_arrays:
        write_document(root, array.path, array_document(array, {}))
        make_folder(root / array.path / "c")
    for kind, ranges in shards.items():
        done = ArrayPlan(f"shards/{kind}", (len(ranges),), "string", 1)
        write_document(root, done.path, array_document(done, {}))


def _write_tables(root: Path, manifest: Manifest) -> list[str]:
    """Writes the small arrays that are known before anything is extracted; returns their names."""
    for column in manifest.classes.columns:
        if column != "count":
            names = np.array(manifest.classes[column].astype(str).tolist(), dtype=object)
            write_array(root, f"classes/{column}", names, TABLE_CHUNK_ROWS, None)
    counts = manifest.classes["count"].to_numpy(dtype=np.int64)
    write_array(root, "classes/count", counts, TABLE_CHUNK_ROWS, None)
    dtypes = {
        "rows/id": "string",
        "rows/path": "string",
        "rows/split": "string",
        "rows/label_offsets": "int64",
        "rows/label_values": "int32",
        "rows/caption_values": "string",
        "text/offsets": "int64",
    }
    with ExitStack() as stack:
        tables = {
            name: stack.enter_context(TableWriter(root, name, dtype))
            for name, dtype in dtypes.items()
        }
        for name in ("rows/label_offsets", "text/offsets"):
            tables[name].add(np.zeros(1, np.int64))
        for block in manifest.blocks():
            for column in ("id", "path", "split"):
                tables[f"rows/{column}"].add(block.rows.column(column))
            labels = tables["rows/label_values"]
            tables["rows/label_offsets"].add(block.label_offsets[1:] + labels.num_rows)
            labels.add(block.label_values)
            tables["text/offsets"].add(block.caption_offsets[1:] + block.caption_start)
            tables["rows/caption_values"].add(block.captions)
    return [*dtypes, *(f"classes/{column}" for column in manifest.classes.columns)]


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in _REPORTED}


def human_bytes(num_bytes: float) -> str:
    """A size for people, e.g. `12.3 MB`."""
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} GB"
