"""Local copies of what is read from caches in object stores, and the job that tidies them up.

    python -m featcache.mirror
    python -m featcache.mirror --keep_gb 50
    python -m featcache.mirror --clear

A chunk is fetched once, checked, and then mapped like a local one. Each cache has a folder of its
own for each fingerprint below `~/.cache/featcache` (`XDG_CACHE_HOME` and `FEATCACHE_MIRROR` move
it). Nothing there is the only copy of anything.
"""

import contextlib
import json
import os
import secrets
import shutil
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash
from filelock import FileLock
from pydantic import Field, NonNegativeFloat

from featcache.config import Config, run_job
from featcache.errors import CacheError, UserError
from featcache.layout.cache_plan import human_bytes
from featcache.layout.cache_root import creation_mark
from featcache.layout.chunks import PARTIAL, ArrayFiles, Content, require, unsealed
from featcache.storage import Entry, Location, StoreUrl

PARALLEL = 12
"""Downloads at a time; a single one does not fill a network."""
_DOWNLOAD_BYTES = 512 << 20
"""Bytes of all downloads under way together."""
_LISTED_AT_ONCE = 1000
"""Objects that a store lists in one answer."""
BUILDING = "building-"
"""How folders begin in which a cache is put together on its way into a store."""
_SPARE_BYTES = 256 << 20
_SHOWN_BYTES = 64 << 20
"""Downloads from this size on are told of where no terminal shows their progress."""


def mirror_root() -> Path:
    """The folder that holds all mirrors on this machine."""
    chosen = os.environ.get("FEATCACHE_MIRROR")
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "featcache"


def _mirrors_of(url: Path | StoreUrl) -> Path:
    """The folder that holds the mirrors of a cache's states."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL", "")
    return mirror_root() / f"{url.name}-{xxhash.xxh3_64_hexdigest(f'{endpoint} {url}'.encode())}"


def forget_mirrors(url: StoreUrl) -> None:
    """Deletes the mirrors of a cache that is no more; who has mapped their files keeps them."""
    shutil.rmtree(_mirrors_of(url), ignore_errors=True)


class Mirror:
    """A cache in an object store, and the files of it that are on this disk.

    Attributes:
        origin: the cache's folder in the store.
        fingerprint: what the cache held when it was opened.
        folder: the files here: a cache in itself, as far as it has been fetched.
    """

    def __init__(
        self,
        origin: Location,
        fingerprint: str,
        root: Entry | None = None,
        state: int = 0,
        created: float | None = None,
    ) -> None:
        """Names the folder; nothing is read or made.

        Args:
            origin: the cache's folder in the store.
            fingerprint: what the cache holds.
            root: version of the root metadata that say so.
            state: how many updates the cache had then.
            created: when it was created; see `creation_mark`.
        """
        self.origin = origin
        self.fingerprint = fingerprint
        self.folder = _mirrors_of(origin.url) / fingerprint
        self._uploads: Any = None
        self._root = root
        self._state = state
        self._created = created
        self._here: set[str] = set()
        self._put: set[str] = set()

    def where(self, key: str) -> str:
        """An object's address, for messages."""
        return f"{self.origin.url}/{key}".rstrip("/")

    def read(self, key: str) -> bytes:
        """An object; FileNotFoundError if there is none."""
        return self.origin.read(key)

    def present(self, files: ArrayFiles, chunks: Sequence[int]) -> list[int]:
        """Those of an array's chunks that the store keeps; after a `flush`."""
        asked = [chunk for chunk in chunks if files.key(chunk) not in self._put]
        held = self._held(files, asked) if asked else {}
        return [c for c in chunks if files.key(c) in self._put or files.key(c) in held]

    def _held(self, files: ArrayFiles, chunks: Sequence[int]) -> dict[str, Entry]:
        """Size and version of the chunks that the store keeps, by the cheaper way to ask."""
        if len(chunks) * _LISTED_AT_ONCE < files.num_chunks:
            found = [self.origin.entry(files.key(chunk)) for chunk in chunks]
            return {entry.key: entry for entry in found if entry is not None}
        return {entry.key: entry for entry in self.origin.list(f"{files.name}/c")}

    def put(self, key: str, *parts: Content) -> None:
        """Hands an object over for upload; see `flush`."""
        from featcache.remote.object_store import Uploads

        if self._uploads is None:
            self._uploads = Uploads(self.origin)
        self._here.discard(key)
        with self._forgetting_if_it_fails():
            self._uploads.put(key, *parts)
        self._put.add(key)

    def flush(self, keys: Collection[str] = ()) -> None:
        """Waits until all objects handed over are stored.

        Args:
            keys: objects that this is about, beside those this thread handed over.

        Raises:
            StorageError: if one of them was not.
            CacheError: if another process took over the right to write.
        """
        from featcache.remote.lease import require_kept

        if self._uploads is not None:
            with self._forgetting_if_it_fails():
                self._uploads.flush(keys)
        assert isinstance(self.origin.url, StoreUrl)
        require_kept(self.origin.url)

    def forget(self) -> None:
        """Forgets which objects were handed over: the store is asked for them from now on."""
        self._put.clear()

    @contextlib.contextmanager
    def _forgetting_if_it_fails(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.forget()  # one of them is not stored, and it is not known which
            raise

    def keep_document(self, name: str, raw: bytes) -> None:
        """Puts the `zarr.json` of an array, or of the group (""), into the mirror."""
        file = self.folder / name / "zarr.json"
        if not file.is_file() or file.read_bytes() != raw:
            _place(file, raw)

    def fetch(self, files: ArrayFiles, chunks: Sequence[int], verify: bool) -> None:
        """Brings an array's chunk files here: those that are missing, outdated or damaged.

        Raises:
            CacheError: if the cache was replaced since it was opened, or the disk is too small.
            CacheCorruptError: naming an object that is missing or damaged.
        """
        if all(files.key(c) in self._here and files.file(c).is_file() for c in chunks):
            return
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder.with_name(f"{self.fingerprint}.lock")):
            try:
                self._fetch(files, chunks, verify)
            except (UserError, OSError):
                self._require_same()
                raise
            self._require_same()  # last: objects are read by name, one after the other
        os.utime(self.folder)
        self._here.update(files.key(chunk) for chunk in chunks)

    def _fetch(self, files: ArrayFiles, chunks: Sequence[int], verify: bool) -> None:
        held = self._held(files, chunks)
        index = self.folder.with_name(f"{self.fingerprint}.versions") / f"{files.name}.json"
        versions = _read_versions(index)
        missing = []
        for chunk in chunks:
            entry = held.get(files.key(chunk))
            if entry is None:
                require(f"{files.where(chunk)}: missing")
                continue
            known = versions.get(entry.key) == [entry.size, entry.version]
            if not known or not _is_whole(files, chunk, entry.size, verify):
                missing.append((chunk, entry))
        try:
            self._download(files, missing, versions)
        finally:
            if missing:
                _place(index, json.dumps(versions).encode())

    def _download(
        self, files: ArrayFiles, missing: list[tuple[int, Entry]], versions: dict[str, Any]
    ) -> None:
        total = sum(entry.size for _, entry in missing)
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        if total + _SPARE_BYTES > free:
            raise CacheError(
                f"{self.folder}: {files.name} takes {human_bytes(total)} here, only "
                f"{human_bytes(free)} are free; tidy up (python -m featcache.mirror), or set "
                "FEATCACHE_MIRROR to another disk"
            )
        if not missing:
            return
        shown = _Download(f"fetching {self.where(files.name)}", total)
        most = max(entry.size for _, entry in missing)
        with ThreadPoolExecutor(max(1, min(PARALLEL, _DOWNLOAD_BYTES // max(1, most)))) as pool:
            under_way = [
                pool.submit(self._download_one, files, chunk, entry) for chunk, entry in missing
            ]
            try:
                for task, (_, entry) in zip(under_way, missing, strict=True):
                    task.result()
                    versions[entry.key] = [entry.size, entry.version]
                    shown.add(entry.size)
            except BaseException:
                for task in under_way:
                    task.cancel()
                raise
            finally:
                shown.close()

    def _download_one(self, files: ArrayFiles, chunk: int, entry: Entry) -> None:
        content = self.origin.read(entry.key)
        if files.content_problem(chunk, content) is not None:  # damaged on its way, perhaps
            content = self.origin.read(entry.key)
            require(files.content_problem(chunk, content))
        _place(files.file(chunk), content)

    def _require_same(self) -> None:
        """Checks that the cache still is the one that was opened: names alone do not tell."""
        root = self.origin.entry("zarr.json")
        if root == self._root and root is not None:
            return
        assert isinstance(self.origin.url, StoreUrl)
        created = creation_mark(self.origin.url)  # `--restart` keeps the fingerprint
        try:
            document = unsealed(self.origin.read("zarr.json"), "", self.where("zarr.json"))
            attributes = document["attributes"]["featcache"]
            found = attributes["fingerprint"], attributes.get("state", 0)
        except FileNotFoundError:
            found = None
        if found != (self.fingerprint, self._state) or created != self._created:
            raise CacheError(f"{self.origin.url}: updated while open; open it again")
        self._root = root


class _Download:
    """One line on the terminal: bytes, rate and time left."""

    def __init__(self, what: str, total: int) -> None:
        self.what, self.total, self.done = what, total, 0
        self.began = time.perf_counter()
        self.shown = 0.0

    def add(self, num_bytes: int) -> None:
        self.done += num_bytes
        seconds = time.perf_counter() - self.began
        if sys.stderr.isatty() and seconds - self.shown > 0.2:
            self.shown = seconds
            left = (self.total - self.done) * seconds / max(1, self.done)
            line = f"{self.what}: {human_bytes(self.done)} of {human_bytes(self.total)}"
            rate = human_bytes(self.done / seconds)
            print(f"\r{line}, {rate}/s, {left:.0f} s left\033[K", end="", file=sys.stderr)

    def close(self) -> None:
        if sys.stderr.isatty() and self.shown:
            print("\r\033[K", end="", file=sys.stderr)
        elif self.done >= _SHOWN_BYTES:
            seconds = time.perf_counter() - self.began
            print(f"{self.what}: {human_bytes(self.done)} in {seconds:.1f} s", file=sys.stderr)


def _place(file: Path, content: bytes) -> None:
    """Puts a file in place whole; a mirror needs no waiting for the disk, it can be fetched again.

    Raises:
        CacheError: if the disk refuses.
    """
    partial = file.with_name(f"{file.name}.{secrets.token_hex(4)}{PARTIAL}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        partial.replace(file)
    except OSError as error:
        raise CacheError(
            f"{file}: {error.strerror}; the mirror of a cache in a store needs this disk, "
            "FEATCACHE_MIRROR names another one"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def _is_whole(files: ArrayFiles, chunk: int, size: int, verify: bool) -> bool:
    file = files.file(chunk)
    if not file.is_file() or file.stat().st_size != size:
        return False
    return not verify or files.problem(chunk) is None


def _read_versions(index: Path) -> dict[str, Any]:
    try:
        found = json.loads(index.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return dict(found) if isinstance(found, dict) else {}


class MirrorConfig(Config):
    """Lists the local copies of caches in object stores, and deletes them if asked to."""

    clear: bool = False
    """Delete all of them; what is still needed is fetched again."""
    keep_gb: NonNegativeFloat | None = Field(default=None)
    """Delete the ones unused for longest until this many gigabytes are left; unset = keep all."""


@dataclass(frozen=True)
class Mirrored:
    """The local copy of one cache.

    Attributes:
        folder: where it lies.
        num_bytes: bytes on disk.
        used: time of its last use, in seconds of the epoch.
    """

    folder: Path
    num_bytes: int
    used: float


def run(config: MirrorConfig) -> list[Mirrored]:
    """Prints and returns the mirrors that are left, most recently used first."""
    limit = 0.0 if config.clear else config.keep_gb
    kept, total = [], 0
    for mirror in sorted(mirrors(), key=lambda mirror: -mirror.used):
        total += mirror.num_bytes
        size = human_bytes(mirror.num_bytes)
        if limit is not None and total > limit * 1e9:
            _delete(mirror.folder)
            total -= mirror.num_bytes
            print(f"deleted  {mirror.folder}  {size}")
            continue
        day = time.strftime("%Y-%m-%d %H:%M", time.localtime(mirror.used))
        print(f"{mirror.folder}  {size}, used {day}")
        kept.append(mirror)
    for folder in sorted(mirror_root().glob(f"{BUILDING}*")):
        size = human_bytes(_num_bytes(folder))
        print(
            f"{folder}  {size}, of a job that writes a cache into a store; if none runs, it was "
            "killed: delete it"
        )
    print(f"{mirror_root()}: {len(kept)} mirrors, {human_bytes(total)}")
    return kept


def mirrors() -> list[Mirrored]:
    """The local copies on this machine."""
    found = []
    # By the fingerprint: caches on their way into a store are put together beside them.
    for root in mirror_root().glob(f"*/{'[0-9a-f]' * 32}/zarr.json"):
        found.append(Mirrored(root.parent, _num_bytes(root.parent), root.parent.stat().st_mtime))
    return found


def _num_bytes(folder: Path) -> int:
    """Bytes of all files below; another job may be deleting them meanwhile."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.stat(os.path.join(parent, name)).st_size
    return total


def _delete(folder: Path) -> None:
    """Deletes a mirror; who has mapped its files keeps them."""
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        shutil.rmtree(folder.with_name(f"{folder.name}.versions"), ignore_errors=True)
        shutil.rmtree(folder)


if __name__ == "__main__":
    run_job(MirrorConfig, run)
