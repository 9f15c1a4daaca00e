"""The Zarr layout of a cache: create, open, write a shard, mark it done, finish, verify.

A cache is a plain Zarr v3 group that any Zarr library reads. What is added here is only about not
losing anything: chunk files are on disk before a shard is marked done, creation is one rename, one
process writes at a time, and every byte of every file is covered by a checksum.
"""

import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from featcache.errors import CacheCorruptError, CacheError, UserError
from featcache.identity import Identity
from featcache.layout.cache_plan import (
    CachePlan,
    Shard,
    ShardKind,
    build,
    check_plan,
    human_bytes,
)
from featcache.layout.cache_root import (
    cache_exists,
    checked_attributes,
    creation_mark,
    delete_cache,
    read_attributes,
    read_root,
    root_mark,
)
from featcache.layout.chunks import (
    CHECKSUM_BYTES,
    PARTIAL,
    ArrayFiles,
    make_folder,
    read_document,
    require,
    sealed,
    sync_folder,
    write_file,
)
from featcache.layout.expected import expected_names, needed_chunks, table_problems
from featcache.layout.lock import writer_lock
from featcache.layout.tables import ArrayPlan, fill_value, write_array
from featcache.mirror import PARALLEL, Mirror
from featcache.storage import StoreUrl, Where, locate, place

_SPARE_BYTES = 64 << 20
"""Room that has to stay free beyond what the plan needs."""


def open_store(location: Where, name: str = "") -> Any:
    """The Zarr group or array `name` at a path or `s3://bucket/prefix`, as zarr opens it."""
    import zarr  # a quarter of a second, and mapped arrays never need it

    found = place(location)
    if isinstance(found, StoreUrl):
        from featcache.remote.object_store import ObjectFolder

        store: Any = ObjectFolder(found).zarr_store()
    else:
        store = str(found)
    return zarr.open(store, mode="r", path=name or None, zarr_format=3)


def create(path: Where, plan: CachePlan, linked_bytes: int = 0) -> "Store":
    """A new cache without features, opened for writing; it appears at `path` whole or not at all.

    Args:
        path: where.
        plan: what it will hold.
        linked_bytes: how much of it will be linked from another cache, and needs no room.

    Raises:
        CacheError: if `path` exists, or the disk has too little room.
    """
    path = place(path)
    check_plan(plan)
    if isinstance(path, StoreUrl):
        from featcache.remote.remote_cache import create_remote

        create_remote(path, plan)
        return Store.open(path, write=True)
    if path.exists():
        raise CacheError(f"{path}: exists already; open it to resume, or delete it to start anew")
    make_folder(path.parent)
    free = shutil.disk_usage(path.parent).free
    needed = plan.num_bytes - linked_bytes + _SPARE_BYTES
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
    """A cache on a local disk, or in an object store.

    Attributes:
        path: its folder.
        attributes: the group's attributes, see `create`.
        writable: whether it was opened for writing.
        mirror: what of a store's cache is on this disk; None for a local cache.
    """

    path: Path | StoreUrl
    attributes: dict[str, Any]
    writable: bool = False
    mirror: Mirror | None = None
    _arrays: dict[str, ArrayFiles] = field(default_factory=dict, repr=False)
    _mark: tuple[int, ...] = ()

    @classmethod
    def open(cls, path: Where, write: bool = False) -> "Store":
        """The cache at `path`; to write, hold its `lock` too.

        Raises:
            CacheError: if there is no cache, or one of another format.
            CacheCorruptError: if its metadata are damaged.
        """
        path = place(path)
        if isinstance(path, StoreUrl):
            created = creation_mark(path)  # first: a cache made anew meanwhile is noticed
            raw, root = read_root(path)
            attributes = checked_attributes(raw, str(path))
            state = attributes.get("state", 0)
            mirror = Mirror(locate(path), attributes["fingerprint"], root, state, created)
            mirror.keep_document("", raw)
            return cls(path, attributes, write, mirror)
        mark = root_mark(path)  # first: whoever takes the cache's place later is noticed
        return cls(path, read_attributes(path), write, _mark=mark)

    @property
    def folder(self) -> Path:
        """The cache's folder on this disk; of a cache in a store, the mirror's."""
        if self.mirror is not None:
            return self.mirror.folder
        assert isinstance(self.path, Path)
        return self.path

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
        if self.mirror is not None:
            known = name in self._arrays or name in chain(*self.attributes["arrays"].values())
            return known or self.mirror.origin.exists(f"{name}/zarr.json")
        return (self.folder / name / "c").is_dir() or (self.folder / name / "zarr.json").is_file()

    def files(self, name: str) -> ArrayFiles:
        """Metadata and chunk files of an array."""
        if name not in self._arrays:
            with self.unchanged():
                self._arrays[name] = ArrayFiles.open(self.folder, name, self.mirror)
        return self._arrays[name]

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Checks that what was read inside comes from the cache that was opened.

        An update puts another folder in a cache's place; what was mapped before stays valid, but
        files opened by name afterwards belong to other rows.

        Raises:
            CacheError: if the cache was updated, extracted anew or deleted meanwhile.
        """
        try:
            yield
        except (UserError, OSError, ValueError):
            self._require_unchanged()
            raise
        self._require_unchanged()

    def _require_unchanged(self) -> None:
        if self.mirror is not None:  # it looks by itself before it fetches
            return
        mark = root_mark(self.folder)
        if mark == self._mark:
            return
        same = mark[:2] == self._mark[:2]  # the folder; its attributes may have been rewritten
        fingerprint = self.attributes["fingerprint"]
        if not same or read_attributes(self.folder)["fingerprint"] != fingerprint:
            raise CacheError(f"{self.path}: updated while it was open; open it again")
        self._mark = mark

    def read(self, name: str) -> npt.NDArray[Any]:
        """A whole array through zarr; strings come as an object array of `str`.

        Raises:
            CacheError: if there is no such array.
            CacheCorruptError: naming the file whose checksum does not hold.
        """
        files = self.files(name)
        files.fetch()
        with self.unchanged():
            try:
                values = self.zarr_array(name)[...]
            except (ValueError, RuntimeError):  # what zarr's codecs raise for damaged bytes
                for chunk in range(files.num_chunks):
                    require(files.problem(chunk))
                raise
        return np.asarray(values, dtype=object if files.dtype is None else None)

    def zarr_array(self, name: str) -> Any:
        """An array as zarr opens it, for layouts that cannot be mapped."""
        if self.mirror is not None:
            if not (self.folder / name / "zarr.json").is_file():  # the mirror was cleared
                self._arrays.pop(name, None)
            self.files(name).fetch()
        return open_store(self.folder, name)

    def lock(self) -> AbstractContextManager[None]:
        """Exclusive right to write, as a context manager; see `writer_lock`."""
        return writer_lock(self.path)

    def write_chunks(self, name: str, start_row: int, data: npt.NDArray[Any]) -> None:
        """Writes whole chunks of an array; they are on disk when this returns.

        To a store they are handed over for upload, and stored when the shard is marked done.

        Args:
            name: array, e.g. `image/projected`.
            start_row: first row, at a chunk boundary.
            data: (n, ...) rows of the array's dtype; ends at a chunk boundary or the array's end.

        Raises:
            CacheError: if the disk is full.
        """
        assert self.writable, f"{self.path} is open for reading"
        files = self.files(name)
        if self.mirror is not None and name == "rows/valid":
            self.mirror.flush()  # no row is declared valid before its features are stored
        files.write(start_row, data, fill_value(str(files.dtype)))

    def mark_done(self, shard: Shard, report: Mapping[str, Any]) -> None:
        """Records a shard as done, with its report; its chunks must be on disk already.

        Raises:
            CacheError: naming a chunk file of the shard that is not there.
        """
        assert self.writable, f"{self.path} is open for reading"
        rows = shard.start, shard.stop
        arrays = [self.files(name) for name in self.attributes["arrays"][shard.kind]]
        if self.mirror is not None:
            self.mirror.flush({f.key(c) for f in arrays for c in f.chunks_of(*rows)})
        for files in arrays:
            needed = files.chunks_of(*rows)
            missing = sorted(set(needed) - set(files.present(needed)))
            if missing:
                raise CacheError(
                    f"{files.where(missing[0])}: missing, so shard {shard.key} cannot be "
                    "marked done"
                )
        text = json.dumps(dict(report), ensure_ascii=False).encode()
        # vlen-utf8 with one string: number of strings, length in bytes, bytes.
        header = np.array([1, len(text)], "<u4").tobytes()
        self.files(f"shards/{shard.kind}").write_content(shard.index, header + text)
        if self.mirror is not None:
            self.mirror.flush()
            self.mirror.forget()

    def mark_pending(self, shard: Shard) -> None:
        """Takes a shard off the done-list before it is written again.

        Until `finish`, the cache counts as incomplete. Otherwise a row that could be read before
        and cannot any more would, after a kill, be valid and hold no features.
        """
        assert self.writable, f"{self.path} is open for reading"
        files = self.files(f"shards/{shard.kind}")
        if not files.present([shard.index]):
            return
        if self.complete:
            self.update_attributes(complete=False)
        locate(self.path).delete(files.key(shard.index))
        if self.mirror is None:
            sync_folder(files.file(shard.index).parent)

    def reports(self, kind: ShardKind) -> dict[int, dict[str, Any]]:
        """Reports of the shards that are done, by index.

        Raises:
            CacheCorruptError: naming a damaged entry of the done-list.
        """
        return dict(self.each_report(kind))

    def each_report(
        self, kind: ShardKind, only: int | None = None
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """Index and report of each shard that is done, or of one, a report in memory at a time.

        Raises:
            CacheCorruptError: naming a damaged entry of the done-list.
        """
        files = self.files(f"shards/{kind}")
        with self.unchanged():
            here = files.present(None if only is None else [only])
            files.fetch(here)
            for index in here:
                require(files.problem(index))
                yield index, json.loads(files.file(index).read_bytes()[8:-CHECKSUM_BYTES])

    def pending(self) -> list[Shard]:
        """Shards that are not done."""
        done = {
            kind: {index for index, _ in self.each_report(kind)} for kind in get_args(ShardKind)
        }
        return [shard for shard in self.shards() if shard.index not in done[shard.kind]]

    def update_attributes(self, **values: Any) -> None:
        """Changes attributes of the group, atomically.

        Raises:
            CacheError: if another process took over the right to write a cache in a store.
        """
        assert self.writable, f"{self.path} is open for reading"
        if self.mirror is not None:
            self.mirror.flush()  # says so before the root is touched, which is the other's by now
        document = read_document(self.folder, "", self.mirror)
        self.attributes = {**document["attributes"]["featcache"], **values}
        document["attributes"]["featcache"] = self.attributes
        raw = sealed("", document)
        if self.mirror is None:
            write_file(self.folder / "zarr.json", raw)
            return
        self.mirror.put("zarr.json", raw)
        self.mirror.flush()
        self.mirror.keep_document("", raw)

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

    def may_add_arrays(self) -> bool:
        """Whether `put_array` can be expected to succeed; a store says so only when asked to."""
        if isinstance(self.path, StoreUrl):
            return True
        return os.access(self.path, os.W_OK) and os.access(self.path.parent, os.W_OK)

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
            StorageDeniedError: if a store does not let us.
        """
        if self.has(name):
            return
        target = self.folder / name
        building = self.folder.with_name(f"{self.folder.name}{PARTIAL}-{secrets.token_hex(4)}")
        row_bytes = max(1, data.nbytes // max(1, len(data)))
        try:
            write_array(building, name, data, max(1, (64 << 20) // row_bytes), attributes)
            if self.mirror is not None:
                from featcache.remote.remote_cache import add_array

                add_array(self.mirror.origin, building, name)
                return
            try:
                (building / name).rename(target)
            except OSError:
                if not self.has(name):
                    raise
            sync_folder(target.parent)
        except OSError as error:
            raise CacheError(f"{target}: cannot be written ({error.strerror})") from error
        finally:
            shutil.rmtree(building, ignore_errors=True)


def verify(path: Where, progress: Callable[[str, int], None] | None = None) -> list[str]:
    """Everything that is wrong with a cache's files, one line each, the file's name first.

    Looks at every chunk's size and checksum, chunks that a done shard or a table lacks, the seal of
    every `zarr.json`, the fingerprint, the tables' hashes, and files that do not belong there. Of a
    cache in a store every object is read; its mirror is not looked at.

    Args:
        path: the cache.
        progress: called with an array's name and the bytes of each chunk that was checked.

    Raises:
        CacheError: if there is no cache at `path`.
    """
    path = place(path)
    found: list[str] = []
    store: Store | None = None
    try:
        store = Store.open(path)
    except CacheCorruptError as error:  # the arrays below can still be checked
        found.append(str(error))
    remote = None
    if isinstance(path, StoreUrl):
        remote = (store and store.mirror) or Mirror(locate(path), "damaged")
    folder = path if isinstance(path, Path) else Path()
    sizes = {entry.key: entry.size for entry in locate(path).list()}
    known = {"zarr.json"}
    expected = expected_names(store.attributes) if store is not None else set()
    documents = {key.removesuffix("/zarr.json") for key in sizes if key.endswith("/zarr.json")}
    with ExitStack() as resources:
        each: Callable[..., Any] = map
        if remote is not None:
            each = resources.enter_context(ThreadPoolExecutor(PARALLEL)).map
        for name in sorted(expected | documents):
            known.add(f"{name}/zarr.json")
            try:
                document = read_document(folder, name, remote)
                if document.get("node_type") == "group":
                    continue
                files = ArrayFiles.described(folder, name, document, remote)
                needed = needed_chunks(store, name, files, sizes) if store is not None else set()
            except (CacheError, CacheCorruptError) as error:
                found.append(str(error))
                known.update(key for key in sizes if key.startswith(f"{name}/c/"))
                continue
            chunks = [c for c in range(files.num_chunks) if c in needed or files.key(c) in sizes]
            known.update(files.key(chunk) for chunk in chunks)
            for chunk, problem in zip(chunks, each(files.kept_problem, chunks), strict=True):
                if problem is not None:
                    found.append(problem)
                elif progress is not None:
                    progress(name, sizes[files.key(chunk)])
    if store is not None and not found:
        found += table_problems(store)
    for key in sorted(set(sizes) - known):
        half = key.endswith(PARTIAL)
        what = "left by a killed writer, the next one removes it" if half else "foreign file"
        found.append(f"{path / key}: {what}")
    return found


__all__ = [
    "ArrayPlan",
    "CachePlan",
    "Shard",
    "ShardKind",
    "Store",
    "cache_exists",
    "create",
    "delete_cache",
    "open_store",
    "verify",
    "writer_lock",
]
