"""The lock of a cache in an object store: one writer, whatever happened to the one before."""

import json
import os
import subprocess
import sys
import threading
import time
from typing import Any

import pytest

from featcache.errors import CacheError, StorageError
from featcache.remote import lease as leases
from featcache.remote.object_store import ObjectFolder
from featcache.storage import StoreUrl, locate
from featcache.store import Store, writer_lock

from ..conftest import write_cache


def test_a_second_writer_is_told_who_writes(url: StoreUrl) -> None:
    with writer_lock(url):
        with pytest.raises(CacheError) as caught, writer_lock(url):
            pass
        host = os.uname().nodename
        assert f"process {os.getpid()} on {host} is writing this cache" in str(caught.value)
    with writer_lock(url):  # free again
        pass
    assert list(locate(url.parent).list()) == []


def test_of_many_writers_at_once_one_gets_the_lock(url: StoreUrl) -> None:
    outcomes: list[str] = []
    ready, done = threading.Barrier(6), threading.Event()

    def write() -> None:
        ready.wait()
        try:
            with writer_lock(url):
                outcomes.append("writes")
                done.wait(20)
        except CacheError as error:
            outcomes.append(str(error))
        if len(outcomes) == 6:
            done.set()

    threads = [threading.Thread(target=write) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes.count("writes") == 1
    assert sum("is writing this cache" in text for text in outcomes) == 5


@pytest.fixture
def fast_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "RENEW_SECONDS", 0.05)
    monkeypatch.setattr(leases, "STALE_SECONDS", 0.5)


def hold(url: StoreUrl, **who: Any) -> None:
    """A lock as another machine's process holds it."""
    content = {"token": "t", "pid": 1, "host": "elsewhere", "processes": "x", **who}
    locate(url.parent).write(f"{url.name}.lock", json.dumps(content).encode())


@pytest.mark.usefixtures("fast_lease")
def test_a_stale_lock_is_taken_over_and_its_former_holder_stops(
    url: StoreUrl, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cache(url)
    hold(url)
    monkeypatch.setattr(ObjectFolder, "age_seconds", lambda *args: 0.4)
    with pytest.raises(CacheError, match="process 1 on elsewhere is writing"), writer_lock(url):
        pass
    monkeypatch.setattr(ObjectFolder, "age_seconds", lambda *args: 0.6)
    store = Store.open(url, write=True)
    with writer_lock(url):
        store.update_attributes(note=1)
        hold(url)  # somebody else took it, say while this machine slept
        deadline = time.monotonic() + 10
        while not leases._held[url].lost and time.monotonic() < deadline:
            time.sleep(0.02)
        with pytest.raises(CacheError, match="the right to write was lost, since another process"):
            store.update_attributes(note=2)
        assert Store.open(url).attributes["note"] == 1
    assert locate(url.parent).exists("birds.lock")  # not ours to delete


@pytest.mark.usefixtures("fast_lease")
def test_an_old_lock_that_is_renewed_is_respected(
    url: StoreUrl, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ObjectFolder, "age_seconds", lambda *args: 1e6)  # this clock is wrong
    with writer_lock(url), pytest.raises(CacheError, match="is writing"), writer_lock(url):
        pass


def test_a_store_that_ignores_conditions_is_refused(
    url: StoreUrl, monkeypatch: pytest.MonkeyPatch
) -> None:
    def careless(self: ObjectFolder, key: str, content: bytes, version: str | None) -> str:
        self.write(key, content)
        return "any"

    monkeypatch.setattr(ObjectFolder, "write_if", careless)
    with pytest.raises(StorageError, match="ignores the conditions"), writer_lock(url):
        pass
    assert list(locate(url.parent).list()) == []


def test_the_lock_of_a_killed_process_of_this_machine_is_free(url: StoreUrl) -> None:
    code = (
        "import os, sys\nfrom featcache.store import writer_lock\n"
        "lock = writer_lock(sys.argv[1])\nlock.__enter__()\nos._exit(9)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(url)], check=False)
    assert done.returncode == 9
    assert locate(url.parent).exists("birds.lock")
    with writer_lock(url):
        pass
