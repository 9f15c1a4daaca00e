"""Shots, limits and the validation rows carved out of multi-label sets."""

from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from pydantic import ValidationError

from featcache.datasets.base import DatasetConfig, few_shot
from featcache.datasets.folder import FolderConfig
from featcache.datasets.shots import few_shot_rows
from featcache.datasets.splitting import carve
from featcache.errors import DatasetError
from featcache.manifest import Manifest

Lists = list[list[int]]


def flat(rows: Lists) -> tuple[np.ndarray, np.ndarray]:
    offsets = np.cumsum([0, *map(len, rows)]).astype(np.int64)
    return offsets, np.asarray([label for row in rows for label in row], np.int32)


def names(count: int) -> list[str]:
    return [f"img/{number}.jpg" for number in range(count)]


def long_tailed(num_rows: int, num_classes: int, seed: int) -> Lists:
    """Rows with 0 to 4 labels; class c is about 1/(c+1) as frequent as class 0."""
    random = np.random.default_rng(seed)
    weights = 1 / np.arange(1, num_classes + 1)
    return [
        random.choice(num_classes, random.integers(0, 5), False, weights / weights.sum()).tolist()
        for _ in range(num_rows)
    ]


def multi_label(rows: Lists, splits: list[str]) -> Manifest:
    return Manifest.build(
        kind="table",
        root="/x",
        ids=names(len(rows)),
        paths=names(len(rows)),
        splits=splits,
        labels=rows,
        classes=pd.DataFrame(
            {"name": [f"c{i}" for i in range(1 + max(map(max, filter(len, rows))))]}
        ),
        task="multi_label",
    )


@pytest.mark.parametrize("shots", [1, 2, 4, 8, 16])
def test_one_label_a_row_gives_exactly_so_many_shots(shots: int) -> None:
    rows = [[number % 5] for number in range(60)] + [[5]] * 3 + [[]] * 4
    offsets, values = flat(rows)
    drawn = few_shot_rows(names(len(rows)), offsets, values, shots, seed=1)
    assert drawn.tolist() == sorted(set(drawn.tolist()))
    counts = Counter(rows[row][0] for row in drawn)
    assert counts == {c: min(shots, 12 if c < 5 else 3) for c in range(6)}
    more = few_shot_rows(names(len(rows)), offsets, values, shots + 1, seed=1)
    assert set(drawn.tolist()) <= set(more.tolist())
    if shots < 12:
        other = few_shot_rows(names(len(rows)), offsets, values, shots, seed=2)
        assert other.tolist() != drawn.tolist()


@pytest.mark.parametrize("shots", [1, 4, 16])
def test_several_labels_a_row_show_every_class_often_enough_and_no_row_is_needless(
    shots: int,
) -> None:
    rows = long_tailed(400, 12, seed=3)
    offsets, values = flat(rows)
    drawn = few_shot_rows(names(400), offsets, values, shots, seed=0).tolist()
    total = np.bincount(values, minlength=12)
    have = np.bincount([label for row in drawn for label in rows[row]], minlength=12)
    assert (have >= np.minimum(shots, total)).all()
    for row in drawn:
        assert any(have[label] <= min(shots, total[label]) for label in rows[row]), "needless row"
    assert len(drawn) < 12 * shots


@pytest.mark.parametrize("rows", [long_tailed(200, 8, 1), [[n % 7] for n in range(200)]])
def test_the_draw_does_not_depend_on_row_order(rows: Lists) -> None:
    order = np.random.default_rng(0).permutation(len(rows)).tolist()
    ids = names(len(rows))
    one = few_shot_rows(ids, *flat(rows), 4, seed=5)
    shuffled = [ids[row] for row in order]
    two = few_shot_rows(shuffled, *flat([rows[row] for row in order]), 4, seed=5)
    assert {ids[row] for row in one} == {shuffled[row] for row in two}
    held = carve(ids, *flat(rows), 0.2, seed=5)
    again = carve(shuffled, *flat([rows[row] for row in order]), 0.2, seed=5)
    assert held[order].tolist() == again.tolist()


def test_shots_cut_train_only_and_change_the_identity(tmp_path: Path) -> None:
    for split, count in (("train", 9), ("val", 4), ("test", 5)):
        for name in ("oak", "elm"):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(count):
                (tmp_path / split / name / f"{number}.jpg").write_bytes(b"")
    whole = FolderConfig(root=tmp_path).open()
    few = FolderConfig(root=tmp_path, shots=2).open()
    assert Counter(few.splits) == {"train": 4, "val": 8, "test": 10}
    assert few.classes["count"].tolist() == [2, 2]
    assert set(few.ids) < set(whole.ids)
    assert few.splits == [s for s in few.splits if s == "train"] + ["val"] * 8 + ["test"] * 10
    both = FolderConfig(root=tmp_path, shots=2, limit=3).open()
    assert Counter(both.splits) == {"train": 3, "val": 3, "test": 3}
    steps = [0, 1, 2, 4, 4 + 2, 4 + 5, 12, 12 + 3, 12 + 6]
    assert both.ids == [few.ids[row] for row in steps], "shots first, then even steps"
    seeds = [FolderConfig(root=tmp_path, shots=2, shots_seed=seed).open() for seed in range(4)]
    hashes = [m.identity.rows for m in (whole, few, both, *seeds[1:])]
    assert len(set(hashes)) == len(hashes)
    assert seeds[0].identity == few.identity


def test_shots_of_a_multi_label_manifest_keep_other_splits_whole() -> None:
    rows = long_tailed(120, 6, seed=2)
    splits = (["val"] * 2 + ["train"] * 3 + ["extra"]) * 20
    manifest = multi_label(rows, splits)
    few = few_shot(manifest, 3, seed=0)
    counts = Counter(few.splits)
    assert (counts["val"], counts["extra"]) == (40, 20)
    assert (few.classes["count"] >= np.minimum(3, manifest.classes["count"])).all()
    assert few.classes["count"].sum() < manifest.classes["count"].sum()
    labels = dict(zip(manifest.ids, manifest.rows.column("labels").to_pylist(), strict=True))
    for name, found in zip(few.ids, few.rows.column("labels").to_pylist(), strict=True):
        assert found == labels[name]


def test_shots_need_labelled_training_rows() -> None:
    for rows, splits in (([[0], [0]], ["test", "val"]), ([[], [0]], ["train", "val"])):
        with pytest.raises(DatasetError, match="shots 4 needs labelled training images") as error:
            few_shot(multi_label(rows, splits), 4, 0)
        assert "\n" not in str(error.value)
    with pytest.raises(ValidationError, match="shots"):
        FolderConfig(root=Path("x"), shots=0)
    assert {"limit", "shots", "shots_seed"} <= set(DatasetConfig.model_fields)


# --- carving -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("fraction", [0.02, 0.1, 0.3])
def test_carving_leaves_and_takes_every_class(fraction: float, seed: int) -> None:
    rows = long_tailed(500, 15, seed)
    offsets, values = flat(rows)
    held = carve(names(500), offsets, values, fraction, seed)
    total = np.bincount(values, minlength=15)
    taken = np.bincount(
        [c for row, one in zip(rows, held, strict=True) if one for c in row], minlength=15
    )
    assert (total >= 2).all()
    assert (taken >= 1).all()
    assert (taken < total).all()
    np.testing.assert_allclose(taken, np.maximum(1, fraction * total), atol=0.02 * total.max() + 1)
    empty = [not row for row in rows]
    assert sum(held[empty]) == round(fraction * sum(empty))


def test_carving_keeps_single_rows_in_train() -> None:
    rows = [[0], [1, 2], [1], [2], [3, 0], [3]]
    for seed in range(20):
        held = carve(names(6), *flat(rows), 0.2, seed)
        for name in range(4):
            members = [one for row, one in zip(rows, held, strict=True) if name in row]
            assert not all(members)
            assert any(members)
    # The only rows of 1 and of 2 hold 0 too: one of them must stay, so that each is trained on.
    assert not carve(names(2), *flat([[0, 1], [0, 2]]), 0.5, 0).any()
    assert not carve(names(2), *flat([[0], [0]]), 0.0, 0).any()
