"""The writer's lock of a cache in an object store: an object that its holder keeps renewing.

`<cache>.lock` is made by a conditional write (only if there is none), renewed by a thread, and
deleted at the end. A holder that is known to be dead, or that has not renewed it for
`STALE_SECONDS` by the store's clock and is then not seen to do so, loses it.
"""

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from featcache.errors import CacheError, StorageError
from featcache.remote.object_store import ObjectFolder
from featcache.storage import StoreUrl

RENEW_SECONDS = 15.0
"""Between two renewals."""
STALE_SECONDS = 90.0
"""Without a renewal for this long, a lease may be taken over."""

_held: dict[StoreUrl, "_Lease"] = {}


@contextlib.contextmanager
def lease(url: StoreUrl) -> Iterator[None]:
    """Exclusive right to write the cache at `url`, which need not exist yet.

    Raises:
        CacheError: naming the process and host that hold it.
        StorageError: if the store cannot be reached, or knows no conditional writes.
    """
    taken = _Lease(url)
    taken.acquire()
    _held[url] = taken
    try:
        yield
    finally:
        del _held[url]
        taken.release()


def require_kept(url: StoreUrl) -> None:
    """Checks that a lease this process took on a cache is still its own.

    Raises:
        CacheError: if it was lost.
    """
    taken = _held.get(url)
    if taken is not None and taken.lost:
        raise CacheError(
            f"{url}: the right to write was lost, since {taken.lost}; what is done stays, the same "
            "command resumes"
        )


class _Lease:
    """A lease under way; `lost` says why it ended early."""

    def __init__(self, url: StoreUrl) -> None:
        self.url = url
        self.lost = ""
        self._folder = ObjectFolder(url.parent)
        self._key = f"{url.name}.lock"
        self._version = ""
        self._renewed = 0.0
        self._who = {
            "token": secrets.token_hex(16),
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "processes": _process_space(),
            "since": int(time.time()),
        }
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def acquire(self) -> None:
        version = self._folder.write_if(self._key, self._content(), None)
        if version is None:
            version = self._take_over()
        if self._folder.write_if(self._key, self._content(), None) is not None:
            self._folder.delete(self._key)
            raise StorageError(
                f"{self.url}: this store ignores the conditions of conditional writes "
                "(If-None-Match), so it cannot keep two writers apart; use another store, or write "
                "the cache to a disk and copy it there"
            )
        self._version, self._renewed = version, time.monotonic()
        self._thread.start()

    def release(self) -> None:
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(StorageError):  # it becomes stale by itself
            entry = self._folder.entry(self._key)
            if entry is not None and entry.version == self._version:
                self._folder.delete(self._key)

    def _content(self) -> bytes:
        return json.dumps({**self._who, "renewed": time.time()}).encode()

    def _holder(self) -> tuple[dict[str, Any], str]:
        """Who holds the lease and the object's version; empty if nobody does any more."""
        entry = self._folder.entry(self._key)
        try:
            content = self._folder.read(self._key)
        except FileNotFoundError:
            return {}, ""
        try:
            who = json.loads(content)
        except ValueError:
            who = {}
        return (who if isinstance(who, dict) else {}), "" if entry is None else entry.version

    def _take_over(self) -> str:
        who, version = self._holder()
        if who.get("token") == self._who["token"]:
            return version  # the first write was answered late, and tried again
        if not (_is_dead(who) or self._is_stale(version)):
            raise self._refusal(who)
        taken = self._folder.write_if(self._key, self._content(), version or None)
        if taken is None:
            raise self._refusal(self._holder()[0])
        return taken

    def _is_stale(self, version: str) -> bool:
        age = self._folder.age_seconds(self._key, time.time())
        if age is None:
            return True
        if age < STALE_SECONDS:
            return False
        # Clocks may differ: a holder that lives renews the lease before our eyes.
        until = time.monotonic() + 2 * RENEW_SECONDS
        while time.monotonic() < until:
            time.sleep(RENEW_SECONDS / 10)
            entry = self._folder.entry(self._key)
            if entry is not None and entry.version != version:
                return False
        return True

    def _refusal(self, who: dict[str, Any]) -> CacheError:
        name = "another process"
        if "pid" in who and "host" in who:
            name = f"process {who['pid']} on {who['host']}"
        return CacheError(
            f"{self.url}: {name} is writing this cache; wait until it is done, or stop it (its "
            f"lock can be taken over {STALE_SECONDS:.0f} seconds after it was killed)"
        )

    def _renew(self) -> None:
        while not self._stop.wait(RENEW_SECONDS):
            try:
                version = self._folder.write_if(self._key, self._content(), self._version)
                if version is None:
                    who, version = self._holder()
                    if who.get("token") != self._who["token"]:
                        self.lost = "another process took it over"
                        return
            except StorageError as error:
                # Before anybody may take it over; a renewal can hang for as long as a request.
                if time.monotonic() - self._renewed > STALE_SECONDS - 2 * RENEW_SECONDS:
                    self.lost = f"the lock could not be renewed ({error})"
                    return
                continue
            self._version, self._renewed = version, time.monotonic()


def _process_space() -> str:
    """What two processes share that know each other by their numbers; "" = cannot tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _is_dead(who: dict[str, Any]) -> bool:
    """Whether a holder ran on this machine and does not any more."""
    space = _process_space()
    if not space or who.get("processes") != space or not isinstance(who.get("pid"), int):
        return False
    try:
        os.kill(who["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
