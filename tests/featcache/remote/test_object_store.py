"""Caches in an object store: the local cache's bytes, one writer, nothing lost."""

import itertools
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from featcache.errors import CacheError, StorageDeniedError
from featcache.export import ExportConfig
from featcache.export import run as export
from featcache.info import InfoConfig
from featcache.info import run as info
from featcache.layout.chunks import sealed
from featcache.reader import open_cache
from featcache.remote.object_store import ObjectFolder
from featcache.remote.remote_cache import replace_remote
from featcache.storage import Location, StoreUrl, locate
from featcache.store import (
    Store,
    cache_exists,
    create,
    delete_cache,
    open_store,
    verify,
    writer_lock,
)
from featcache.verify import VerifyConfig
from featcache.verify import run as verify_job

from ..conftest import files, objects, plan_cache, write_cache

Make = Callable[..., Any]


@pytest.mark.parametrize(
    "options", [{"views": 3, "captions": 2}, {"num_rows": 37, "dim": 512, "chunk_rows": 8}]
)
def test_objects_are_the_local_caches_files(
    written: Make, url: StoreUrl, options: dict[str, Any]
) -> None:
    local = written(**options)
    write_cache(url, **options)
    assert objects(url) == files(local.path)
    assert [entry.key for entry in locate(url.parent).list() if "/" not in entry.key] == []
    assert verify(url) == []
    here, there = open_cache(local.path), open_cache(str(url))
    assert there.fingerprint == here.fingerprint
    assert there.ids == here.ids
    assert there.classes.equals(here.classes)
    for name in here.feature_names():
        mine, other = there.array(name), here.array(name)
        assert (mine.view is None) == (other.view is None)  # mapped where the local one is
        np.testing.assert_array_equal(mine.read(), other.read())
        rows = np.array([3, 0, 19, 3])
        np.testing.assert_array_equal(mine.take(rows), other.take(rows))
    np.testing.assert_array_equal(there.rows("train"), here.rows("train"))
    group = open_store(url)
    for name, values in local.arrays.items():
        np.testing.assert_array_equal(group[name][...], values)
    assert group["rows/id"][:].tolist() == here.ids


class Killed(BaseException):
    """What nothing in the code under test catches."""


def kill_at(monkeypatch: pytest.MonkeyPatch, moment: int) -> Any:
    """Counts the requests that change a store, and stops before number `moment`."""
    steps = itertools.count()
    for name in ("write", "write_if", "delete", "copy"):
        original = getattr(ObjectFolder, name)

        def counting(self: Location, *args: Any, original: Any = original) -> Any:
            if next(steps) == moment:
                raise Killed
            return original(self, *args)

        monkeypatch.setattr(ObjectFolder, name, counting)
    return steps


def test_a_replacement_that_was_killed_is_finished_by_the_next_writer(url: StoreUrl) -> None:
    def root(number: int) -> bytes:
        return sealed("", {"attributes": {"featcache": {"complete": True, "number": number}}})

    old = {"a/same": b"1", "a/changed": b"2", "gone": b"3", "zarr.json": root(1)}
    new = {"a/same": b"1", "a/changed": b"4", "added": b"5", "zarr.json": root(2)}
    other = url.with_name("birds.next")

    def prepare() -> None:
        for target, content in ((url, old), (other, new)):
            locate(target).delete(*[entry.key for entry in locate(target).list()])
            for key, value in content.items():
                locate(target).write(key, value)

    prepare()
    with pytest.MonkeyPatch.context() as patch:
        steps = kill_at(patch, -1)
        replace_remote(url, other)
        total = next(steps)
    assert total == 9  # two markers, three copies (nothing that is equal already), four deletions
    for moment in range(total):
        prepare()
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, moment)
            with pytest.raises(Killed):
                replace_remote(url, other)
        with writer_lock(url):
            pass
        if moment == 0:  # nothing had happened yet
            assert objects(url) == old
            continue
        assert objects(url) == new, moment
        assert objects(other) == {}, moment
        assert [e.key for e in locate(url.parent).list() if "/" not in e.key] == [], moment


def test_one_cache_cannot_be_replaced_by_half_of_another(url: StoreUrl) -> None:
    write_cache(url)
    other = url.with_name("birds.next")
    made = plan_cache(other, num_rows=24)
    create(other, made.plan)
    with pytest.raises(CacheError, match=r"birds.next: not complete"):
        replace_remote(url, other)
    with pytest.raises(CacheError, match=r"nothing: no cache there"):
        replace_remote(url, url.with_name("nothing"))
    assert open_cache(url).num_rows == 20


def test_an_unfinished_cache_is_resumed(url: StoreUrl) -> None:
    made = plan_cache(url)
    store = create(url, made.plan)
    first, second, third = store.pending()
    made.write(store, first)
    store.mark_done(first, {"n": 1})
    made.write(store, second)  # killed here
    again = Store.open(url, write=True)
    assert again.pending() == [second, third]
    assert again.reports("image") == {0: {"n": 1}}
    with pytest.raises(CacheError, match="2 of 3 shards are missing"):
        open_cache(url)
    with pytest.raises(CacheError, match=r"s3://.*projected/c/4/0: missing, so shard image/00002"):
        again.mark_done(third, {})
    partly = open_cache(url, allow_incomplete=True)
    assert np.isnan(partly.array("image/projected").read()[8:]).all()
    for shard in again.pending():
        made.write(again, shard)
        again.mark_done(shard, {})
    again.finish({"rate": 1})
    whole = open_cache(url)
    np.testing.assert_array_equal(
        whole.array("image/projected").read(), made.arrays["image/projected"]
    )
    assert whole.attributes["summary"] == {"rate": 1}


def test_rows_are_declared_valid_after_their_features(
    url: StoreUrl, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = plan_cache(url)
    store = create(url, made.plan)
    stored: list[str] = []
    original = ObjectFolder.write

    def slow(self: ObjectFolder, key: str, *parts: Any) -> None:
        time.sleep(0.05 if key.startswith("image/") else 0)
        original(self, key, *parts)
        stored.append(key)

    monkeypatch.setattr(ObjectFolder, "write", slow)
    shard = store.pending()[0]
    made.write(store, shard)
    store.mark_done(shard, {})
    assert max(stored.index(f"image/projected/c/{i}/0") for i in (0, 1)) < stored.index(
        "rows/valid/c/0"
    )
    assert stored[-1] == "shards/image/c/0"


def test_the_writer_waits_for_the_store_only_at_the_end_of_a_shard(
    url: StoreUrl, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = plan_cache(url)
    store = create(url, made.plan)
    shard = store.pending()[0]
    together, original = threading.Barrier(2), ObjectFolder.write

    def slow(self: ObjectFolder, key: str, *parts: Any) -> None:
        if key.startswith("image/"):
            together.wait(20)  # passes only if both chunks are under way at once
        original(self, key, *parts)

    monkeypatch.setattr(ObjectFolder, "write", slow)
    for start in (0, 4):  # a writer that waited for the first would never come to the second
        store.write_chunks("image/projected", start, made.arrays["image/projected"][start:][:4])
    for name in ("rows/valid", "rows/content", "rows/stamp"):
        store.write_chunks(name, 0, made.arrays[name][: shard.stop])
    store.mark_done(shard, {})
    assert 0 in store.reports("image")


def test_creation_leaves_other_peoples_objects_alone(url: StoreUrl) -> None:
    locate(url).write("letters/a.txt", b"dear")
    made = plan_cache(url)
    with pytest.raises(CacheError, match=r"no cache, but 1 other objects, the first is letters/a"):
        create(url, made.plan)
    assert locate(url).read("letters/a.txt") == b"dear"
    with pytest.raises(CacheError, match="no such cache"):
        open_cache(url)


def test_what_a_killed_creation_or_deletion_left_is_cleared(
    url: StoreUrl, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = plan_cache(url)
    original = ObjectFolder.write

    def stop(self: ObjectFolder, key: str, *parts: Any) -> None:
        if key == "zarr.json":
            raise KeyboardInterrupt
        original(self, key, *parts)

    monkeypatch.setattr(ObjectFolder, "write", stop)
    with pytest.raises(KeyboardInterrupt):
        create(url, made.plan)
    monkeypatch.setattr(ObjectFolder, "write", original)
    assert not cache_exists(url)
    assert list(locate(url).list())
    locate(url).write("image/stale", b"x")
    create(url, made.plan)
    assert verify(url) == []
    with pytest.raises(CacheError, match="exists already"):
        create(url, made.plan)
    delete_cache(url)
    assert list(locate(url.parent).list()) == []


def test_every_flipped_or_foreign_or_missing_object_is_named(url: StoreUrl) -> None:
    write_cache(url, num_rows=5, captions=1)
    Store.open(url).put_array("class_text/x", np.ones((2, 3, 4), np.float32))
    assert verify(url) == []
    folder = locate(url)
    for key in (
        "zarr.json",
        "image/projected/zarr.json",
        "image/projected/c/1/0",
        "rows/id/c/0",
        "shards/image/c/0",
    ):
        content = folder.read(key)
        damaged = bytearray(content)
        damaged[len(damaged) // 2] ^= 1
        folder.write(key, bytes(damaged))
        problems = verify(url)
        assert len(problems) == 1, (key, problems)
        assert f"{url}/{key}" in problems[0]
        folder.write(key, content)
    folder.write("image/other", b"1")
    folder.delete("rows/path/c/0")
    assert verify(url) == [f"{url}/rows/path/c/0: missing", f"{url}/image/other: foreign file"]


# One process imports everything and forks the writers that are killed; each says what it found.
WRITERS = """
import importlib, os, signal, sys, threading, traceback, types
from featcache.remote.object_store import ObjectFolder
from featcache.storage import place
from featcache.store import Store, cache_exists, create, writer_lock

tests = sys.modules["made"] = types.ModuleType("made")  # other packages are called tests, too
tests.__path__ = [sys.argv[1]]
made = importlib.import_module("made.featcache.conftest")
url, last = place(sys.argv[2]), 0
write, lock, count = ObjectFolder.write, threading.Lock(), [0]

def counting(self, key, *parts):
    with lock:
        count[0] += 1
        if count[0] == last:
            os.kill(os.getpid(), signal.SIGKILL)
    write(self, key, *parts)

def work():
    ObjectFolder.write = counting
    with writer_lock(url):
        planned = made.plan_cache(url, captions=1)
        found = Store.open(url, write=True) if cache_exists(url) else None
        print("nothing" if found is None else len(found.reports("image")), flush=True)
        store = found or create(url, planned.plan)
        for shard in store.pending():
            planned.write(store, shard)
            store.mark_done(shard, {"invalid": []})
        store.finish({})

for last in map(int, sys.argv[3:]):
    process = os.fork()
    if process == 0:
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(process, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""


def test_killed_at_any_request_and_run_again_equals_uninterrupted(
    tmp_path: Path, url: StoreUrl
) -> None:
    local = plan_cache(tmp_path / "local", captions=1)
    store = create(tmp_path / "local", local.plan)
    for shard in store.pending():
        local.write(store, shard)
        store.mark_done(shard, {"invalid": []})
    store.finish({})
    tests = str(Path(__file__).parents[2])
    # Killed in the creation, after it in the second shard, in the third, and never.
    moments = ["20", "48", "7", "10000"]
    command = [sys.executable, "-c", WRITERS, tests, str(url), *moments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stdout.split()
    assert lines[1::2] == ["-9", "-9", "-9", "0"], done.stderr
    assert lines[0] == lines[2] == "nothing"
    assert 0 < int(lines[4]) < int(lines[6]) <= 3, lines
    assert objects(url) == files(tmp_path / "local")
    assert [e.key for e in locate(url.parent).list() if "/" not in e.key] == []


def test_jobs_take_an_address(
    written: Make, url: StoreUrl, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    local = written(captions=1)
    write_cache(url, captions=1)
    assert verify_job(VerifyConfig(cache=url)).arrays == (
        verify_job(VerifyConfig(cache=local.path)).arrays
    )
    found, expected = info(InfoConfig(cache=url)), info(InfoConfig(cache=local.path))
    assert found["path"] == str(url)
    assert {**found, "path": ""} == {**expected, "path": ""}
    export(ExportConfig(cache=url, out=tmp_path / "a.parquet"))
    export(ExportConfig(cache=local.path, out=tmp_path / "b.parquet"))
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    with pytest.raises(CacheError, match=r"s3://.*nothing: no such cache \(no zarr.json there\)"):
        info(InfoConfig(cache=url.with_name("nothing")))
    assert "not-to-be-shown" not in capsys.readouterr().out


def test_an_array_is_added_once(url: StoreUrl, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cache(url)
    store = Store.open(url)
    values = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    store.put_array("class_text/abc", values, {"templates": ["a {name}"]})
    store.put_array("class_text/abc", values + 1)
    with monkeypatch.context() as patch:
        patch.setattr(Store, "has", lambda self, name: False)  # as if both began at once
        Store.open(url).put_array("class_text/abc", values + 1)
    cache = open_cache(url)
    np.testing.assert_array_equal(cache.array("class_text/abc").read(), values)
    assert cache.store.files("class_text/abc").attributes == {"templates": ["a {name}"]}
    assert verify(url) == []


def test_an_upload_that_fails_stops_the_shard(
    url: StoreUrl, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = plan_cache(url)
    store = create(url, made.plan)
    original = ObjectFolder.write

    def denied(self: ObjectFolder, key: str, *parts: Any) -> None:
        if key == "image/projected/c/1/0":
            raise StorageDeniedError(f"{self.url}/{key}: denied")
        original(self, key, *parts)

    monkeypatch.setattr(ObjectFolder, "write", denied)
    shard = store.pending()[0]
    rows = made.arrays["image/projected"][: shard.stop]
    store.write_chunks("image/projected", 0, rows)  # returns before the store has answered
    with pytest.raises(StorageDeniedError, match="c/1/0: denied"):
        store.mark_done(shard, {})
    with pytest.raises(CacheError, match="c/1/0: missing, so shard image/00000"):
        store.mark_done(shard, {})
    assert store.pending()[0] == shard
