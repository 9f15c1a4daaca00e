"""A new cache takes the place of an old one, in one step that a crash cannot halve.

The new one is built beside the old one, as `<cache>.next`; the old one stays complete and readable
until the two names are exchanged. Who has mapped the old files keeps them.
"""

import ctypes
import errno
import os
import re
import secrets
import shutil
import sys
from pathlib import Path
from typing import Any

from featcache.errors import CacheCorruptError, CacheError
from featcache.layout.chunks import PARTIAL, sync_folder
from featcache.layout.lock import sweep
from featcache.storage import StoreUrl
from featcache.store import Store, cache_exists, delete_cache

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_CANNOT = {errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP}
"""What a kernel or file system without the exchange answers."""

UPDATES = "updates"
"""Attribute of a cache that was built to replace another: that one's fingerprint."""
STATE = "state"
"""Attribute of such a cache: how many updates it has behind it. After a recheck, which keeps the
fingerprint, it tells the new files from the old ones."""


def next_path(path: Path | StoreUrl) -> Path | StoreUrl:
    """Where the cache that will replace `path` is built."""
    return path.with_name(f"{path.name}.next")


def donor_paths(path: Path | StoreUrl) -> list[Path]:
    """Unfinished updates of `path` that were set aside because the dataset changed again."""
    if isinstance(path, StoreUrl) or not path.parent.is_dir():
        return []
    pattern = re.compile(re.escape(path.name) + r"\.donor-[0-9a-f]{8}")
    return sorted(p for p in path.parent.iterdir() if pattern.fullmatch(p.name))


def set_aside(path: Path | StoreUrl) -> None:
    """Makes room for a new `<cache>.next`.

    On a disk what the present one holds can still be copied; in a store, where nothing can be
    renamed, it is deleted.
    """
    building = next_path(path)
    if isinstance(building, StoreUrl):
        delete_cache(building)
        return
    building.rename(building.with_name(f"{path.name}.donor-{secrets.token_hex(4)}"))
    sync_folder(building.parent)


def recover(path: Path | StoreUrl) -> None:
    """Finishes what a killed writer left half done; only for who holds the lock.

    Two renames, used where names cannot be exchanged, can be cut between: then there is no cache at
    `path`, but a complete one that was about to take its place. (In a store the lock sees to it.)
    """
    building = next_path(path)
    if isinstance(path, StoreUrl) or isinstance(building, StoreUrl):
        return
    sweep(building)
    if not path.exists() and _is_whole_update(building):
        building.rename(path)
        sync_folder(path.parent)


def belongs(path: Path | StoreUrl) -> bool:
    """Whether `<cache>.next` is an update of `path`, or what an update of `path` replaced.

    Anything else of that name is somebody's own.
    """
    try:
        old, new = Store.open(path).attributes, Store.open(next_path(path)).attributes
    except (CacheError, CacheCorruptError):
        return False
    return bool(old["fingerprint"] == new.get(UPDATES) or new["fingerprint"] == old.get(UPDATES))


def clear(path: Path | StoreUrl) -> None:
    """Deletes what updates of `path` left beside it; only for who holds the lock."""
    if cache_exists(next_path(path)) and belongs(path):
        _delete(next_path(path), path)
    for donor in donor_paths(path):
        _delete(donor, path)


def replace(path: Path | StoreUrl) -> None:
    """Puts `<cache>.next` at `path`, and deletes what was there and all leftovers.

    Raises:
        OSError: if the folder may not be changed.
        StorageError: if a store refuses or cannot be reached.
    """
    building = next_path(path)
    if isinstance(path, StoreUrl) or isinstance(building, StoreUrl):
        from featcache.remote.remote_cache import replace_remote

        assert isinstance(path, StoreUrl)
        assert isinstance(building, StoreUrl)
        replace_remote(path, building)
        return
    if not exchange(path, building):
        # A writer that finds no cache but a complete `.next` goes on from here; see `recover`.
        path.rename(path.with_name(f"{path.name}{PARTIAL}-{secrets.token_hex(4)}"))
        sync_folder(path.parent)
        building.rename(path)
    sync_folder(path.parent)
    sweep(path)
    clear(path)


def _is_whole_update(path: Path) -> bool:
    try:
        store = Store.open(path)
    except (CacheError, CacheCorruptError):
        return False
    return UPDATES in store.attributes and store.complete


def exchange(first: Path, second: Path) -> bool:
    """Exchanges two names in one step; False where the system has no such step.

    Raises:
        OSError: if the system has it and refuses.
    """
    if not sys.platform.startswith("linux"):
        return False
    libc: Any = ctypes.CDLL(None, use_errno=True)
    try:
        renameat2 = libc.renameat2
    except AttributeError:
        return False
    names = os.fsencode(first), os.fsencode(second)
    if renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _CANNOT:
        return False
    raise OSError(code, os.strerror(code), str(first))


def _delete(folder: Path | StoreUrl, path: Path | StoreUrl) -> None:
    """Deletes a whole cache; taken out of sight first, so that no half of it is ever found."""
    if isinstance(folder, StoreUrl):
        delete_cache(folder)
        return
    doomed = folder.with_name(f"{path.name}{PARTIAL}-{secrets.token_hex(4)}")  # `sweep` knows these
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)  # network disks keep files that somebody has mapped
