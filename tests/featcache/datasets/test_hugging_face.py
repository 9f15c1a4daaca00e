"""Hugging Face datasets on disk: against that package, and from Arrow files made by hand."""

import io
import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from featcache.datasets.hugging_face import HuggingFaceConfig
from featcache.errors import DatasetError
from featcache.formats.arrow_cells import read_cell
from featcache.image_bytes import arrow_cell_path, read_bytes, stamp

CLASSES = {"names": ["zebra", "ant", "bee"], "_type": "ClassLabel"}
TEXT = {"dtype": "string", "_type": "Value"}
CELL = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def png(value: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), value, np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def cells(count: int) -> pa.Array:
    return pa.array([{"bytes": b"image %d" % n, "path": None} for n in range(count)], CELL)


def save(
    folder: Path, columns: dict[str, Any], features: dict[str, Any], num_files: int = 1
) -> Path:
    """What `save_to_disk` writes, for columns of equal length."""
    folder.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    names = [f"data-{n:05d}-of-{num_files:05d}.arrow" for n in range(num_files)]
    step = -(-table.num_rows // num_files)
    for number, name in enumerate(names):
        part = table.slice(number * step, step)
        with pa.ipc.new_stream(folder / name, table.schema) as writer:
            writer.write_table(part, max_chunksize=2)
    state = {"_data_files": [{"filename": name} for name in names], "_split": None}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text(json.dumps({"features": features}))
    return folder


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    """`saved(label=cells, ...)`: a Dataset of 6 images with these further columns."""

    def make(features: dict[str, Any] | None = None, **columns: Any) -> Path:
        described = {"image": {"_type": "Image"}, **(features or {})}
        return save(tmp_path / "set", {"image": cells(6), **columns}, described, num_files=2)

    return make


Saved = Callable[..., Path]


def one_line(error: "pytest.ExceptionInfo[DatasetError]") -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.filterwarnings("ignore")
def test_against_the_datasets_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    hf = pytest.importorskip("datasets")
    hf.disable_progress_bars()
    (tmp_path / "own.png").write_bytes(png(9))
    features = hf.Features(
        {
            "photo": hf.Image(),
            "kind": hf.ClassLabel(names=CLASSES["names"]),
            "caption": hf.Sequence(hf.Value("string")),
        }
    )

    def rows(count: int) -> Any:
        values = {
            "photo": [str(tmp_path / "own.png"), *({"bytes": png(n)} for n in range(1, count))],
            "kind": [n % 3 for n in range(count)],
            "caption": [[f"caption {n}-{i}" for i in range(n % 3)] for n in range(count)],
        }
        return hf.Dataset.from_dict(values, features=features)

    whole = hf.DatasetDict({"train": rows(7), "validation": rows(3).shuffle(seed=1)})
    whole.save_to_disk(tmp_path / "set", num_shards={"train": 3, "validation": 1})
    source = hf.load_from_disk(str(tmp_path / "set"))
    manifest = HuggingFaceConfig(root=tmp_path / "set").open()
    assert manifest.classes["name"].tolist() == source["train"].features["kind"].names
    assert manifest.splits == ["train"] * 7 + ["val"] * 3
    expected = [*source["train"], *source["validation"]]
    found = manifest.rows.to_pylist()
    for row, want in zip(found, expected, strict=True):
        with Image.open(io.BytesIO(read_bytes(manifest.root, row["path"]))) as image:
            np.testing.assert_array_equal(np.asarray(image), np.asarray(want["photo"]))
        assert row["labels"] == [want["kind"]]
        assert row["captions"] == want["caption"]
    assert found[0]["id"] == "train/0"
    assert manifest.task == "single_label"


def test_one_dataset_is_split_here(saved: Saved) -> None:
    root = saved({"label": CLASSES}, label=[0, 1, 2, 0, None, -1])
    manifest = HuggingFaceConfig(root=root, val_fraction=0.2, test_fraction=0.0).open()
    assert Counter(manifest.splits)["train"] >= 4
    rows = {row["id"]: row for row in manifest.rows.to_pylist()}
    assert [rows[str(n)]["labels"] for n in range(6)] == [[0], [1], [2], [0], [], []]
    images = [read_bytes(root, rows[str(n)]["path"]) for n in range(6)]
    assert images == [b"image %d" % n for n in range(6)]
    assert rows["4"]["path"] == "data-00001-of-00002.arrow@1/image"
    assert manifest.classes["name"].tolist() == ["zebra", "ant", "bee"]


@pytest.mark.parametrize("kind", ["List", "Sequence", "LargeList", "old", "fixed"])
def test_lists_of_classes(saved: Saved, kind: str) -> None:
    feature: Any = [CLASSES] if kind == "old" else {"feature": CLASSES, "_type": kind}
    if kind == "fixed":
        feature, lists = {"feature": CLASSES, "_type": "List"}, pa.list_(pa.int64(), 2)
        rows = [[2, 0], [0, 1], None, [1, 0], [0, 2], [1, 2]]
    else:
        lists = pa.large_list(pa.int64()) if kind == "LargeList" else pa.list_(pa.int64())
        rows = [[2, 0], [], None, [1], [0], [1, 2]]
    root = saved({"tags": feature}, tags=pa.array(rows, lists))
    manifest = HuggingFaceConfig(root=root, val_fraction=0, test_fraction=0).open()
    assert manifest.task == "multi_label"
    assert manifest.rows.column("labels").to_pylist() == [row or [] for row in rows]


def test_a_class_counts_once_a_row_and_minus_one_is_none(saved: Saved) -> None:
    rows = [[2, 0, 2], [-1], [0, -1, 0], [1], [None, 1], [1, 2]]
    feature = {"feature": CLASSES, "_type": "List"}
    root = saved({"objects": feature}, objects=pa.array(rows, pa.list_(pa.int64())))
    manifest = HuggingFaceConfig(root=root, val_fraction=0, test_fraction=0).open()
    assert manifest.rows.column("labels").to_pylist() == [[2, 0], [], [0], [1], [1], [1, 2]]
    assert manifest.classes["count"].tolist() == [2, 3, 2]


def test_numbers_that_mark_every_class_are_no_list_of_classes(saved: Saved) -> None:
    feature = {"feature": {"dtype": "int8", "_type": "Value"}, "_type": "List"}
    rows = pa.array([[0, 1, 0]] * 6, pa.list_(pa.int8()))
    root = saved({"label": feature}, label=rows)
    with pytest.raises(DatasetError, match="'label' has a value twice in one row") as error:
        HuggingFaceConfig(root=root).open()
    one_line(error)


def test_plain_labels_are_sorted_numbers_by_value(saved: Saved) -> None:
    value = {"dtype": "int64", "_type": "Value"}
    root = saved({"label": value}, label=[10, 9, None, 9, 1, 10])
    manifest = HuggingFaceConfig(root=root, val_fraction=0, test_fraction=0).open()
    assert manifest.classes["name"].tolist() == ["1", "9", "10"]
    assert manifest.rows.column("labels").to_pylist() == [[2], [1], [], [1], [0], [2]]
    root = saved({"sort": TEXT, "text": TEXT}, sort=list("cab") * 2, text=["x ", "", None] * 2)
    config = HuggingFaceConfig(root=root, label_column="sort", val_fraction=0, test_fraction=0)
    manifest = config.open()
    assert manifest.classes["name"].tolist() == ["a", "b", "c"]
    assert manifest.rows.column("captions").to_pylist() == [["x"], [], []] * 2


def test_without_labels_and_with_own_ids(saved: Saved) -> None:
    root = saved(
        {"key": TEXT, "n": {"dtype": "int64", "_type": "Value"}}, key=list("fedcba"), n=range(6)
    )
    config = HuggingFaceConfig(root=root, id_column="key", val_fraction=0, test_fraction=0)
    manifest = config.open()
    assert manifest.task == "unlabelled"
    assert manifest.ids == list("fedcba")
    assert manifest.caption_values == []


def test_cells_without_bytes_name_a_file(tmp_path: Path) -> None:
    (tmp_path / "set/photos").mkdir(parents=True)
    (tmp_path / "set/photos/1.jpg").write_bytes(b"one")
    (tmp_path / "2.jpg").write_bytes(b"two")
    inside, outside = str(tmp_path / "set/photos/1.jpg"), str(tmp_path / "2.jpg")
    column = [{"bytes": None, "path": inside}, {"bytes": None, "path": outside}, None]
    root = save(tmp_path / "set", {"image": pa.array(column, CELL)}, {"image": {"_type": "Image"}})
    manifest = HuggingFaceConfig(root=root, val_fraction=0, test_fraction=0).open()
    assert manifest.paths[0] == "photos/1.jpg"
    assert [read_bytes(root, path) for path in manifest.paths[:2]] == [b"one", b"two"]
    with pytest.raises(ValueError, match="the cell holds no image"):
        read_bytes(root, manifest.paths[2])


@pytest.mark.parametrize(
    ("columns", "features", "options", "message"),
    [
        (
            {"fine": [0] * 6, "coarse": [0] * 6},
            {"fine": CLASSES, "coarse": CLASSES},
            {},
            "columns fine and coarse hold classes; choose with dataset.label_column",
        ),
        ({}, {}, {"label_column": "sort"}, "no column 'sort'; found image; set dataset.label_col"),
        ({}, {"image": TEXT}, {}, "no column of type Image; found image"),
        ({"label": [0.5] * 6}, {"label": TEXT}, {}, "column 'label' has type double"),
        ({"label": [3] * 6}, {"label": CLASSES}, {}, r"label 3 lies outside 0\.\.2"),
        ({"key": ["a"] * 6}, {"key": TEXT}, {"id_column": "key"}, "'a' occurs 6 times"),
    ],
)
def test_columns_that_do_not_fit(
    saved: Saved, columns: Any, features: Any, options: Any, message: str
) -> None:
    root = saved(features, **columns)
    with pytest.raises(DatasetError, match=message) as error:
        HuggingFaceConfig(root=root, **options).open()
    assert str(root) in one_line(error)


def test_folders_that_are_damaged(saved: Saved, tmp_path: Path) -> None:
    def refused(message: str, root: Path) -> None:
        with pytest.raises(DatasetError, match=message) as error:
            HuggingFaceConfig(root=root).open()
        assert str(root) in one_line(error)

    refused("no such folder; expected a folder that save_to_disk", tmp_path / "none")
    refused("neither dataset_dict.json nor state.json", tmp_path)
    root = saved()
    file = root / "data-00001-of-00002.arrow"
    whole = file.read_bytes()
    file.write_bytes(whole[:-200])
    refused("cannot be read: not a whole Arrow stream", root)
    file.unlink()
    refused("no such file, state.json lists it", root)
    (root / "state.json").write_text("{")
    refused("not JSON", root)
    (root / "state.json").write_text('{"_data_files": [], "_indices_files": [1]}')
    refused("flatten_indices", root)
    for text in ("{}", '{"_data_files": [{"name": "a"}]}', '{"_data_files": 3}'):
        (root / "state.json").write_text(text)
        refused("lists no _data_files", root)


def test_damaged_offsets_are_refused_before_they_are_followed(saved: Saved) -> None:
    """Arrow itself would read far outside the file."""
    root = saved({"caption": TEXT}, caption=[f"caption number {n}" for n in range(6)])
    file = root / "data-00000-of-00002.arrow"
    whole = file.read_bytes()
    ends = np.asarray([0, 16, 32], np.int32).tobytes()  # of a batch of two captions
    assert ends in whole
    file.write_bytes(whole.replace(ends, np.asarray([0, 16, 2**30], np.int32).tobytes(), 1))
    with pytest.raises(DatasetError, match="not a whole Arrow stream") as error:
        HuggingFaceConfig(root=root).open()
    one_line(error)
    with pytest.raises(ValueError, match="not a whole Arrow stream"):
        read_bytes(root, "data-00000-of-00002.arrow@0/image")


def test_splits_have_to_agree(tmp_path: Path) -> None:
    root = tmp_path / "dict"
    image = {"image": {"_type": "Image"}}
    other = {"names": ["ant", "zebra", "bee"], "_type": "ClassLabel"}
    for name, classes in (("train", CLASSES), ("dev", other), ("validation", CLASSES)):
        save(root / name, {"image": cells(2), "label": [0, 1]}, {**image, "label": classes})
    (root / "dataset_dict.json").write_text('{"splits": ["train", "dev"]}')
    with pytest.raises(DatasetError, match="column 'label' has another type, or other classes"):
        HuggingFaceConfig(root=root).open()
    (root / "dataset_dict.json").write_text('{"splits": ["train", "dev", "validation"]}')
    with pytest.raises(DatasetError, match="dev and validation both mean val"):
        HuggingFaceConfig(root=root).open()


def test_cells_are_found_and_marked(tmp_path: Path) -> None:
    table = pa.table({"image": cells(5), "raw": [b"%d" % n for n in range(5)], "n": range(5)})
    file = tmp_path / "a.arrow"
    with pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    for row in (4, 0, 3):
        assert read_bytes(tmp_path, arrow_cell_path("a.arrow", row, "image")) == b"image %d" % row
        assert read_cell(file, row, "raw") == b"%d" % row
    for name, reason in {
        "a.arrow@5/image": "the file has only 5 rows",
        "a.arrow@0/photo": "the file has no column photo",
        "a.arrow@0/n": "the cell holds no image",
        "b.arrow@0/image": "missing",
    }.items():
        with pytest.raises(ValueError, match=f"^{reason}$"):
            read_bytes(tmp_path, name)
    marks = {stamp(tmp_path, f"a.arrow@{row}/{c}") for row in range(5) for c in ("image", "raw")}
    assert len(marks) == 10
    assert stamp(tmp_path, "b.arrow@0/image") == 0
    os.utime(file, ns=(1, 1))
    assert stamp(tmp_path, "a.arrow@0/image") not in marks
    with pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table.slice(1))
    assert read_bytes(tmp_path, "a.arrow@0/image") == b"image 1"
