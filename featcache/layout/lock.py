"""One process writes a cache at a time; the next one is told who does."""

import glob
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from featcache.errors import CacheError
from featcache.layout.chunks import PARTIAL, make_folder
from featcache.storage import StoreUrl, Where, place


@contextmanager
def writer_lock(path: Where) -> Iterator[None]:
    """Exclusive right to write the cache at `path`, which need not exist yet.

    What a killed writer left half-written is swept on entry.

    Raises:
        CacheError: naming the process and host that hold it.
    """
    path = place(path)
    if isinstance(path, StoreUrl):
        from featcache.remote.lease import lease
        from featcache.remote.remote_cache import recover_remote

        with lease(path):
            recover_remote(path)
            yield
        return
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
    # What vanishes meanwhile or cannot be deleted is in nobody's way: a network file system keeps
    # files that somebody has open, under another name, and with them their folder.
    for folder, _, names in os.walk(path):
        for name in names:
            if name.endswith(PARTIAL):
                with suppress(OSError):
                    Path(folder, name).unlink()
    for doomed in path.parent.glob(f"{glob.escape(path.name)}{PARTIAL}-*"):
        shutil.rmtree(doomed, ignore_errors=True)


def _lock_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.lock")


def _holder(file: Path) -> str:
    try:
        who = json.loads(file.read_text(encoding="utf-8"))
        return f"process {who['pid']} on {who['host']}"
    except (OSError, ValueError, KeyError):
        return "another process"
