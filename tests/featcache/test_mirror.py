"""Local copies of caches in stores: what is used is fetched once, and never stale or damaged."""

import os
import shutil
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from featcache import mirror as mirrors
from featcache.errors import CacheCorruptError, CacheError
from featcache.mirror import MirrorConfig
from featcache.reader import open_cache
from featcache.remote.object_store import ObjectFolder
from featcache.remote.remote_cache import replace_remote
from featcache.storage import StoreUrl, locate
from featcache.store import Store, cache_exists, verify

from .conftest import files, objects, write_cache


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Keys of the objects that are read from now on."""
    read: list[str] = []
    original = ObjectFolder.read

    def count(self: ObjectFolder, key: str) -> bytes:
        read.append(key)
        return original(self, key)

    monkeypatch.setattr(ObjectFolder, "read", count)
    return read


def test_only_what_is_used_is_fetched_and_only_once(
    url: StoreUrl, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cache(url, captions=1)
    read = counted(monkeypatch)
    cache = open_cache(url)
    cache.rows("train")
    cache.array("image/projected").read()
    chunks = [key for key in read if "/c/" in key]
    assert sorted(chunks) == sorted(
        [f"image/projected/c/{i}/0" for i in range(5)] + [f"rows/valid/c/{i}" for i in range(3)]
    )
    del read[:]
    again = open_cache(url)
    again.array("image/projected").read()
    again.rows("train")
    assert [key for key in read if "/c/" in key] == []


def test_few_chunks_of_a_long_array_are_asked_for_one_by_one(
    url: StoreUrl, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = write_cache(url)
    monkeypatch.setattr(mirrors, "_LISTED_AT_ONCE", 2)
    listed: list[str] = []
    original = ObjectFolder.list

    def count(self: ObjectFolder, prefix: str = "") -> Any:
        listed.append(prefix)
        return original(self, prefix)

    monkeypatch.setattr(ObjectFolder, "list", count)
    files = Store.open(url).files("image/projected")  # of five chunks
    assert files.present([1, 4]) == [1, 4]
    files.fetch([1, 4])
    assert listed == []
    assert files.file(4).read_bytes() == locate(url).read("image/projected/c/4/0")
    assert not files.file(2).exists()
    assert files.present() == [0, 1, 2, 3, 4]
    assert listed == ["image/projected/c"]
    array = open_cache(url).array("image/projected")
    np.testing.assert_array_equal(array.read(), made.arrays["image/projected"])


@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_mirror_file_is_fetched_again(
    url: StoreUrl, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    made = write_cache(url, dim=512, chunk_rows=8, shard_rows=8)
    cache = open_cache(url)
    cache.array("image/projected")
    file = cache.store.files("image/projected").file(1)
    content = bytearray(file.read_bytes())
    content[70] ^= 4
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(content if damage == "flip" else content[:-9])
    read = counted(monkeypatch)
    array = open_cache(url).array("image/projected")
    np.testing.assert_array_equal(array.read(), made.arrays["image/projected"])
    assert [key for key in read if "/c/" in key] == ["image/projected/c/1/0"]


def test_a_chunk_that_changed_in_the_store_is_fetched_again(url: StoreUrl) -> None:
    made = write_cache(url)
    open_cache(url).array("image/projected")
    store = Store.open(url, write=True)
    changed = made.arrays["image/projected"][:8] + 1
    store.write_chunks("image/projected", 0, changed)
    store.mark_done(store.shards("image")[0], {"invalid": []})
    array = open_cache(url).array("image/projected")
    np.testing.assert_array_equal(array.read()[:8], changed)


def test_a_cache_that_was_replaced_while_open_is_not_mixed_with_the_new_one(url: StoreUrl) -> None:
    write_cache(url)
    cache = open_cache(url)
    cache.array("image/projected")
    other = write_cache(url.with_name("birds.next"), num_rows=24)
    before = objects(other.path)
    replace_remote(url, other.path)
    assert objects(url) == before
    assert not cache_exists(other.path)
    with pytest.raises(CacheError, match=r"birds: updated while open; open it again"):
        cache.array("rows/valid")
    fresh = open_cache(url)
    assert fresh.num_rows == 24
    assert verify(url) == []
    assert fresh.store.folder != cache.store.folder


def test_a_replacement_during_a_download_is_noticed(
    url: StoreUrl, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cache(url)
    other = url.with_name("birds.next")
    write_cache(other, num_rows=24)
    cache = open_cache(url)
    original = mirrors.Mirror._download

    def meanwhile(self: Any, *args: Any) -> None:
        replace_remote(url, other)
        original(self, *args)

    monkeypatch.setattr(mirrors.Mirror, "_download", meanwhile)
    with pytest.raises(CacheError, match=r"birds: updated while open"):
        cache.array("image/projected")


def test_a_damaged_object_is_refused_by_name(url: StoreUrl) -> None:
    write_cache(url)
    folder = locate(url)
    content = bytearray(folder.read("image/projected/c/2/0"))
    content[7] ^= 1
    folder.write("image/projected/c/2/0", bytes(content))
    folder.delete("rows/id/c/0")
    cache = open_cache(url)
    with pytest.raises(CacheCorruptError, match=r"s3://.*image/projected/c/2/0: checksum"):
        cache.array("image/projected")
    with pytest.raises(CacheCorruptError, match=r"s3://.*rows/id/c/0: missing"):
        _ = cache.ids


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_forked_workers_read_the_mirror(url: StoreUrl) -> None:
    made = write_cache(url, dim=512)
    cache = open_cache(url)
    loader = DataLoader(
        cache.dataset("image/projected", "train"),
        batch_size=4,
        num_workers=1,
        multiprocessing_context="fork",
    )
    batches = list(loader)
    rows = torch.cat([batch["row"] for batch in batches]).numpy()
    np.testing.assert_array_equal(rows, cache.rows("train"))
    features = torch.cat([batch["features"] for batch in batches]).numpy()
    np.testing.assert_array_equal(features, made.arrays["image/projected"][rows])
    lazy = cache.dask("image/projected")
    np.testing.assert_array_equal(lazy.compute(scheduler="threads"), made.arrays["image/projected"])


def test_mirrors_are_listed_and_cleared(url: StoreUrl, capsys: pytest.CaptureFixture[str]) -> None:
    write_cache(url)
    other = url.with_name("ferns")
    write_cache(other, num_rows=24)
    first, second = open_cache(url), open_cache(other)
    values = first.array("image/projected").read()
    view = first.array("image/projected").blocks
    second.array("image/projected")
    os.utime(first.store.folder, (1, 1))
    assert [m.folder for m in mirrors.run(MirrorConfig())] == [
        second.store.folder,
        first.store.folder,
    ]
    kept = second.store.folder
    size = sum(len(content) for content in files(kept).values())
    assert [m.folder for m in mirrors.run(MirrorConfig(keep_gb=size / 1e9))] == [kept]
    assert not first.store.folder.exists()
    assert view is not None
    np.testing.assert_array_equal(np.concatenate(view)[:20], values)  # mapped files stay
    assert first.ids == [f"id{row}" for row in range(20)]  # and others are fetched again
    assert mirrors.run(MirrorConfig(clear=True)) == []
    assert "deleted  " in capsys.readouterr().out


def test_a_full_disk_is_found_before_anything_is_fetched(
    url: StoreUrl, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cache(url)
    cache = open_cache(url)
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CacheError, match=r"image/projected takes 260 B here, only 1.0 kB are free"):
        cache.array("image/projected")


def test_a_cache_on_its_way_into_a_store_is_no_mirror(
    url: StoreUrl, capsys: pytest.CaptureFixture[str]
) -> None:
    write_cache(url)
    open_cache(url)
    (kept,) = mirrors.mirrors()
    building = mirrors.mirror_root() / "building-x"
    (building / "rows").mkdir(parents=True)
    (building / "rows/zarr.json").write_text("{}")
    assert mirrors.mirrors() == [kept]
    mirrors.run(MirrorConfig())
    assert f"{building}  2 B, of a job that writes" in capsys.readouterr().out
    mirrors.run(MirrorConfig(clear=True))
    assert (building / "rows/zarr.json").is_file()
    assert not kept.folder.exists()
