"""The Zarr layout of a cache: create, open, write a shard, mark it done, finish, verify.

A cache is a plain Zarr v3 group that any Zarr library reads. What is added here is only about not
losing anything: chunk files are on disk before a shard is marked done, creation is one rename, one
process writes at a time, and every byte of every file is covered by a checksum.
"""

import json
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from featcache.cache_plan import (
    FORMAT,
    CachePlan,
    Shard,
    ShardKind,
    build,
    check_plan,
    human_bytes,
)
from featcache.chunks import (
    CHECKSUM_BYTES,
    PARTIAL,
    ArrayFiles,
    make_folder,
    read_sealed,
    require,
    sealed,
    sync_folder,
    write_chunk,
    write_file,
)
from featcache.errors import CacheCorruptError, CacheError
from featcache.identity import Identity, ListHash
from featcache.lock import writer_lock
from featcache.manifest import class_hash, rows_hash
from featcache.tables import ArrayPlan, fill_value, read_strings, write_array

_SPARE_BYTES = 64 << 20
"""Room that has to stay free beyond what the plan needs."""


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
    check_plan(plan)
    if path.exists():
        raise CacheError(f"{path}: exists already; open it to resume, or delete it to start anew")
    make_folder(path.parent)
    free = shutil.disk_usage(path.parent).free
    needed = plan.num_bytes + _SPARE_BYTES
    if free < needed:
        raise CacheError(
            f"{path}: needs {human_bytes(needed)}, only {human_bytes(free)} are free; "
            "free some space, choose another disk, or keep fewer features"
        )
    building = path.with_name(f"{path.name}{PARTIAL}-{secrets.token_hex(4)}")
    try:
        build(building, plan)
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
        except (ValueError, RuntimeError):  # what zarr's codecs raise for damaged bytes
            for chunk in range(files.num_chunks):
                require(files.problem(chunk))
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
        files.write(start_row, data, fill_value(str(files.dtype)))

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
            require(files.problem(index))
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
            write_array(building, name, data, max(1, (64 << 20) // row_bytes), attributes)
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


def verify(path: str | Path, progress: Callable[[str, int], None] | None = None) -> list[str]:
    """Everything that is wrong with a cache's files, one line each, the file's name first.

    Looks at every chunk's size and checksum, chunks that a done shard or a table lacks, the seal of
    every `zarr.json`, the fingerprint, the tables' hashes, and files that do not belong there.

    Args:
        path: the cache.
        progress: called with an array's name and the bytes of each chunk that was checked.

    Raises:
        CacheError: if there is no cache at `path`.
    """
    path = Path(path)
    found: list[str] = []
    store: Store | None = None
    try:
        store = Store.open(path)
    except CacheCorruptError as error:  # the arrays below can still be checked
        found.append(str(error))
    known = {path / "zarr.json"}
    expected = _expected_names(store.attributes) if store is not None else set()
    on_disk = {str(file.parent.relative_to(path)) for file in path.rglob("zarr.json")} - {"."}
    for name in sorted(expected | on_disk):
        known.add(path / name / "zarr.json")
        try:
            if read_sealed(path, name).get("node_type") == "group":
                continue
            files = ArrayFiles.open(path, name)
            needed = _needed_chunks(store, name, files) if store is not None else set()
        except (CacheError, CacheCorruptError) as error:
            found.append(str(error))
            known.update((path / name / "c").rglob("*"))
            continue
        for chunk in range(files.num_chunks):
            file = files.file(chunk)
            known.add(file)
            if chunk not in needed and not file.exists():
                continue
            problem = files.problem(chunk)
            if problem is not None:
                found.append(problem)
            elif progress is not None:
                progress(name, file.stat().st_size)
    if store is not None and not found:
        found += _table_problems(store)
    for file in sorted(path.rglob("*")):
        if not file.is_dir() and file not in known:
            half = file.name.endswith(PARTIAL)
            what = "left by a killed writer, the next one removes it" if half else "foreign file"
            found.append(f"{file}: {what}")
    return found


def _expected_names(attributes: Mapping[str, Any]) -> set[str]:
    kinds = get_args(ShardKind)
    groups = {"image", "text", "rows", "classes", "class_text", "shards"}
    arrays = {name for names in attributes["arrays"].values() for name in names}
    return groups | arrays | {f"shards/{kind}" for kind in kinds}


def _needed_chunks(store: "Store", name: str, files: ArrayFiles) -> set[int]:
    """Chunks that have to be there: those of done shards, and all of every other array."""
    for kind in get_args(ShardKind):
        if name == f"shards/{kind}" and not store.complete:
            return set()
        if name in store.attributes["arrays"][kind]:
            marks = store.path / "shards" / kind / "c"  # damage in there is reported once, there
            done = [shard for shard in store.shards(kind) if (marks / str(shard.index)).exists()]
            return {c for shard in done for c in files.chunks_of(shard.start, shard.stop)}
    return set(range(files.num_chunks))


def _table_problems(store: "Store") -> Iterator[str]:
    """Tables whose checksums hold but which belong to another dataset than the identity."""
    dataset = store.identity.dataset
    columns = []
    for name in ("id", "path", "split"):
        columns.append(ListHash())
        for strings in read_strings(store.files(f"rows/{name}")):
            columns[-1].update_strings(strings)
    if rows_hash(*columns) != dataset.rows:
        yield f"{store.path / 'rows'}: ids, paths or splits are not those of the identity"
    if class_hash([str(name) for name in store.read("classes/name")]) != dataset.classes:
        yield f"{store.path / 'classes/name'}: class names are not those of the identity"


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
    try:
        identity = Identity.model_validate(attributes["identity"])
    except ValidationError as error:
        first = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise CacheError(
            f"{file}: {first} of the identity is not what this version expects; use the version "
            f"that wrote the cache ({attributes['versions'].get('featcache')}), or extract anew"
        ) from None
    if identity.fingerprint() != attributes["fingerprint"]:
        raise CacheCorruptError(
            f"{file}: fingerprint {attributes['fingerprint']} does not belong to the identity "
            f"({identity.fingerprint()}); restore it from a copy or extract anew"
        )
    return dict(attributes)


__all__ = [
    "ArrayPlan",
    "CachePlan",
    "Shard",
    "ShardKind",
    "Store",
    "create",
    "open_store",
    "verify",
    "writer_lock",
]
