"""The reader: what zarr would answer, without copies, without leaks, and every row exactly once."""

import ctypes
import errno
import gc
import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import zarr
from torch.utils.data import DataLoader

from featcache.batches import plan_batches
from featcache.errors import CacheError, CacheMismatchError, ConfigError, MappingError
from featcache.identity import Identity
from featcache.layout import feature_array, mapping
from featcache.layout.chunks import sealed
from featcache.layout.mapping import map_chunks
from featcache.reader import Cache, open_cache
from featcache.store import create

Make = Callable[..., Any]

NOT_PAGES = (20, 6, 4, 8, 1)
PAGES = (37, 512, 8, 16, 1)
# rows, width, chunk rows, shard rows, views: odd tails, one row, whole pages and not, a view axis.
SHAPES = [
    pytest.param(NOT_PAGES, id="chunks-not-pages"),
    pytest.param((23, 6, 5, 10, 1), id="chunks-of-five"),
    pytest.param((1, 6, 4, 8, 1), id="one-row"),
    pytest.param((3, 512, 4, 4, 1), id="one-chunk-of-a-page"),
    pytest.param(PAGES, id="pages-odd-tail"),
    pytest.param((40, 512, 8, 16, 1), id="pages-even"),
    pytest.param((37, 512, 4, 16, 3), id="pages-views"),
    pytest.param((13, 5, 4, 8, 2), id="not-pages-views"),
    pytest.param((2049, 2, 1024, 1024, 1), id="tail-of-one"),
]


def make(written: Make, shape: tuple[int, ...]) -> tuple[Any, Cache]:
    rows, dim, chunk_rows, shard_rows, views = shape
    made = written(
        num_rows=rows, dim=dim, chunk_rows=chunk_rows, shard_rows=shard_rows, views=views
    )
    return made, open_cache(made.path)


def mappings(path: Path) -> int:
    """Mappings of the store's files in this process."""
    with Path("/proc/self/maps").open(encoding="utf-8") as lines:
        return sum(str(path) in line for line in lines)


@pytest.mark.parametrize("shape", SHAPES)
def test_reads_equal_zarrs_answers(written: Make, shape: tuple[int, ...]) -> None:
    made, cache = make(written, shape)
    theirs = zarr.open_group(made.path, mode="r")["image/projected"]
    array = cache.array("image/projected")
    whole = theirs[...]
    random = np.random.default_rng(0)
    np.testing.assert_array_equal(array.read(), whole)
    np.testing.assert_array_equal(array.read(slice(1, -1)), whole[1:-1])
    np.testing.assert_array_equal(array.read(slice(None, None, -3)), whole[::-3])
    np.testing.assert_array_equal(array.read(slice(5, 2)), whole[5:2])
    rows = random.integers(0, len(whole), 50)
    np.testing.assert_array_equal(array.take(rows), theirs.oindex[rows])
    np.testing.assert_array_equal(array.read(np.sort(rows)), whole[np.sort(rows)])
    np.testing.assert_array_equal(array.take(rows[:0]), whole[rows[:0]])
    for view in range(array.num_views):
        plain = whole if array.num_views == 1 else whole[:, view]
        np.testing.assert_array_equal(array.read(view=view), plain)
        np.testing.assert_array_equal(array.take(rows, view=view), plain[rows])
    out = np.empty_like(whole)
    assert array.read(out=out) is out
    np.testing.assert_array_equal(out, whole)
    if array.view is not None:
        np.testing.assert_array_equal(array.view, whole)
    assert (array.shape, array.dtype, len(array)) == (whole.shape, whole.dtype, len(whole))


@pytest.mark.parametrize(("shape", "mapped"), [(NOT_PAGES, False), (PAGES, True)])
def test_whole_pages_are_one_mapping_without_a_copy(
    written: Make, shape: tuple[int, ...], mapped: bool
) -> None:
    made, cache = make(written, shape)
    array = cache.array("image/projected")
    assert (array.view is not None) == mapped
    if array.view is None:
        return
    assert array.view.flags.c_contiguous
    before = array.view[9, 0].copy()
    chunk = made.path / "image/projected/c/1/0"
    with chunk.open("r+b") as stream:  # row 9 is the second of chunk 1
        stream.seek(512 * 2)
        stream.write(np.float16(before + 1).tobytes())
    assert array.view[9, 0] == before + 1


@pytest.mark.parametrize("shape", [NOT_PAGES, PAGES])
def test_nothing_can_be_written_through_a_view(written: Make, shape: tuple[int, ...]) -> None:
    _, cache = make(written, shape)
    array = cache.array("image/projected")
    views = [array.view] if array.view is not None else array.blocks
    for view in views:
        with pytest.raises(ValueError, match="read-only"):
            view[0, 0] = 1
        with pytest.raises(ValueError, match="WRITEABLE"):
            view.flags.writeable = True
    copy = array.read()
    copy[0, 0] = 1  # a read is the caller's own


@pytest.mark.parametrize("shape", [NOT_PAGES, PAGES])
def test_opening_and_closing_leaks_nothing(written: Make, shape: tuple[int, ...]) -> None:
    made, cache = make(written, shape)
    del cache
    gc.collect()
    assert mappings(made.path) == 0
    files = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        cache = open_cache(made.path)
        view = cache.array("image/projected").view
        cache.rows("train")
    assert mappings(made.path) > 0
    assert len(os.listdir("/proc/self/fd")) == files  # nor are files held open meanwhile
    del cache
    gc.collect()
    if view is not None:  # the last view keeps the mapping alive
        assert mappings(made.path) > 0
        assert np.isfinite(view[0]).all()
    del view
    gc.collect()
    assert mappings(made.path) == 0
    assert len(os.listdir("/proc/self/fd")) == files


def test_layouts_of_other_writers_are_read_through_zarr(written: Make) -> None:
    made = written()
    group = zarr.open_group(made.path, mode="r+")
    compressed = group.create_array("image/other", shape=(20, 6), chunks=(7, 3), dtype="float32")
    compressed[...] = np.random.default_rng(0).standard_normal((20, 6))
    file = made.path / "image/other/zarr.json"
    file.write_bytes(sealed("image/other", json.loads(file.read_bytes())))
    array = open_cache(made.path, verify=False).array("image/other")
    assert array.view is None
    rows = np.array([7, 0, 19, 7])
    np.testing.assert_array_equal(array.read(), compressed[...])
    np.testing.assert_array_equal(array.read(slice(2, 9)), compressed[2:9])
    np.testing.assert_array_equal(array.take(rows), compressed[...][rows])


def test_rows_outside_the_array_are_refused(written: Make) -> None:
    array = open_cache(written(views=2).path).array("image/projected")
    for rows in ([-1], [20], [0, 99]):
        with pytest.raises(IndexError, match=r"rows lie outside 0\.\.19"):
            array.take(np.array(rows))
    with pytest.raises(IndexError, match="view 2 of 2"):
        array.read(view=2)
    with pytest.raises(ValueError, match="expected contiguous float16"):
        array.read(out=np.empty((20, 2, 6), np.float32))


def test_tables_are_those_of_the_manifest(written: Make) -> None:
    made = written(captions=2)
    cache, manifest = open_cache(made.path), made.plan.manifest
    assert cache.ids == manifest.ids
    assert cache.paths == manifest.paths
    assert cache.splits == manifest.splits
    assert cache.split_names == ["train", "val"]
    assert cache.classes["name"].tolist() == ["oak", "elm", "日本"]
    assert cache.classes["genus"].tolist() == ["Quercus", "", "x"]
    assert cache.classes["count"].tolist() == manifest.classes["count"].tolist()
    assert list(cache.classes.columns) == ["name", "count", "genus"]
    assert cache.num_classes == 3
    offsets, captions = cache.captions
    assert captions == manifest.caption_values
    assert captions[offsets[3] : offsets[4]] == ["caption 3-0", "caption 3-1"]
    np.testing.assert_array_equal(
        cache.array("text/projected").read(), made.arrays["text/projected"]
    )
    assert cache.identity == made.plan.identity
    assert cache.fingerprint == made.plan.identity.fingerprint()
    assert cache.attributes["logit_scale"] == 100.0
    assert cache.has("image/projected")
    assert not cache.has("image/pooled")


def test_only_valid_rows_are_given(written: Make) -> None:
    made = written(num_rows=20)
    cache = open_cache(made.path)
    train = [row for row in range(15) if row % 7 != 5]
    assert cache.rows("train").tolist() == train
    assert cache.rows("train").dtype == np.int64
    assert cache.rows("val").tolist() == [15, 16, 17, 18]
    assert np.isfinite(cache.array("image/projected").take(cache.rows("val"))).all()
    with pytest.raises(ConfigError, match="no split 'test'; it has train, val"):
        cache.rows("test")
    with pytest.raises(CacheError, match="no array 'image/pooled'; it holds image/projected"):
        cache.array("image/pooled")


def test_single_labels(written: Make) -> None:
    cache = open_cache(written().path)
    rows = np.array([0, 1, 2, 4, 19])
    assert cache.labels(rows).tolist() == [0, -1, 2, 1, 1]
    np.testing.assert_array_equal(
        cache.multi_hot(rows), [[1, 0, 0], [0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 0]]
    )
    assert cache.labels(rows[:0]).shape == (0,)


def test_multi_labels(written: Make) -> None:
    cache = open_cache(written(task="multi_label").path)
    rows = np.array([7, 0, 2, 19, 7])
    expected = [[(row >> c) & 1 for c in range(3)] for row in rows]
    np.testing.assert_array_equal(cache.multi_hot(rows), expected)
    assert cache.multi_hot(rows[:0]).shape == (0, 3)
    with pytest.raises(ConfigError, match="multi-label cache has no single label"):
        cache.labels(rows)


def test_another_identity_is_refused_by_its_first_difference(written: Make) -> None:
    made = written()
    assert open_cache(made.path, expect=made.plan.identity).num_rows == 20
    other = Identity.model_validate({**made.plan.identity.record(), "precision": "bf16"})
    with pytest.raises(CacheMismatchError, match="precision differs: the cache holds 'fp32'"):
        open_cache(made.path, expect=other)


@pytest.mark.parametrize("dim", [6, 512])
def test_an_unfinished_cache_gives_only_rows_of_done_shards(planned: Make, dim: int) -> None:
    made = planned(num_rows=20, dim=dim, chunk_rows=8, shard_rows=8)
    store = create(made.path, made.plan)
    first, second, _ = store.pending()
    made.write(store, second)
    store.mark_done(second, {})
    made.write(store, first)  # on disk, not marked: killed in between
    (made.path / "image/projected/c/0/0").write_bytes(b"half")
    with pytest.raises(CacheError, match=r"2 of 3 shards are missing; .*resumes"):
        open_cache(made.path)
    cache = open_cache(made.path, allow_incomplete=True)
    assert cache.rows("train").tolist() == [8, 9, 10, 11, 13, 14]
    assert cache.rows("val").tolist() == [15]
    values = cache.array("image/projected").read()
    np.testing.assert_array_equal(values[8:16], made.arrays["image/projected"][8:16])
    assert np.isnan(values[:8]).all()
    assert np.isnan(values[16:]).all()
    rows = np.array([17, 9, 3, 10])
    np.testing.assert_array_equal(cache.array("image/projected").take(rows), values[rows])


@pytest.mark.parametrize("budget", [1, 8 * 12, 16 * 12, 2**40])
@pytest.mark.parametrize("shuffle", [False, True])
def test_batches_give_every_row_once(written: Make, shuffle: bool, budget: int) -> None:
    made = written(num_rows=50)
    cache = open_cache(made.path)
    options: dict[str, Any] = {"shuffle": shuffle, "seed": 3, "ram_budget_bytes": budget}
    found = list(cache.batches("image/projected", "train", 8, epoch=1, **options))
    rows = np.concatenate([rows for rows, _ in found])
    assert sorted(rows.tolist()) == cache.rows("train").tolist()
    assert [len(rows) for rows, _ in found[:-1]] == [8] * (len(found) - 1)
    for batch, features in found:
        np.testing.assert_array_equal(features, made.arrays["image/projected"][batch])
    again = cache.batches("image/projected", "train", 8, epoch=1, **options)
    np.testing.assert_array_equal(np.concatenate([rows for rows, _ in again]), rows)
    other = cache.batches("image/projected", "train", 8, epoch=2, **options)
    assert np.array_equal(np.concatenate([rows for rows, _ in other]), rows) == (not shuffle)


def test_a_window_never_needs_more_rows_than_the_budget() -> None:
    rows = np.arange(0, 1000, 3)
    batches = list(plan_batches(rows, 10, shuffle=True, seed=1, chunk_rows=50, window_rows=100))
    order = np.concatenate(batches)
    chunks = order // 50
    span = [np.flatnonzero(chunks == chunk) for chunk in np.unique(chunks)]
    # A chunk is touched within its window only, plus the batch that straddles two windows.
    assert max(where[-1] - where[0] for where in span) <= 100 + 10
    assert not np.array_equal(order, np.sort(order))
    first = [next(iter(plan_batches(rows, 1, shuffle=True, seed=s)))[0] for s in range(300)]
    assert len(set(first)) > 150  # an exact shuffle starts anywhere


def test_text_arrays_have_no_image_rows(written: Make) -> None:
    cache = open_cache(written(captions=2).path)
    with pytest.raises(ConfigError, match="has 40 rows, not one for each of the 20 images"):
        next(cache.batches("text/projected", "train", 4))


@pytest.mark.parametrize("context", [None, "fork"])
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_the_torch_dataset_loads_in_workers(written: Make, context: str | None) -> None:
    made = written(dim=512)
    cache = open_cache(made.path)
    dataset = cache.dataset("image/projected", "train")
    loader = DataLoader(
        dataset,
        batch_size=4,
        num_workers=0 if context is None else 1,
        multiprocessing_context=context,
    )
    batches = list(loader)
    rows = torch.cat([batch["row"] for batch in batches]).numpy()
    np.testing.assert_array_equal(rows, cache.rows("train"))
    features = torch.cat([batch["features"] for batch in batches]).numpy()
    np.testing.assert_array_equal(features, made.arrays["image/projected"][rows])
    targets = torch.cat([batch["target"] for batch in batches]).numpy()
    np.testing.assert_array_equal(targets, cache.labels(rows))


@pytest.mark.parametrize("task", ["multi_label", "unlabelled"])
def test_items_have_the_tasks_targets(written: Make, task: str) -> None:
    dataset = open_cache(written(task=task).path).dataset("image/projected", "val")
    item = pickle.loads(pickle.dumps(dataset))[0]
    assert item["row"] == 15
    assert ("target" in item) == (task == "multi_label")
    if task == "multi_label":
        assert item["target"].tolist() == [1.0, 1.0, 1.0]
    assert len(dataset) == 4
    with pytest.raises(IndexError, match="item 4 of 4"):
        dataset[4]


@pytest.mark.parametrize("views", [1, 2])
def test_dask_blocks_are_shards(written: Make, views: int) -> None:
    made = written(views=views)
    lazy = open_cache(made.path).dask("image/projected")
    assert lazy.chunks[0] == (8, 8, 4)
    expected = made.arrays["image/projected"]
    again = pickle.loads(pickle.dumps(lazy))  # as a distributed worker receives it
    np.testing.assert_array_equal(again.compute(scheduler="threads"), expected)
    np.testing.assert_array_equal(lazy[3:17, ..., 1].compute(), expected[3:17, ..., 1])


def test_opening_needs_no_zarr(written: Make) -> None:
    made = written(dim=512)
    code = (
        "import sys\nfrom featcache.reader import open_cache\ncache = open_cache(sys.argv[1])\n"
        "cache.array('image/projected').read(cache.rows('train'))\n"
        "print([name for name in ('zarr', 'torch', 'prefect') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, made.path], capture_output=True, text=True, check=True
    )
    assert re.sub(r"\s", "", done.stdout) == "[]"


def test_a_big_copy_in_threads_equals_a_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_array, "_BYTES_PER_THREAD", 1 << 10)
    monkeypatch.setattr(feature_array, "_COPY_THREADS", 3)
    source = np.random.default_rng(0).standard_normal((1001, 7)).astype(np.float16)
    out = np.zeros_like(source)
    feature_array._copy(source, out)
    np.testing.assert_array_equal(out, source)


class FewMappings:
    """The C library of a process that may only map `left` more files."""

    def __init__(self, libc: Any, left: int) -> None:
        self.libc, self.left = libc, left
        self.given_back = 0

    def mmap(self, address: int | None, *args: int) -> int:
        self.left -= address is not None
        if self.left < 0:
            ctypes.set_errno(errno.ENOMEM)
            return cast(int, ctypes.c_void_p(-1).value)
        return cast(int, self.libc.mmap(address, *args))

    def munmap(self, *args: int) -> int:
        self.given_back += 1
        return cast(int, self.libc.munmap(*args))


@pytest.mark.parametrize("shape", [PAGES, NOT_PAGES, (13, 5, 4, 8, 2)])
def test_without_room_for_more_mappings_arrays_are_read_all_the_same(
    written: Make,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    shape: tuple[int, ...],
) -> None:
    made, cache = make(written, shape)
    few = FewMappings(mapping._libc(), 2)
    monkeypatch.setattr(mapping, "_libc", lambda: few)
    array = cache.array("image/projected")
    assert array.view is None
    assert array.blocks is None
    assert capsys.readouterr().err.endswith("; it is read through zarr, which is slower\n")
    values = made.arrays["image/projected"]
    np.testing.assert_array_equal(array.read(), values)
    np.testing.assert_array_equal(array.read(slice(2, 7)), values[2:7])
    rows = np.array([3, 0, 12, 3])
    np.testing.assert_array_equal(array.take(rows), values[rows])
    gc.collect()
    assert few.given_back
    with pytest.raises(MappingError, match=r"too many mapped files.*vm\.max_map_count"):
        map_chunks(cache.store.files("image/projected"), range(1))
