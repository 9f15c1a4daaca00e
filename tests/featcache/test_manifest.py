"""The manifest: split order, checks, and hashes that change with exactly what they cover."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from featcache.errors import DatasetError
from featcache.identity import differences
from featcache.manifest import ROW_SCHEMA, Manifest, class_hash


def build(**changes: Any) -> Manifest:
    values: dict[str, Any] = {
        "kind": "table",
        "root": Path("images"),
        "ids": ["e", "d", "c", "b", "a"],
        "paths": ["e.jpg", "d.jpg", "c.jpg", "b.jpg", "a.jpg"],
        "splits": ["test", "train", "zoo", "val", "train"],
        "labels": [[0], [1], [2], [], [1]],
        "classes": pd.DataFrame({"name": ["x", "y", "z"], "genus": ["g", None, "h"]}),
        "task": "single_label",
        "captions": [["one", "two"], [], ["three"], [], ["four"]],
    }
    return Manifest.build(**{**values, **changes})


def changed(**changes: Any) -> list[str]:
    """Names of the identity's fields that differ from the unchanged manifest's."""
    found, expected = build().identity, build(**changes).identity
    return [name for name, _, _ in differences(found.record(), expected.record())]


def test_rows_come_in_split_order_and_else_as_given() -> None:
    manifest = build()
    assert manifest.splits == ["train", "train", "val", "test", "zoo"]
    assert manifest.ids == ["d", "a", "b", "e", "c"]
    assert manifest.paths == ["d.jpg", "a.jpg", "b.jpg", "e.jpg", "c.jpg"]
    assert manifest.rows.schema == ROW_SCHEMA


def test_labels_and_captions_follow_their_rows() -> None:
    manifest = build()
    assert manifest.label_offsets.tolist() == [0, 1, 2, 2, 3, 4]
    assert manifest.label_values.tolist() == [1, 1, 0, 2]
    assert manifest.label_values.dtype == np.int32
    assert manifest.caption_offsets.tolist() == [0, 0, 1, 1, 3, 4]
    assert manifest.caption_values == ["four", "one", "two", "three"]


def test_counts_are_of_the_training_rows_and_metadata_is_text() -> None:
    classes = build().classes
    assert classes["count"].tolist() == [0, 2, 0]
    assert classes["genus"].tolist() == ["g", "", "h"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": ["e", "d", "c", "b", "d"]}, "id 'd' occurs 2 times"),
        ({"labels": [[0], [1], [3], [], [1]]}, r"label 3 lies outside 0\.\.2"),
        ({"labels": [[0], [1], [-1], [], [1]]}, r"label -1 lies outside 0\.\.2"),
        ({"labels": [[0], [1], [0, 1], [], [1]]}, "a row of a single-label set has 2 labels"),
        ({"classes": pd.DataFrame({"name": ["x", "y", "x"]})}, "class 'x' is listed twice"),
        (
            {"ids": [], "paths": [], "splits": [], "labels": [], "captions": None},
            "the table dataset has no rows",
        ),
    ],
)
def test_mistakes(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DatasetError, match=message) as error:
        build(**changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"paths": ["e.jpg", "d.jpg", "c.jpg", "b.jpg", "\udcff.jpg"]},  # a name that is not UTF-8
        {"captions": [["one"], [], ["half a pair \ud800"], [], []]},
    ],
)
def test_text_that_cannot_be_written_is_one_line(changes: dict[str, Any]) -> None:
    with pytest.raises(DatasetError, match=r"holds text that is not Unicode, '.*\?") as error:
        build(**changes)
    str(error.value).encode()


def test_several_labels_are_legal_in_a_multi_label_set() -> None:
    manifest = build(labels=[[0], [1], [0, 1], [], [1, 2]], task="multi_label")
    assert manifest.classes["count"].tolist() == [0, 2, 1]


@pytest.mark.parametrize(
    ("changes", "fields"),
    [
        ({}, []),
        ({"labels": [[0], [1], [2], [], [0]]}, ["labels"]),
        ({"labels": [[0], [1], [2], [1], [1]]}, ["labels"]),
        ({"captions": [["one", "two"], [], ["three"], [], ["five"]]}, ["captions"]),
        ({"captions": [["one"], ["two"], ["three"], [], ["four"]]}, ["captions"]),
        ({"captions": [["onetwo"], [], ["three"], [], ["four"]]}, ["captions"]),
        ({"ids": ["e", "d", "c", "b", "f"]}, ["rows"]),
        ({"paths": ["e.jpg", "d.jpg", "c.jpg", "b.jpg", "f.jpg"]}, ["rows"]),
        ({"splits": ["test", "train", "zap", "val", "train"]}, ["rows"]),
        ({"classes": pd.DataFrame({"name": ["x", "y", "w"]})}, ["classes"]),
        ({"classes": pd.DataFrame({"name": ["x", "y", "z"], "genus": "k"})}, []),
        ({"kind": "folder"}, ["kind"]),
        ({"task": "multi_label"}, ["task"]),
        ({"root": Path("elsewhere")}, []),
    ],
)
def test_identity_changes_in_the_hash_that_covers_the_change(
    changes: dict[str, Any], fields: list[str]
) -> None:
    assert changed(**changes) == fields


def test_arrow_and_python_input_give_the_same_identity() -> None:
    arrow = build(
        ids=pa.array(["e", "d", "c", "b", "a"]),
        labels=pa.array([[0], [1], [2], [], [1]], pa.list_(pa.int64())),
    )
    assert arrow.identity == build().identity


def test_no_captions_is_no_list_of_captions() -> None:
    manifest = build(captions=None)
    assert manifest.caption_values == []
    assert manifest.caption_offsets.tolist() == [0] * 6


def test_class_hash_sees_order_and_boundaries() -> None:
    hashes = {
        class_hash(names) for names in (["a", "b"], ["b", "a"], ["ab"], ["a", "b", ""], ["a", "B"])
    }
    assert len(hashes) == 5


def test_limited_keeps_rows_at_even_steps_of_each_split() -> None:
    def numbered(name: str, count: int) -> Manifest:
        return build(
            ids=[f"{name}{i:02}" for i in range(count)] + ["last"],
            paths=[f"{i}" for i in range(count + 1)],
            splits=[name] * count + ["zoo"],
            labels=[[i // 5] for i in range(count)] + [[0]],
            captions=None,
        )

    for count in (1, 7, 10, 15):
        for limit in (1, 3, 4, 7, 10, 14, 99):
            manifest = numbered("train", count).limited(limit)
            steps = [i * count // limit for i in range(limit)] if limit < count else range(count)
            assert manifest.ids == [f"train{i:02}" for i in steps] + ["last"]
    manifest = numbered("train", 15)  # sorted by class, as folders are
    assert manifest.limited(3).classes["count"].tolist() == [1, 1, 1]
    assert set(manifest.limited(3).ids) < set(manifest.limited(6).ids)


def test_limited_recounts() -> None:
    manifest = build().limited(1)
    assert manifest.ids == ["d", "b", "e", "c"]
    assert manifest.classes["count"].tolist() == [0, 1, 0]
    assert manifest.caption_values == ["one", "two", "three"]
    assert manifest.identity.num_rows == 4
    assert build().limited(99).identity == build().identity
