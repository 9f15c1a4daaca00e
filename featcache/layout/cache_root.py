"""The root of a cache: whether there is one, and what its `zarr.json` says."""

import json
import shutil
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from featcache.errors import CacheCorruptError, CacheError, CacheFormatError
from featcache.identity import Identity
from featcache.layout.cache_plan import FORMAT
from featcache.layout.chunks import PARTIAL, unsealed
from featcache.storage import Entry, StoreUrl, locate

_MARKS = {"identity", "fingerprint"}
"""Attributes that a cache of any format is known by."""
_HOW = "python -m featcache.extract writes one"


def cache_exists(path: Path | StoreUrl) -> bool:
    """Whether there is something at `path`: a folder, or a cache's root in a store."""
    return path.exists() if isinstance(path, Path) else locate(path).exists("zarr.json")


def delete_cache(path: Path | StoreUrl) -> None:
    """Deletes a cache so that no half of it is ever found; only for who holds its lock."""
    if isinstance(path, StoreUrl):
        from featcache.remote.remote_cache import delete_remote

        delete_remote(path)
        return
    doomed = path.with_name(f"{path.name}{PARTIAL}-deleted")  # swept by the next writer
    path.rename(doomed)
    shutil.rmtree(doomed)


def root_mark(path: Path) -> tuple[int, ...]:
    """What tells a cache's folder and its root metadata from others of the same name."""
    try:
        folder, root = path.stat(), (path / "zarr.json").stat()
    except OSError:
        return ()
    return folder.st_dev, folder.st_ino, root.st_ino, root.st_mtime_ns, root.st_size


def read_attributes(path: Path) -> dict[str, Any]:
    """The attributes of the cache in a local folder.

    Raises:
        CacheError: if there is no cache, or one of another format.
        CacheCorruptError: if its metadata are damaged.
    """
    if not path.exists():
        raise CacheError(f"{path}: no such cache; {_HOW}")
    file = path / "zarr.json"
    if not file.is_file():
        old = (path / ".zgroup").exists() or (path / ".zarray").exists()
        what = "a Zarr v2 store" if old else "no zarr.json in it"
        raise CacheError(f"{path}: not a feature cache ({what}); {_HOW}")
    return checked_attributes(file.read_bytes(), str(path))


def creation_mark(path: StoreUrl) -> float | None:
    """What tells a cache in a store from one of the same content made anew at the same place.

    The time of an object that is written at creation and never again.
    """
    from featcache.remote.object_store import ObjectFolder

    return ObjectFolder(path).written("shards/image/zarr.json")


def read_root(path: StoreUrl) -> tuple[bytes, Entry]:
    """The root `zarr.json` of a cache in a store, and its version.

    Raises:
        CacheError: if there is none.
    """
    from featcache.remote.object_store import ObjectFolder

    try:
        return ObjectFolder(path).read_versioned("zarr.json")
    except FileNotFoundError:
        raise CacheError(f"{path}: no such cache (no zarr.json there); {_HOW}") from None


def checked_attributes(raw: bytes, path: str) -> dict[str, Any]:
    """The cache's attributes out of its root `zarr.json`; `path` is for messages.

    Raises:
        CacheError: if it is no cache.
        CacheFormatError: if it is one of another format, or its identity has other fields.
        CacheCorruptError: if it is damaged.
    """
    file = f"{path}/zarr.json"
    try:
        # Other people's stores may leave the attributes out.
        found = json.loads(raw).get("attributes", {}).get("featcache")
    except (ValueError, AttributeError):
        raise CacheCorruptError(f"{file}: not the JSON of a Zarr v3 group") from None
    ours = isinstance(found, dict) and (found.get("format") == FORMAT or found.keys() >= _MARKS)
    if not ours:  # strictly: `--restart` deletes what is ours
        raise CacheError(f"{path}: a Zarr store, but not a feature cache; {_HOW}")
    if found.get("format") != FORMAT:
        raise CacheFormatError(
            f"{path}: cache format {found.get('format')!r}, this version reads {FORMAT}; "
            "extract it anew (--restart), or use the version that wrote it"
        )
    attributes = unsealed(raw, "", file)["attributes"]["featcache"]
    try:
        identity = Identity.model_validate(attributes["identity"])
    except ValidationError as error:
        first = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise CacheFormatError(
            f"{file}: {first} of the identity is not what this version expects; use the version "
            f"that wrote the cache ({attributes.get('versions', {}).get('featcache')}), or extract "
            "anew (--restart)"
        ) from None
    if identity.fingerprint() != attributes["fingerprint"]:
        raise CacheCorruptError(
            f"{file}: fingerprint {attributes['fingerprint']} does not belong to the identity "
            f"({identity.fingerprint()}); restore it from a copy or extract anew"
        )
    return dict(attributes)
