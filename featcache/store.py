"""The Zarr layout of a cache: create, open, write a shard, mark it done, finish, verify.

A cache is a plain Zarr v3 group that any Zarr library reads. What is added here is only about not
losing anything: chunk files are on disk before a shard is marked done, creation is one rename, one
process writes at a time, and every byte of every file is covered by a checksum.
"""

import importlib.metadata
import json
import os
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from filelock import FileLock, Timeout

from featcache.chunks import (
    CHECKSUM_BYTES,
    PARTIAL,
    ArrayFiles,
    make_folder,
    read_sealed,
    sealed,
    sync_folder,
    write_chunk,
    write_file,
)
from featcache.errors import CacheCorruptError, CacheError
from featcache.identity import Identity
from featcache.manifest import Manifest, class_hash

FORMAT = 1
TABLE_CHUNK_ROWS = 65_536
"""Rows of a chunk of the small per-row arrays."""
_SPARE_BYTES = 64 << 20
"""Room that has to stay free beyond what the plan needs."""
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
        """Arrays written shard by shard: the feature arrays, `rows/valid` and `rows/content`."""
        images = [shard for shard in self.shards if shard.kind == "image"]
        num_rows = len(self.manifest)
        chunk_rows = images[0].stop - images[0].start if images else num_rows
        named = {plan.path for plan in self.arrays}
        small = (
            ArrayPlan("rows/valid", (num_rows,), "bool", chunk_rows),
            ArrayPlan("rows/content", (num_rows,), "uint64", chunk_rows),
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
            lines.append(f"  {plan.path:<16} {shape} {plan.dtype}, {_size(plan.num_bytes)}")
        return "\n".join([*lines, f"  total            {_size(self.num_bytes)}"])


def open_store(location: str | Path, name: str = "") -> Any:
    """The Zarr group or array `name` at a location: the one place that knows about storage."""
    import zarr  # a quarter of a second, and mapped arrays never need it

    return zarr.open(str(location), mode="r", path=name or None, zarr_format=3)


def create(path: str | Path, plan: CachePlan) -> "Store":
    """A new cache without features, opened for writing; it appears at `path` whole or not at all.

    Raises:
        CacheError: if `path` exists, or the disk has too little room.
    """
    path = Path(path)
    _check_plan(plan)
    if path.exists():
        raise CacheError(f"{path}: exists already; open it to resume, or delete it to start anew")
    make_folder(path.parent)
    free = shutil.disk_usage(path.parent).free
    needed = plan.num_bytes + _SPARE_BYTES
    if free < needed:
        raise CacheError(
            f"{path}: needs {_size(needed)}, only {_size(free)} are free; free some space, choose "
            "another disk, or keep fewer features"
        )
    building = path.with_name(f"{path.name}{PARTIAL}-{secrets.token_hex(4)}")
    try:
        _build(building, plan)
        building.rename(path)
        sync_folder(path.parent)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return Store.open(path, write=True)


@dataclass
class Store:
    """A cache on a local disk.

    Attributes:
        path: its folder.
        attributes: the group's attributes, see `create`.
        writable: whether it was opened for writing.
    """

    path: Path
    attributes: dict[str, Any]
    writable: bool = False
    _arrays: dict[str, ArrayFiles] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, path: str | Path, write: bool = False) -> "Store":
        """The cache at `path`; to write, hold its `lock` too.

        Raises:
            CacheError: if there is no cache, or one of another format.
            CacheCorruptError: if its metadata are damaged.
        """
        path = Path(path)
        return cls(path, _read_attributes(path), write)

    @property
    def identity(self) -> Identity:
        """What the cache holds."""
        return Identity.model_validate(self.attributes["identity"])

    @property
    def complete(self) -> bool:
        """Whether `finish` was reached."""
        return bool(self.attributes["complete"])

    def shards(self, kind: ShardKind | None = None) -> list[Shard]:
        """All shards, or those of one kind."""
        return [
            Shard(each, index, start, stop)
            for each, ranges in self.attributes["shards"].items()
            for index, (start, stop) in enumerate(ranges)
            if kind in (None, each)
        ]

    def has(self, name: str) -> bool:
        """Whether there is an array of that name."""
        return (self.path / name / "c").is_dir() or (self.path / name / "zarr.json").is_file()

    def files(self, name: str) -> ArrayFiles:
        """Metadata and chunk files of an array."""
        if name not in self._arrays:
            self._arrays[name] = ArrayFiles.open(self.path, name)
        return self._arrays[name]

    def read(self, name: str) -> npt.NDArray[Any]:
        """A whole array through zarr; strings come as an object array of `str`.

        Raises:
            CacheError: if there is no such array.
            CacheCorruptError: naming the file whose checksum does not hold.
        """
        files = self.files(name)
        try:
            values = open_store(self.path, name)[...]
        except ValueError:
            files.require(range(files.num_chunks))
            raise
        return np.asarray(values, dtype=object if files.dtype is None else None)

    def zarr_array(self, name: str) -> Any:
        """An array as zarr opens it, for layouts that cannot be mapped."""
        return open_store(self.path, name)

    def lock(self) -> AbstractContextManager[None]:
        """Exclusive right to write, as a context manager; see `writer_lock`."""
        return writer_lock(self.path)

    def write_chunks(self, name: str, start_row: int, data: npt.NDArray[Any]) -> None:
        """Writes whole chunks of an array; they are on disk when this returns.

        Args:
            name: array, e.g. `image/projected`.
            start_row: first row, at a chunk boundary.
            data: (n, ...) rows of the array's dtype; ends at a chunk boundary or the array's end.

        Raises:
            CacheError: if the disk is full.
        """
        assert self.writable, f"{self.path} is open for reading"
        files = self.files(name)
        files.write(start_row, data, _fill_value(str(files.dtype)))

    def mark_done(self, shard: Shard, report: Mapping[str, Any]) -> None:
        """Records a shard as done, with its report; its chunks must be on disk already.

        Raises:
            CacheError: naming a chunk file of the shard that is not there.
        """
        assert self.writable, f"{self.path} is open for reading"
        for file in self._shard_files(shard):
            if not file.is_file():
                raise CacheError(f"{file}: missing, so shard {shard.key} cannot be marked done")
        files = self.files(f"shards/{shard.kind}")
        text = json.dumps(dict(report), ensure_ascii=False).encode()
        # vlen-utf8 with one string: number of strings, length in bytes, bytes.
        header = np.array([1, len(text)], "<u4").tobytes()
        write_chunk(files.file(shard.index), header + text, checksummed=True)

    def reports(self, kind: ShardKind) -> dict[int, dict[str, Any]]:
        """Reports of the shards that are done, by index.

        Raises:
            CacheCorruptError: naming a damaged entry of the done-list.
        """
        files = self.files(f"shards/{kind}")
        found: dict[int, dict[str, Any]] = {}
        for index in range(files.num_chunks):
            file = files.file(index)
            if not file.is_file():
                continue
            files.require(range(index, index + 1))
            found[index] = json.loads(file.read_bytes()[8:-CHECKSUM_BYTES])
        return found

    def pending(self) -> list[Shard]:
        """Shards that are not done."""
        done: dict[str, dict[int, Any]] = {
            "image": self.reports("image"),
            "text": self.reports("text"),
        }
        return [shard for shard in self.shards() if shard.index not in done[shard.kind]]

    def update_attributes(self, **values: Any) -> None:
        """Changes attributes of the group, atomically."""
        assert self.writable, f"{self.path} is open for reading"
        document = read_sealed(self.path, "")
        self.attributes = {**document["attributes"]["featcache"], **values}
        document["attributes"]["featcache"] = self.attributes
        write_file(self.path / "zarr.json", sealed("", document))

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Declares the cache complete.

        Args:
            summary: plain JSON values kept as the attribute `summary`.

        Raises:
            CacheError: if a shard is not done.
        """
        pending = self.pending()
        if pending:
            raise CacheError(
                f"{self.path}: {len(pending)} of {len(self.shards())} shards are not done, "
                f"the first is {pending[0].key}; run the extraction again to resume"
            )
        self.update_attributes(complete=True, summary=dict(summary))

    def put_array(
        self, name: str, data: npt.NDArray[Any], attributes: Mapping[str, Any] | None = None
    ) -> None:
        """Adds a small array next to the features; whoever comes second keeps the first one's.

        Args:
            name: e.g. `class_text/<hash>`.
            data: numbers, at least one row.
            attributes: plain JSON values kept with it.

        Raises:
            CacheError: if the cache cannot be written.
        """
        if self.has(name):
            return
        building = self.path.with_name(f"{self.path.name}{PARTIAL}-{secrets.token_hex(4)}")
        row_bytes = max(1, data.nbytes // max(1, len(data)))
        try:
            _write_array(building, name, data, max(1, (64 << 20) // row_bytes), attributes)
            try:
                (building / name).rename(self.path / name)
            except OSError:
                if not self.has(name):
                    raise
            sync_folder((self.path / name).parent)
        except OSError as error:
            raise CacheError(f"{self.path / name}: cannot be written ({error.strerror})") from error
        finally:
            shutil.rmtree(building, ignore_errors=True)

    def _shard_files(self, shard: Shard) -> Iterator[Path]:
        for name in self.attributes["arrays"][shard.kind]:
            files = self.files(name)
            for chunk in files.chunks_of(shard.start, shard.stop):
                yield files.file(chunk)


@contextmanager
def writer_lock(path: str | Path) -> Iterator[None]:
    """Exclusive right to write the cache at `path`, which need not exist yet.

    What a killed writer left half-written is swept on entry.

    Raises:
        CacheError: naming the process and host that hold it.
    """
    path = Path(path)
    make_folder(path.parent)
    lock = FileLock(_lock_file(path), thread_local=False)
    holder = path.with_name(f"{path.name}.writer.json")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise CacheError(
            f"{path}: {_holder(holder)} is writing this cache; wait until it is done, or stop it"
        ) from None
    except OSError as error:
        raise CacheError(f"{path}: cannot be locked for writing ({error.strerror})") from error
    try:
        sweep(path)
        who = {"pid": os.getpid(), "host": socket.gethostname(), "since": int(time.time())}
        holder.write_text(json.dumps(who), encoding="utf-8")
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def sweep(path: Path) -> None:
    """Deletes the half-written files of a killed writer; only for who holds the lock."""
    for stale in path.rglob(f"*{PARTIAL}"):
        stale.unlink(missing_ok=True)
    for stale in path.parent.glob(f"{path.name}{PARTIAL}-*"):
        shutil.rmtree(stale)


def verify(path: str | Path, progress: Callable[[str, int], None] | None = None) -> list[str]:
    """Everything that is wrong with a cache's files, one line each with the file's name.

    Every chunk's checksum and size, chunks that a done shard or a table lacks, the seal of every
    `zarr.json`, the fingerprint, and files that do not belong there.

    Args:
        path: the cache.
        progress: called with an array's name and the bytes of each file checked.

    Raises:
        CacheError: if there is no cache at `path`.
    """
    from featcache.verify import problems

    return problems(Path(path), progress)


def _read_attributes(path: Path) -> dict[str, Any]:
    how = "python -m featcache.extract writes one"
    if not path.exists():
        raise CacheError(f"{path}: no such cache; {how}")
    file = path / "zarr.json"
    if not file.is_file():
        old = (path / ".zgroup").exists() or (path / ".zarray").exists()
        what = "a Zarr v2 store" if old else "no zarr.json in it"
        raise CacheError(f"{path}: not a feature cache ({what}); {how}")
    try:
        attributes = json.loads(file.read_bytes())["attributes"]
        found = attributes.get("featcache")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CacheCorruptError(f"{file}: not the JSON of a Zarr v3 group") from None
    if not isinstance(found, dict):
        raise CacheError(f"{path}: a Zarr store, but not a feature cache; {how}")
    if found.get("format") != FORMAT:
        raise CacheError(
            f"{path}: cache format {found.get('format')!r}, this version reads {FORMAT}; "
            "extract it anew, or use the version that wrote it"
        )
    attributes = read_sealed(path, "")["attributes"]["featcache"]
    identity = Identity.model_validate(attributes["identity"])
    if identity.fingerprint() != attributes["fingerprint"]:
        raise CacheCorruptError(
            f"{file}: fingerprint {attributes['fingerprint']} does not belong to the identity "
            f"({identity.fingerprint()}); restore it from a copy or extract anew"
        )
    return dict(attributes)


def _check_plan(plan: CachePlan) -> None:
    for array in plan.row_arrays:
        kind = "text" if array.path.startswith("text/") else "image"
        for shard in plan.shards:
            ends = shard.stop % array.chunk_rows == 0 or shard.stop == array.shape[0]
            if shard.kind == kind and (shard.start % array.chunk_rows or not ends):
                raise ValueError(
                    f"shard {shard.key} ({shard.start}..{shard.stop}) cuts chunks of "
                    f"{array.chunk_rows} rows of {array.path}"
                )


def _build(root: Path, plan: CachePlan) -> None:
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
        "num_captions": len(manifest.caption_values),
        "splits": _split_ranges(manifest.splits),
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
        _write_array(root, name, data, TABLE_CHUNK_ROWS, None)


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


def _write_array(
    root: Path,
    name: str,
    data: npt.NDArray[Any],
    chunk_rows: int,
    attributes: Mapping[str, Any] | None,
) -> None:
    dtype = "string" if data.dtype == object else str(data.dtype)
    plan = ArrayPlan(name, data.shape, dtype, max(1, min(chunk_rows, len(data))))
    _write_document(root, name, _array(plan, attributes or {}))
    files = ArrayFiles.open(root, name)
    if data.size == 0:
        return
    if files.dtype is not None:
        files.write(0, data, _fill_value(dtype))
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
    fill = _fill_value(plan.dtype)
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


def _fill_value(dtype: str) -> bool | int | float | str:
    if dtype == "string":
        return ""
    if dtype.startswith("float"):
        return float("nan")
    return False if dtype == "bool" else 0


def _split_ranges(splits: list[str]) -> dict[str, list[int]]:
    ranges: dict[str, list[int]] = {}
    for row, name in enumerate(splits):
        if name not in ranges:
            ranges[name] = [row, row]
        assert ranges[name][1] == row, f"rows of split {name!r} are not contiguous"
        ranges[name][1] = row + 1
    return ranges


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in _REPORTED}


def _lock_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.lock")


def _holder(file: Path) -> str:
    try:
        who = json.loads(file.read_text(encoding="utf-8"))
        return f"process {who['pid']} on {who['host']}"
    except (OSError, ValueError, KeyError):
        return "another process"


def _size(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} GB"


__all__ = [
    "ArrayPlan",
    "CachePlan",
    "Shard",
    "Store",
    "create",
    "open_store",
    "verify",
    "writer_lock",
]
