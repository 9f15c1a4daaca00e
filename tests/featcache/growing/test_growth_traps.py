"""What lies beside or inside a cache from before, and must not find its way into an update."""

import errno
import os
import shutil
import tempfile
import time

import numpy as np
import pytest

from featcache.errors import CacheError
from featcache.extract import ExtractConfig, run
from featcache.growing import growth
from featcache.growing.donors import Donor, Written
from featcache.mirror import Mirror
from featcache.reader import open_cache
from featcache.storage import locate
from featcache.store import Store, verify


@pytest.fixture
def make(image_folder, tiny_clip, tmp_path, opened_once):
    def build(cache="cache", **changed):
        values = {
            "dataset": {"root": str(image_folder)},
            "backbone": {"model": f"local-dir:{tiny_clip}"},
            "cache": cache if "/" in cache else str(tmp_path / cache),
            "device": "cpu",
            "batch_size": 4,
            "shard_rows": 4,
            "num_readers": 2,
            "precision": "fp32",
            "features": {"storage_dtype": "float32"},
            **changed,
        }
        return ExtractConfig.model_validate(values)

    return build


def test_features_of_another_kind_left_beside_a_cache_are_not_taken_over(
    make, image_folder, make_jpeg, tmp_path
):
    config = make()
    run(config)
    (image_folder / "train/cat/zz.jpg").write_bytes(make_jpeg(90, 70, 1))
    # As an update leaves it that was set aside, when its cache is deleted and made anew by hand.
    stale = make("cache.donor-0123abcd", mode="reference")
    run(stale)
    other = open_cache(stale.cache).array("image/projected").read()
    assert run(config).num_extracted == 1
    run(make("fresh"))
    grown, fresh = (
        open_cache(tmp_path / name).array("image/projected").read() for name in ("cache", "fresh")
    )
    largest = np.abs(fresh).max()
    np.testing.assert_allclose(grown, fresh, rtol=0, atol=1e-6 * largest)
    assert np.abs(other - fresh).max() > 1e-4 * largest


def test_first_captions_bring_their_text_policy(make, tmp_path, image_folder):
    listing = tmp_path / "list.csv"

    def write(caption: str) -> None:
        lines = ["path,split,label,captions"]
        for file in sorted(image_folder.rglob("*.jpg")):
            path = file.relative_to(image_folder)
            lines.append(f"{path},{path.parts[0]},{path.parts[1]},{caption}")
        listing.write_text("\n".join(lines) + "\n")

    config = make(
        dataset={"kind": "table", "file": str(listing), "root": str(image_folder)},
        features={"text_policy": "picture_of"},
    )
    for caption, policy in (("", "raw"), ("A cat", "picture_of"), ("", "raw")):
        write(caption)
        report = run(config)
        cache = open_cache(config.cache)
        assert cache.identity.features.text_policy == policy
        assert report.num_captions == (14 if caption else 0)
        assert cache.has("text/projected") == bool(caption)
        assert report.num_copied == 14 * (len(cache.history) > 0)


def test_a_cache_behind_a_symbolic_link_stays_on_its_disk(make, image_folder, make_jpeg, tmp_path):
    disk = tmp_path / "disk"
    run(make(str(disk / "real")))
    (tmp_path / "link").symlink_to(disk / "real")
    (image_folder / "train/cat/zz.jpg").write_bytes(make_jpeg(40, 40, 1))
    assert run(make("link")).num_copied == 14
    assert open_cache(disk / "real").num_rows == 15
    assert run(make("link", restart=True)).num_extracted == 15
    assert (tmp_path / "link").is_symlink()
    assert sorted(p.name for p in disk.iterdir()) == ["real", "real.lock"]
    assert [p.name for p in tmp_path.iterdir() if "link" in p.name] == ["link"]


def test_half_an_array_of_class_text_in_a_store_does_not_stop_an_update(
    make, bucket, image_folder, make_jpeg
):
    config = make(f"{bucket}/birds")
    run(config)
    # What a head leaves that is killed while it keeps class text: the metadata come last.
    locate(config.cache).write("class_text/abc/c/0/0", b"half")
    (image_folder / "train/cat/zz.jpg").write_bytes(make_jpeg(40, 40, 1))
    assert run(config).num_extracted == 1
    assert verify(config.cache) == []


def test_an_open_cache_in_a_store_does_not_mix_images_of_before_and_after_a_recheck(
    make, bucket, image_folder, make_jpeg
):
    config = make(f"{bucket}/birds", features={"pooled": True})
    run(config)
    for seed in (1, 2):
        cache = open_cache(config.cache)
        cache.array("image/projected").read()
        (image_folder / "train/cat/00.jpg").write_bytes(make_jpeg(50, 50, seed))
        again = make(f"{bucket}/birds", features={"pooled": True}, recheck=True)
        assert run(again).num_extracted == 1
        with pytest.raises(CacheError, match="updated while open"):
            cache.array("image/pooled")
        assert open_cache(config.cache).fingerprint == cache.fingerprint


def test_rows_that_others_repeat_wait_on_the_caches_own_disk(
    make, bucket, image_folder, make_jpeg, monkeypatch, tmp_path
):
    remote = f"{bucket}/birds"
    for cache in ("cache", remote):
        run(make(cache))
    (image_folder / "train/cat/a.jpg").write_bytes(make_jpeg(40, 40, 1))
    shutil.copy(image_folder / "train/cat/a.jpg", image_folder / "train/cat/b.jpg")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))

    def full(descriptor: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", full, raising=False)
        with pytest.raises(CacheError, match=r"cache\.next: No space left on device \(for "):
            run(make("cache"))
    for cache in ("cache", remote):
        assert run(make(cache)).num_extracted == 1
        assert verify(make(cache).cache) == []
        grown = open_cache(make(cache).cache)
        first, second = (grown.ids.index(f"train/cat/{name}.jpg") for name in "ab")
        features = grown.array("image/projected").read()
        assert features[first].tobytes() == features[second].tobytes()


def test_a_state_that_was_complete_is_remembered_although_a_retry_was_killed(
    make, image_folder, make_jpeg
):
    config = make()
    fingerprint = run(config).fingerprint
    store = Store.open(config.cache, write=True)
    store.mark_pending(store.shards("image")[1])  # what `--retry_invalid` begins with
    assert not Store.open(config.cache).complete
    (image_folder / "train/cat/zz.jpg").write_bytes(make_jpeg(40, 40, 1))
    run(config)
    (entry,) = open_cache(config.cache).history
    assert (entry["fingerprint"], entry["num_rows"]) == (fingerprint, 14)


@pytest.mark.parametrize("lost", ["val/dog/13.jpg", "train/cat/00.jpg"])
def test_room_is_reckoned_for_all_that_will_not_be_linked(make, image_folder, monkeypatch, lost):
    config = make(features={"pooled": True})
    run(config)
    told: list[int] = []
    original = growth.create

    def noted(path, plan, linked_bytes):
        told.append(linked_bytes)
        return original(path, plan, linked_bytes)

    monkeypatch.setattr(growth, "create", noted)
    before = open_cache(config.cache).ids
    (image_folder / lost).unlink()
    inodes = {file.stat().st_ino for file in (config.cache / "image").rglob("c/*/*")}
    run(config)
    assert open_cache(config.cache).num_rows == len(before) - 1
    linked = [
        file.stat().st_size
        for file in (config.cache / "image").rglob("c/*/*")
        if file.stat().st_ino in inodes
    ]
    assert told == [sum(linked)]


def test_rows_of_earlier_shards_are_read_once(make, image_folder, make_jpeg, monkeypatch, tmp_path):
    config = make()
    run(config)
    for number in range(9):  # one picture in new shards, one behind the other
        (image_folder / f"val/dog/z{number}.jpg").write_bytes(make_jpeg(40, 40, 7))
    asked: list[str] = []
    original = Donor.take

    def noted(self, name, rows):
        if isinstance(self, Written):
            asked.append(name)
        return original(self, name, rows)

    monkeypatch.setattr(Donor, "take", noted)
    assert run(config).num_extracted == 1
    assert asked.count("rows/content") == 1
    assert asked.count("image/projected") >= 2
    run(make("fresh"))
    grown, fresh = (open_cache(tmp_path / name) for name in ("cache", "fresh"))
    assert grown.ids == fresh.ids
    assert verify(config.cache) == []
    features = grown.array("image/projected").read()
    np.testing.assert_allclose(features, fresh.array("image/projected").read(), atol=1e-6)


def test_an_open_cache_in_a_store_notices_one_made_anew_of_the_same_files(
    make, bucket, image_folder, make_jpeg
):
    config = make(f"{bucket}/birds", features={"pooled": True})
    run(config)
    cache = open_cache(config.cache)
    cache.array("image/projected").read()
    Store.open(config.cache, write=True).update_attributes(note=1)
    cache.array("rows/content").read()  # still the same cache
    (image_folder / "train/cat/00.jpg").write_bytes(make_jpeg(50, 50, 1))
    time.sleep(1.1)  # times in stores are whole seconds
    again = make(f"{bucket}/birds", features={"pooled": True}, restart=True)
    assert run(again).num_extracted == 14
    with pytest.raises(CacheError, match="updated while open"):
        cache.array("image/pooled")
    assert open_cache(config.cache).fingerprint == cache.fingerprint


@pytest.mark.parametrize("damaged", [False, True])
def test_chunks_in_a_store_are_fetched_together_and_a_damaged_one_is_encoded_again(
    make, bucket, image_folder, monkeypatch, tmp_path, damaged
):
    config = make(f"{bucket}/birds")
    run(config)
    (image_folder / "train/cat/00.jpg").unlink()  # all rows move, so none can be linked
    if damaged:
        folder = locate(config.cache)
        content = bytearray(folder.read("image/projected/c/1/0"))
        content[7] ^= 1
        folder.write("image/projected/c/1/0", bytes(content))
    together: list[int] = []
    original = Mirror._download

    def noted(self, files, missing, versions):
        if files.name == "image/projected":
            together.append(len(missing))
        original(self, files, missing, versions)

    monkeypatch.setattr(Mirror, "_download", noted)
    assert run(config).num_extracted == (4 if damaged else 0)
    assert verify(config.cache) == []
    assert together[0] == 2  # the first new shard has rows of two chunks
    run(make("fresh"))
    grown, fresh = (
        open_cache(path).array("image/projected").read()
        for path in (config.cache, tmp_path / "fresh")
    )
    np.testing.assert_allclose(grown, fresh, rtol=0, atol=1e-6 * np.abs(fresh).max())


def test_what_a_shard_under_way_holds_is_forgotten_when_it_is_written_again(make):
    config = make()
    run(config)
    store = Store.open(config.cache, write=True)
    known, rows = Written(store), np.arange(14)
    second = store.shards("image")[1]
    inside = (rows >= second.start) & (rows < second.stop)
    store.mark_pending(second)
    known.learn("image", rows)
    np.testing.assert_array_equal(known.done, ~inside)
    np.testing.assert_array_equal(known.content, np.where(inside, 0, store.read("rows/content")))
    store.mark_done(second, {"invalid": []})
    known.learn("image", rows)
    np.testing.assert_array_equal(known.content, store.read("rows/content"))
    assert known.intact("image", rows).all()
    known.forget(second)
    np.testing.assert_array_equal(known.done, ~inside)
    store.files("image/projected").file(1).write_bytes(b"cut")
    known.learn("image", rows)
    np.testing.assert_array_equal(known.intact("image", rows), ~inside)
