"""Joined caches: rows meet by id, whatever their order; what does not fit is named in one line."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from featcache.errors import CacheError, CacheMismatchError, ConfigError
from featcache.identity import BackboneIdentity
from featcache.join import JoinConfig, open_joined, open_one_or_joined, run
from featcache.joined_cache import JoinedCache
from featcache.manifest import Manifest
from featcache.reader import Cache, open_cache
from featcache.store import ArrayPlan, CachePlan, Shard, create

from ..conftest import sample_identity

Labels = dict[str, list[int]]

SPLITS = {f"r{i}": "train" if i < 8 else "test" for i in range(12)}
LABELS = {f"r{i}": [i % 3] for i in range(12)}
CLASSES = ["oak", "elm", "yew"]


def make(
    path: Path,
    ids: list[str],
    dim: int,
    *,
    labels: Labels = LABELS,
    splits: dict[str, str] = SPLITS,
    classes: list[str] = CLASSES,
    task: Any = "single_label",
    array: str = "image/projected",
    views: int = 1,
    view_seed: int = 0,
    invalid: tuple[str, ...] = (),
) -> dict[str, np.ndarray]:
    """Writes a cache; returns its features by id, as stored."""
    manifest = Manifest.build(
        kind="table",
        root="/images",
        ids=ids,
        paths=[f"{name}.jpg" for name in ids],
        splits=[splits[name] for name in ids],
        labels=[labels[name] for name in ids],
        classes=pd.DataFrame({"name": classes}),
        task=task,
        captions=[[f"{name} one", f"{name} two"][: int(name[1:]) % 3] for name in ids],
    )
    identity = sample_identity(
        manifest.identity,
        BackboneIdentity(kind="toy", name=path.name, weights=path.name, architecture="a"),
        num_views=views,
        view_seed=view_seed,
        view_scale=0.5 if views > 1 else 1.0,
    )
    count = len(ids)
    shape = (count, dim) if views == 1 else (count, views, dim)
    plan = CachePlan(
        identity=identity,
        manifest=manifest,
        arrays=(ArrayPlan(array, shape, "float16", count),),
        shards=(Shard("image", 0, 0, count),),
        attributes={"backbone": {"kind": "toy"}, "logit_scale": 100.0},
    )
    store = create(path, plan)
    features = np.random.default_rng(dim).normal(size=shape).astype(np.float16) * 5
    valid = np.asarray([name not in invalid for name in manifest.ids])
    stored = features.copy()
    stored[~valid] = np.nan
    store.write_chunks(array, 0, stored)
    store.write_chunks("rows/valid", 0, valid)
    content = [int(name[1:]) + 100 * (dim == 9) for name in manifest.ids]
    store.write_chunks("rows/content", 0, np.asarray(content, np.uint64))
    if store.has("rows/stamp"):
        store.write_chunks("rows/stamp", 0, np.zeros(count, np.uint64))
    store.mark_done(Shard("image", 0, 0, count), {})
    store.finish({})
    return dict(zip(manifest.ids, stored, strict=True))


ALL = [f"r{i}" for i in range(12)]
SHUFFLED = ["r11", "r3", "r0", "r9", "r7", "r5", "r1", "r10", "r2"]


def unit(vector: np.ndarray) -> np.ndarray:
    vector = vector.astype(np.float64)
    return vector / np.linalg.norm(vector)


def test_rows_meet_by_id(tmp_path: Path) -> None:
    one = make(tmp_path / "a", ALL, 4, invalid=("r3",))
    two = make(tmp_path / "b", SHUFFLED, 6, invalid=("r10",))
    three = make(tmp_path / "c", ALL[::-1], 9)
    joined = open_joined([tmp_path / "a", tmp_path / "b", tmp_path / "c"])
    expected = [name for name in ALL if name in SHUFFLED]
    assert joined.ids == expected
    assert joined.paths == [f"{name}.jpg" for name in expected]
    assert joined.splits == [SPLITS[name] for name in expected]
    assert joined.left_out == {"a": 3, "b": 0, "c": 3}
    assert joined.num_rows == 9
    features = joined.array("image/projected").read()
    assert features.dtype == np.float32
    assert features.shape == (9, 19)
    for row, name in enumerate(expected):
        parts = [unit(one[name]), unit(two[name]), unit(three[name])]
        np.testing.assert_allclose(features[row], np.concatenate(parts), atol=1e-6)
    assert [expected[row] for row in joined.rows("train")] == ["r0", "r1", "r2", "r5", "r7"]
    assert [expected[row] for row in joined.rows("test")] == ["r9", "r11"]
    rows = joined.rows("test")
    assert joined.labels(rows).tolist() == [0, 2]
    assert joined.multi_hot(rows).tolist() == [[1, 0, 0], [0, 0, 1]]
    offsets, texts = joined.captions
    for row, name in enumerate(expected):
        own = [f"{name} one", f"{name} two"][: int(name[1:]) % 3]
        assert texts[offsets[row] : offsets[row + 1]] == own


def test_members_can_be_read_alone_and_in_batches(tmp_path: Path) -> None:
    one = make(tmp_path / "a", ALL, 4)
    make(tmp_path / "b", SHUFFLED, 6)
    joined = open_joined([tmp_path / "a", tmp_path / "b"])
    assert joined.feature_names() == ["image/projected", "a:image/projected", "b:image/projected"]
    alone = joined.array("a:image/projected")
    assert alone.dtype == np.float16
    np.testing.assert_array_equal(alone.read(), [one[name] for name in joined.ids])
    array = joined.array("image/projected")
    rows = np.asarray([5, 0, 5, 8])
    np.testing.assert_array_equal(array.take(rows), array.read()[rows])
    np.testing.assert_array_equal(array.read(slice(2, 5)), array.read()[2:5])
    np.testing.assert_array_equal(array.read(slice(None, None, 2)), array.read()[::2])
    with pytest.raises(IndexError):
        array.take(np.asarray([9]))
    seen = {}
    for rows, features in joined.batches("image/projected", "train", 2, shuffle=True, seed=3):
        seen |= dict(zip(rows.tolist(), features, strict=True))
    assert sorted(seen) == joined.rows("train").tolist()
    for row, vector in seen.items():
        np.testing.assert_array_equal(vector, array.read()[row])


def test_large_reads_go_block_by_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "a", ALL, 4)
    make(tmp_path / "b", SHUFFLED, 6)
    whole = open_joined([tmp_path / "a", tmp_path / "b"]).array("image/projected").read()
    monkeypatch.setattr("featcache.joined_cache._BLOCK_BYTES", 100)
    found = open_joined([tmp_path / "a", tmp_path / "b"]).array("image/projected").read()
    np.testing.assert_array_equal(found, whole)


@pytest.mark.parametrize("same", [True, False])
def test_views_are_joined_only_where_they_show_the_same(tmp_path: Path, same: bool) -> None:
    one = make(tmp_path / "a", ALL, 4, views=3)
    two = make(tmp_path / "b", SHUFFLED, 6, views=3, view_seed=0 if same else 1)
    joined = open_joined([tmp_path / "a", tmp_path / "b"])
    array = joined.array("image/projected")
    assert array.shape == ((9, 3, 10) if same else (9, 10))
    name = joined.ids[4]
    for view in range(3 if same else 1):
        expected = np.concatenate([unit(one[name][view]), unit(two[name][view])])
        found = array.read(view=view)[4]
        np.testing.assert_allclose(found, expected, atol=1e-6)
        if same:
            np.testing.assert_allclose(array.read()[4, view], expected, atol=1e-6)
    np.testing.assert_array_equal(joined.array("b:image/projected").read()[4], two[name])


def test_the_fingerprint_is_that_of_the_members_in_order(tmp_path: Path) -> None:
    make(tmp_path / "a", ALL, 4)
    make(tmp_path / "b", ALL, 6)
    one = open_joined([tmp_path / "a", tmp_path / "b"]).fingerprint
    assert open_joined({"x": tmp_path / "a", "y": tmp_path / "b"}).fingerprint == one
    assert open_joined([tmp_path / "b", tmp_path / "a"]).fingerprint != one
    assert one != open_cache(tmp_path / "a").fingerprint


def test_folders_of_one_name_get_numbers(tmp_path: Path) -> None:
    for place in ("x", "y"):
        make(tmp_path / place / "birds", ALL, 4)
    joined = open_joined([tmp_path / "x" / "birds", tmp_path / "y" / "birds"])
    assert list(joined.members) == ["birds", "birds-2"]
    assert isinstance(open_one_or_joined(tmp_path / "x/birds", [tmp_path / "y/birds"]), JoinedCache)
    assert type(open_one_or_joined(tmp_path / "x/birds", [])) is Cache


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"classes": ["oak", "fir", "yew"]},
            CacheMismatchError,
            "classes differ: class 1 is 'elm' in a, 'fir' in b",
        ),
        ({"classes": [*CLASSES, "fir"]}, CacheMismatchError, "classes differ: 3 in a, 4 in b"),
        ({"task": "multi_label"}, CacheMismatchError, "task differs: single_label in a, multi_l"),
        (
            {"labels": {**LABELS, "r9": [1], "r11": []}},
            CacheMismatchError,
            "labels differ in 2 of 9 common rows: 'r9' is oak in a, elm in b; run the extraction",
        ),
        (
            {"labels": {**LABELS, "r11": []}},
            CacheMismatchError,
            "labels differ in 1 of 9 common rows: 'r11' is yew in a, no label in b",
        ),
        (
            {"splits": {**SPLITS, "r9": "train"}},
            CacheMismatchError,
            "splits differ in 1 of 9 common rows: 'r9' is test in a, train in b",
        ),
    ],
)
def test_what_does_not_fit_is_named(
    tmp_path: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    make(tmp_path / "a", ALL, 4)
    make(tmp_path / "b", SHUFFLED, 6, **options)
    with pytest.raises(error) as raised:
        open_joined([tmp_path / "a", tmp_path / "b"])
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)


def test_the_order_of_a_rows_labels_does_not_matter(tmp_path: Path) -> None:
    make(tmp_path / "a", ALL, 4, task="multi_label", labels={name: [0, 2] for name in ALL})
    make(tmp_path / "b", ALL, 6, task="multi_label", labels={name: [2, 0] for name in ALL})
    assert open_joined([tmp_path / "a", tmp_path / "b"]).num_rows == 12


def test_strangers_single_caches_and_missing_arrays(tmp_path: Path) -> None:
    make(tmp_path / "a", ALL[:6], 4)
    make(tmp_path / "b", ALL[6:], 6)
    make(tmp_path / "c", ALL, 5, array="image/pooled")
    with pytest.raises(CacheError, match=r"a \+ b: no id is in all of them \(the first is 'r0'"):
        open_joined([tmp_path / "a", tmp_path / "b"])
    with pytest.raises(ConfigError, match="two caches or more, found 1"):
        open_joined([tmp_path / "a"])
    joined = open_joined([tmp_path / "a", tmp_path / "c"])
    assert not joined.has("image/projected")
    with pytest.raises(CacheError, match="no array 'image/projected' in the join; it holds a:ima"):
        joined.array("image/projected")
    for use in (
        lambda: joined.dataset("x", "train"),
        lambda: joined.dask("x"),
        lambda: joined.to_numpy(tmp_path),
        lambda: joined.to_parquet(tmp_path),
    ):
        with pytest.raises(ConfigError, match=r"a \+ c: joined caches have no"):
            use()


def test_the_same_cache_twice_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "a", ALL, 4)
    (tmp_path / "alias").symlink_to(tmp_path / "a")
    for other in (tmp_path / "a", f"{tmp_path}/x/../a", tmp_path / "alias"):
        with pytest.raises(ConfigError, match=r"(a|alias): given twice; a join needs different"):
            open_joined([tmp_path / "a", other])
    url = "s3://bucket/a"
    with pytest.raises(ConfigError, match=r"^s3://bucket/a/: given twice"):
        open_joined({"one": url, "two": f"{url}/"})


def test_a_split_without_common_rows_is_gone(tmp_path: Path) -> None:
    make(tmp_path / "a", ALL, 4)
    make(tmp_path / "b", ALL[:5], 6)
    joined = open_joined([tmp_path / "a", tmp_path / "b"])
    assert joined.split_names == ["train"]
    assert joined.attributes["splits"] == {"train": [0, 5]}


def test_the_job_says_what_is_joined(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "a", ALL, 4, invalid=("r3",))
    make(tmp_path / "b", SHUFFLED, 9)
    run(JoinConfig(caches=[tmp_path / "a", tmp_path / "b"]))
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        "joined by id: a + b, 9 common rows; left out, not in all of them: 3 of a",
        "train 6 rows, 5 valid in all",
        "test 3 rows, 3 valid in all",
        "image/projected 9 x 13 float32",
        "a:image/projected 9 x 4 float16",
        "b:image/projected 9 x 9 float16",
        "8 rows were extracted from files with different bytes",
    ]
    with pytest.raises(ValueError, match="at least 2 items"):
        JoinConfig(caches=[tmp_path / "a"])
