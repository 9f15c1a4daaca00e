"""The store: plain Zarr for others, nothing lost by a crash, one writer, clear refusals."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import zarr
from zarr.codecs import Crc32cCodec

from featcache.errors import CacheCorruptError, CacheError
from featcache.identity import Identity
from featcache.layout.chunks import sealed
from featcache.store import Store, create, verify, writer_lock

Make = Callable[..., Any]


def change_root(path: Path, reseal: bool = False, **values: Any) -> None:
    document = json.loads((path / "zarr.json").read_bytes())
    document["attributes"]["featcache"].update(values)
    raw = sealed("", document) if reseal else json.dumps(document).encode()
    (path / "zarr.json").write_bytes(raw)


@pytest.mark.parametrize("options", [{}, {"num_rows": 1}, {"views": 3}, {"captions": 2}])
def test_plain_zarr_reads_everything(written: Make, options: dict[str, Any]) -> None:
    made = written(**options)
    group = zarr.open_group(made.path, mode="r")
    for name, values in made.arrays.items():
        np.testing.assert_array_equal(group[name][...], values)
    manifest = made.plan.manifest
    assert group["rows/id"][:].tolist() == manifest.ids
    assert group["rows/path"][:].tolist() == manifest.paths
    assert group["rows/split"][:].tolist() == manifest.splits
    assert group["rows/caption_values"][:].tolist() == manifest.caption_values
    assert group["classes/name"][:].tolist() == ["oak", "elm", "日本"]
    assert group["classes/genus"][:].tolist() == ["Quercus", "", "x"]
    np.testing.assert_array_equal(group["classes/count"][:], manifest.classes["count"])
    np.testing.assert_array_equal(group["rows/label_values"][:], manifest.label_values)
    np.testing.assert_array_equal(group["rows/label_offsets"][:], manifest.label_offsets)
    np.testing.assert_array_equal(group["text/offsets"][:], manifest.caption_offsets)
    shards = len([shard for shard in made.plan.shards if shard.kind == "image"])
    assert [json.loads(text) for text in group["shards/image"][:]] == [
        {"invalid": report["invalid"]} for report in Store.open(made.path).reports("image").values()
    ]
    assert group["shards/image"].shape == (shards,)


def test_chunk_files_are_byte_for_byte_those_that_zarr_writes(
    written: Make, tmp_path: Path
) -> None:
    made = written(num_rows=18, views=2)
    other = zarr.create_group(tmp_path / "zarr")
    for name in (*made.arrays, "rows/id", "classes/name", "rows/label_values", "shards/image"):
        ours = zarr.open_array(made.path / name, mode="r")
        theirs = other.create_array(
            name,
            shape=ours.shape,
            chunks=ours.chunks,
            dtype=str if ours.dtype.kind == "T" else ours.dtype,
            fill_value=ours.fill_value,
            compressors=[Crc32cCodec()],
            config={"write_empty_chunks": True},
        )
        theirs[...] = ours[...]
        found = {p.relative_to(made.path) for p in (made.path / name / "c").rglob("*")}
        assert found == {
            p.relative_to(tmp_path / "zarr") for p in (tmp_path / "zarr" / name / "c").rglob("*")
        }
        for file in found:
            if (made.path / file).is_file():
                assert (made.path / file).read_bytes() == (tmp_path / "zarr" / file).read_bytes()


def test_a_shard_that_was_written_but_not_marked_is_pending_again(planned: Make) -> None:
    made = planned()
    store = create(made.path, made.plan)
    first, second, third = store.pending()
    made.write(store, first)
    store.mark_done(first, {"n": 1})
    made.write(store, second)  # killed here: the data are on disk, the mark is not
    again = Store.open(made.path, write=True)
    assert again.pending() == [second, third]
    assert again.reports("image") == {0: {"n": 1}}
    assert verify(made.path) == []
    with pytest.raises(CacheError, match="2 of 3 shards are not done, the first is image/00001"):
        again.finish({})
    for shard in again.pending():
        made.write(again, shard)
        again.mark_done(shard, {})
    again.finish({"rate": 2.5})
    whole = Store.open(made.path)
    assert whole.complete
    assert whole.attributes["summary"] == {"rate": 2.5}
    np.testing.assert_array_equal(whole.read("image/projected"), made.arrays["image/projected"])


def test_a_shard_without_its_data_cannot_be_marked(planned: Make) -> None:
    made = planned()
    store = create(made.path, made.plan)
    with pytest.raises(CacheError, match=r"image/projected/c/0/0: missing, so shard image/00000"):
        store.mark_done(store.pending()[0], {})


def test_a_write_that_fails_leaves_the_old_chunk_and_no_partial_file(
    written: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = written()
    store = Store.open(made.path, write=True)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CacheError, match=r"c/0/0: No space left on device; .* resumes"):
        store.write_chunks("image/projected", 0, np.zeros((4, 6), np.float16))
    monkeypatch.undo()
    assert verify(made.path) == []
    assert not list(made.path.rglob("*.partial"))


def test_what_a_killed_writer_left_is_swept_by_the_next(written: Make) -> None:
    made = written()
    half = made.path / "image/projected/c/0/0.1a2b3c4d.partial"
    half.write_bytes(b"half")
    building = made.path.with_name("cache.partial-00ff")
    building.mkdir()
    assert verify(made.path) == [f"{half}: left by a killed writer, the next one removes it"]
    with Store.open(made.path, write=True).lock():
        assert not half.exists()
        assert not building.exists()
    deleted = made.path.with_name("cache[1].partial-deleted")  # a pattern to `glob`
    deleted.mkdir()
    with writer_lock(made.path.with_name("cache[1]")):
        assert not deleted.exists()


def test_creation_leaves_nothing_when_it_fails(
    planned: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = planned()

    def stop(self: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", stop)
    with pytest.raises(KeyboardInterrupt):
        create(made.path, made.plan)
    assert list(made.path.parent.iterdir()) == []


def test_room_on_the_disk_is_checked_before_anything_is_written(
    planned: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = planned(num_rows=1000, dim=512, chunk_rows=8)
    usage = SimpleNamespace(total=10**9, used=0, free=65_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CacheError, match=r"needs 68\.\d MB, only 65.0 MB are free; free some"):
        create(made.path, made.plan)
    assert not made.path.exists()


def test_an_existing_path_is_not_overwritten(written: Make) -> None:
    made = written()
    with pytest.raises(CacheError, match="exists already"):
        create(made.path, made.plan)


def test_a_shard_may_not_cut_a_chunk(planned: Make) -> None:
    made = planned(chunk_rows=5, shard_rows=8)
    with pytest.raises(ValueError, match=r"shard image/00000 \(0..8\) cuts chunks of 5 rows"):
        create(made.path, made.plan)


@pytest.mark.parametrize(
    ("start", "shape", "dtype"),
    [
        (1, (4, 6), "f2"),
        (0, (3, 6), "f2"),
        (0, (4, 5), "f2"),
        (0, (4, 6), "f4"),
        (20, (0, 6), "f2"),
    ],
)
def test_rows_that_are_not_whole_chunks_are_refused(
    written: Make, start: int, shape: tuple[int, ...], dtype: str
) -> None:
    made = written()
    store = Store.open(made.path, write=True)
    with pytest.raises(ValueError, match="image/projected"):
        store.write_chunks("image/projected", start, np.zeros(shape, dtype))


def test_a_second_writer_is_told_who_writes(written: Make) -> None:
    made = written()
    with writer_lock(made.path), pytest.raises(CacheError) as caught, writer_lock(made.path):
        pass
    host = os.uname().nodename
    assert f"process {os.getpid()} on {host} is writing this cache" in str(caught.value)
    with writer_lock(made.path):  # free again
        pass
    assert not made.path.with_name("cache.writer.json").exists()


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    code = (
        "import os, sys\nfrom featcache.store import writer_lock\n"
        "lock = writer_lock(sys.argv[1])\nlock.__enter__()\nos._exit(9)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "cache"], check=False)
    assert done.returncode == 9
    with writer_lock(tmp_path / "cache"):
        pass


def test_a_side_array_is_kept_once(written: Make) -> None:
    made = written()
    store = Store.open(made.path)
    first = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    store.put_array("class_text/abc", first, {"templates": ["a {name}"]})
    store.put_array("class_text/abc", first + 1, {"templates": ["other"]})
    array = zarr.open_group(made.path, mode="r")["class_text/abc"]
    np.testing.assert_array_equal(array[...], first)
    assert array.attrs["templates"] == ["a {name}"]
    assert verify(made.path) == []
    assert sorted(p.name for p in made.path.parent.iterdir()) == ["cache"]


def test_of_two_jobs_adding_an_array_at_once_the_first_wins(
    written: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = written()
    store = Store.open(made.path)
    values = np.zeros((2, 3), np.float32)
    store.put_array("class_text/abc", values)
    answers = iter([False, True])  # the other job's array appears after this one looked
    monkeypatch.setattr(Store, "has", lambda self, name: next(answers))
    store.put_array("class_text/abc", values + 1)
    np.testing.assert_array_equal(store.read("class_text/abc"), values)
    assert sorted(p.name for p in made.path.parent.iterdir()) == ["cache"]


def test_what_is_no_cache_is_said_in_one_line(tmp_path: Path, written: Make) -> None:
    with pytest.raises(CacheError, match=r"nowhere: no such cache; python -m featcache.extract"):
        Store.open(tmp_path / "nowhere")
    with pytest.raises(CacheError, match=r"not a feature cache \(no zarr.json in it\)"):
        Store.open(tmp_path)
    zarr.create_group(tmp_path / "plain", attributes={"a": 1})
    with pytest.raises(CacheError, match="plain: a Zarr store, but not a feature cache"):
        Store.open(tmp_path / "plain")
    # `--restart` deletes damaged caches, so somebody else's store must not look like one.
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/zarr.json").write_text('{"zarr_format": 3, "node_type": "group"}')
    with pytest.raises(CacheError, match="bare: a Zarr store, but not a feature cache"):
        Store.open(tmp_path / "bare")
    zarr.create_group(tmp_path / "old", zarr_format=2)
    with pytest.raises(CacheError, match="a Zarr v2 store"):
        Store.open(tmp_path / "old")
    made = written()
    with pytest.raises(CacheError, match="image: expected an array, found a group"):
        Store.open(made.path).files("image")
    change_root(made.path, format=0)
    with pytest.raises(CacheError, match="cache format 0, this version reads 1"):
        Store.open(made.path)


def test_changed_metadata_are_found(written: Make) -> None:
    made = written()
    other = made.plan.identity.record()
    other["precision"] = "bf16"
    change_root(made.path, identity=other)
    with pytest.raises(CacheCorruptError, match=r"zarr.json: changed since it was written"):
        Store.open(made.path)
    change_root(made.path, reseal=True, identity=other)  # even by somebody who can seal
    with pytest.raises(CacheCorruptError, match=r"does not belong to the identity"):
        Store.open(made.path)
    change_root(
        made.path,
        reseal=True,
        identity=other,
        fingerprint=Identity.model_validate(other).fingerprint(),
    )
    assert Store.open(made.path).identity.precision == "bf16"
    del other["precision"]
    change_root(made.path, reseal=True, identity=other)
    with pytest.raises(CacheError, match=r"precision of the identity .* \(0\.\d+\.\d+\)"):
        Store.open(made.path)
    (made.path / "zarr.json").write_text("{")
    with pytest.raises(CacheCorruptError, match="not the JSON of a Zarr v3 group"):
        Store.open(made.path)


def test_the_plan_says_what_it_will_take(planned: Make) -> None:
    made = planned(num_rows=10, chunk_rows=4, shard_rows=4, dim=6)
    array = made.plan.arrays[0]
    assert array.num_bytes == 3 * (4 * 6 * 2 + 4)
    text = made.plan.describe()
    assert text.splitlines()[0] == "10 rows, 3 classes, 3 shards"
    assert "image/projected  10 x 6 float16, 156 B" in text
    store = create(made.path, made.plan)
    for shard in store.pending():
        made.write(store, shard)
    size = sum(
        f.stat().st_size for f in (made.path / "image/projected/c").rglob("*") if f.is_file()
    )
    assert size == array.num_bytes
