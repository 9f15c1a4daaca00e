"""Creating, deleting and replacing caches in object stores, where nothing can be renamed.

A cache is there when its root `zarr.json` is: it is written last and deleted first. What a killed
process leaves behind is told from somebody else's objects by a marker beside the cache,
`<cache>.building`: only then is anything deleted that no root belongs to.
"""

import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import mkdtemp

from featcache.errors import CacheError
from featcache.layout.cache_plan import CachePlan, build
from featcache.layout.chunks import unsealed
from featcache.mirror import BUILDING, forget_mirrors, mirror_root
from featcache.remote.object_store import PARALLEL_REQUESTS, ObjectFolder, Uploads
from featcache.storage import Location, StoreUrl

ROOT = "zarr.json"


def create_remote(url: StoreUrl, plan: CachePlan) -> None:
    """Puts what a cache starts with into a store, the root last; only for who holds the lock.

    Raises:
        CacheError: if there is a cache, or anything else that is not left from a killed creation.
    """
    folder, beside = ObjectFolder(url), ObjectFolder(url.parent)
    if folder.exists(ROOT):
        raise CacheError(f"{url}: exists already; open it to resume, or delete it to start anew")
    left = [entry.key for entry in folder.list()]
    if left and not beside.exists(_marker(url)):
        raise CacheError(
            f"{url}: no cache, but {len(left)} other objects, the first is {left[0]}; choose "
            "another address, or delete them"
        )
    beside.write(_marker(url), b"")
    folder.delete(*left)
    mirror_root().mkdir(parents=True, exist_ok=True)
    building = Path(mkdtemp(prefix=BUILDING, dir=mirror_root()))
    try:
        build(building, plan)
        files = [file.relative_to(building) for file in building.rglob("*") if file.is_file()]
        uploads = Uploads(folder)
        for file in files:
            if file != Path(ROOT):
                uploads.put(file.as_posix(), (building / file).read_bytes())
        uploads.flush()
        folder.write(ROOT, (building / ROOT).read_bytes())
    finally:
        shutil.rmtree(building, ignore_errors=True)
    beside.delete(_marker(url))


def delete_remote(url: StoreUrl) -> None:
    """Deletes a cache; a killed deletion is finished by the next creation."""
    folder, beside = ObjectFolder(url), ObjectFolder(url.parent)
    beside.write(_marker(url), b"")
    folder.delete(ROOT)
    folder.delete(*[entry.key for entry in folder.list()])
    beside.delete(_marker(url))
    forget_mirrors(url)


def add_array(folder: Location, building: Path, name: str) -> None:
    """Puts an array written at `building/name` into a cache, its `zarr.json` last.

    Whoever comes second keeps the first one's objects: what is added (class text) follows from its
    name, up to rounding.
    """
    assert isinstance(folder, ObjectFolder)
    chunks = sorted(file for file in (building / name / "c").rglob("*") if file.is_file())
    for file in [*chunks, building / name / ROOT]:
        folder.write_if(file.relative_to(building).as_posix(), file.read_bytes(), None)


def replace_remote(url: StoreUrl, other: StoreUrl) -> None:
    """Puts the complete cache `other` of the same bucket at `url`, and deletes what was there.

    The store copies by itself; objects that are equal already are left alone. Meanwhile there is
    no cache at `url`. After a kill, `recover_remote` goes on; only for who holds the lock.

    Raises:
        CacheError: if `other` is no complete cache.
    """
    _require_complete(other)
    source, beside = ObjectFolder(other), ObjectFolder(url.parent)
    beside.write(_swap(url), str(other).encode())
    folder = ObjectFolder(url)
    folder.delete(ROOT)
    held = {entry.key: entry for entry in folder.list()}
    wanted = {entry.key: entry for entry in source.list() if entry.key != ROOT}
    # Equal ETags of one bucket are equal bytes: each object here was written by one request.
    changed = [key for key, entry in wanted.items() if held.get(key) != entry]
    with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
        _all(pool.map(lambda key: source.copy(key, folder, key), changed))
    folder.delete(*(held.keys() - wanted.keys()))
    source.copy(ROOT, folder, ROOT)
    source.delete(ROOT)
    source.delete(*wanted)
    beside.delete(_swap(url))
    forget_mirrors(other)


def recover_remote(url: StoreUrl) -> None:
    """Finishes a replacement that was killed; only for who holds the lock."""
    folder, beside = ObjectFolder(url), ObjectFolder(url.parent)
    try:
        other = StoreUrl.parse(beside.read(_swap(url)).decode())
    except FileNotFoundError:
        return
    if ObjectFolder(other).exists(ROOT):
        replace_remote(url, other)
        return
    # The root was copied: only the source's remains are to be deleted.
    if folder.exists(ROOT):
        source = ObjectFolder(other)
        source.delete(*[entry.key for entry in source.list()])
        forget_mirrors(other)
    beside.delete(_swap(url))


def _require_complete(url: StoreUrl) -> None:
    try:
        raw = ObjectFolder(url).read(ROOT)
    except FileNotFoundError:
        raise CacheError(f"{url}: no cache there to put in another one's place") from None
    document = unsealed(raw, "", f"{url}/{ROOT}")
    if not document["attributes"].get("featcache", {}).get("complete"):
        raise CacheError(f"{url}: not complete, so it cannot take another cache's place")


def _all(results: Iterable[None]) -> None:
    """Waits for all, and raises the first error."""
    for _ in results:
        pass


def _marker(url: StoreUrl) -> str:
    return f"{url.name}.building"


def _swap(url: StoreUrl) -> str:
    return f"{url.name}.replaced-by"
