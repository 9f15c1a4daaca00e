"""VOC-LT and COCO-LT from lists made here, and the text lists themselves."""

import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from featcache.class_frequency import ClassFrequency, ClassFrequencyConfig, run
from featcache.datasets import coco_classes, voc_lt
from featcache.datasets.coco_lt import CocoLtConfig
from featcache.datasets.path_lists import read_captions, read_names, read_path_list
from featcache.datasets.voc_lt import VocLtConfig
from featcache.errors import ConfigError, DatasetError

FOLDER = "VOCdevkit/VOC2012/JPEGImages"


def one_line(error: "pytest.ExceptionInfo[Exception]") -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


# --- class order ---------------------------------------------------------------------------------


def test_voc_order_is_that_of_torchvision() -> None:
    from torchvision.models.segmentation import DeepLabV3_ResNet50_Weights as Weights

    source = Weights.COCO_WITH_VOC_LABELS_V1.meta["categories"]
    assert list(voc_lt.NAMES) == source[1:]


def test_coco_order_is_that_of_torchvision() -> None:
    from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights as Weights

    source = Weights.COCO_V1.meta["categories"]
    named = {number: name for number, name in enumerate(source) if name != "N/A"}
    assert named == {0: "__background__", **coco_classes.CATEGORIES}
    assert list(coco_classes.CATEGORIES) == sorted(coco_classes.CATEGORIES)


# --- lists ---------------------------------------------------------------------------------------


def test_names_may_hold_blanks_and_the_id_is_last(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(
        b"\xef\xbb\xbfperson 0\r\ntraffic light 9 \r\n\r\nhair  drier\t78"
    )
    assert read_names(tmp_path / "a.txt") == {0: "person", 9: "traffic light", 78: "hair drier"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("person 0\ndog", "line 2: found 'dog'"),
        ("7", "line 1: found '7'"),
        ("dog 1\ncat 1", "line 2: 'cat 1' repeats"),
        ("dog 1\ndog 2", "line 2: 'dog 2' repeats"),
    ],
)
def test_mistakes_in_a_list_of_names(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(DatasetError, match=message) as error:
        read_names(tmp_path / "a.txt")
    one_line(error)


@pytest.mark.parametrize("end", ["\n", "\r\n", " \r\n", "\t \n"])
@pytest.mark.parametrize("last", [True, False])
def test_path_lists_in_every_shape(tmp_path: Path, end: str, last: bool) -> None:
    lines = ["a/1.jpg 14 4 19", "", "b c/2.JPEG", "d.jpg.png  0", "plain 3"]
    (tmp_path / "a.txt").write_bytes((end.join(lines) + (end if last else "")).encode())
    found = read_path_list(tmp_path / "a.txt", 20)
    assert found.paths == ["a/1.jpg", "b c/2.JPEG", "d.jpg.png", "plain"]
    assert found.labels == [[4, 14, 19], [], [0], [3]]
    assert found.numbers == [1, 3, 4, 5]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1.jpg 3\n2.jpg 20", r"line 2: class id 20 lies outside 0\.\.19"),
        ("1.jpg -1", "line 1: class id -1 lies outside"),
        ("1.jpg 3 dog", "line 1: found 'dog' after the path"),
        ("1.jpg 3 3", "line 1: a class id occurs twice"),
        ("1.jpg 3\n\n1.jpg 4", r"line 3: 1\.jpg was already on line 1"),
        (" \n", "empty; expected lines"),
    ],
)
def test_mistakes_in_a_path_list(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(DatasetError, match=message) as error:
        read_path_list(tmp_path / "a.txt", 20)
    assert str(tmp_path) in one_line(error)


def test_lists_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DatasetError, match="not UTF-8") as error:
        read_path_list(tmp_path / "a.txt", 20)
    one_line(error)
    with pytest.raises(DatasetError, match="no such file; expected lines"):
        read_path_list(tmp_path / "b.txt", 20)


def test_captions_are_free_text(tmp_path: Path) -> None:
    text = "a/1.jpg two dogs, a 'cat' 7\x0c and\u2028more.\r\nb c.jpg\r\n"
    text += "b c.jpg d.jpg a picture of e.jpg here\r\na/1.jpg  again 1.png  "
    (tmp_path / "a.txt").write_bytes(text.encode())
    assert read_captions(tmp_path / "a.txt") == {
        "a/1.jpg": ["two dogs, a 'cat' 7\x0c and\u2028more.", "again 1.png"],
        "b c.jpg": ["d.jpg a picture of e.jpg here"],
    }
    known = {"b c.jpg d.jpg", "b c.jpg"}
    assert read_captions(tmp_path / "a.txt", known) == {
        "b c.jpg": [],
        "b c.jpg d.jpg": ["a picture of e.jpg here"],
    }
    (tmp_path / "b.txt").write_text("set/data.arrow@0/image a picture of e.jpg here")
    known = {"set/data.arrow@0/image"}
    assert read_captions(tmp_path / "b.txt", known) == {known.pop(): ["a picture of e.jpg here"]}
    with pytest.raises(DatasetError, match=r"no caption is of a listed image, the first is of a/1"):
        read_captions(tmp_path / "a.txt", {"x.jpg"})


# --- the datasets --------------------------------------------------------------------------------


@pytest.fixture
def voc(tmp_path: Path) -> Callable[..., VocLtConfig]:
    """`voc(**options)`: 44 training and 3 test images; `voc_lt_*.txt` can be changed before."""
    root = tmp_path / "voc"
    (root / FOLDER).mkdir(parents=True)
    for number in range(3):  # others are missing: extraction's to report
        (root / f"{FOLDER}/{number}.jpg").write_bytes(b"")
    lines = [f"{FOLDER}/{n}.jpg {n % 20}{' 14' if n % 20 != 14 else ''} " for n in range(44)]
    (root / "voc_lt_train.txt").write_bytes("\r\n".join(lines).encode())
    (root / "voc_lt_test.txt").write_text(
        f"{FOLDER}/90.jpg 3 1\n{FOLDER}/91.jpg\n{FOLDER}/92.jpg 0"
    )
    names = [f"{name} {number}{' ' * (number % 2)}" for number, name in enumerate(voc_lt.NAMES)]
    (root / "voc_labels.txt").write_bytes("\r\n".join(reversed(names)).encode())
    captions = [f"{FOLDER}/{n}.jpg caption {n}" for n in reversed(range(44)) if n != 5]
    (root / "voc_lt_captions.txt").write_text("\n".join([*captions, "VOCdevkit/other.jpg x"]))
    return lambda **options: VocLtConfig(root=root, **options)


MakeVoc = Callable[..., VocLtConfig]


def test_voc_lt(voc: MakeVoc) -> None:
    manifest = voc().open()
    assert manifest.task == "multi_label"
    assert Counter(manifest.splits) == {"train": 44 - 19, "val": 19, "test": 3}
    rows = {row["id"]: row for row in manifest.rows.to_pylist()}
    for number in range(44):
        row = rows[f"{FOLDER}/{number}.jpg"]
        assert row["labels"] == sorted({number % 20, 14})
        assert row["captions"] == ([] if number == 5 else [f"caption {number}"])
        assert row["path"] == row["id"]
    assert [rows[f"{FOLDER}/{n}.jpg"]["labels"] for n in (90, 91, 92)] == [[1, 3], [], [0]]
    assert rows[f"{FOLDER}/91.jpg"]["split"] == "test"


def test_groups_are_those_of_the_whole_train_list(voc: MakeVoc) -> None:
    table = voc().open().classes
    assert table["name"].tolist() == list(voc_lt.NAMES)
    assert table["list_count"].tolist() == [
        "44" if n == 14 else "3" if n < 4 else "2" for n in range(20)
    ]
    assert table["count"].astype(int).sum() < table["list_count"].astype(int).sum()
    assert table["group"].tolist() == ["medium" if n == 14 else "tail" for n in range(20)]
    few = voc(shots=1).open().classes
    assert few["group"].tolist() == table["group"].tolist()


def test_counting_keeps_the_stated_groups(voc: MakeVoc, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(ClassFrequencyConfig(dataset=voc(shots=1))).class_freq.max() < 20  # tail by count
    assert "0 head, 1 medium, 19 tail (as the dataset states them)" in capsys.readouterr().out


def test_readable_names_change_no_index(voc: MakeVoc) -> None:
    plain, readable = voc().open(), voc(readable_names=True).open()
    assert readable.label_values.tolist() == plain.label_values.tolist()
    assert readable.ids == plain.ids
    assert readable.classes["name"].tolist() == plain.classes["readable_name"].tolist()
    assert readable.classes["list_name"].tolist() == plain.classes["name"].tolist()
    assert [readable.classes["name"][n] for n in (10, 15, 19)] == [
        "dining table",
        "potted plant",
        "tv monitor",
    ]
    assert readable.identity.classes != plain.identity.classes


def test_validation_rows_are_an_option_and_never_test_rows(voc: MakeVoc) -> None:
    assert Counter(voc(val_fraction=0).open().splits) == {"train": 44, "test": 3}
    one, other = voc().open(), voc(seed=1).open()
    assert one.identity != other.identity
    tests = [{i for i, s in zip(m.ids, m.splits, strict=True) if s == "test"} for m in (one, other)]
    assert tests[0] == tests[1] == {f"{FOLDER}/{n}.jpg" for n in (90, 91, 92)}


def test_other_captions_can_be_given(voc: MakeVoc, tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_text(f"{FOLDER}/90.jpg a test caption\n{FOLDER}/0.jpg one\n")
    manifest = voc(captions=tmp_path / "c.txt").open()
    captions = dict(zip(manifest.ids, manifest.rows.column("captions").to_pylist(), strict=True))
    assert captions[f"{FOLDER}/90.jpg"] == ["a test caption"]
    assert captions[f"{FOLDER}/1.jpg"] == []
    with pytest.raises(DatasetError, match=r"none\.txt: no such file"):
        voc(captions=tmp_path / "none.txt").open()


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("voc_labels.txt", "aeroplane 0\nbird 1", "class 1 has 'bird'; expected 'bicycle'"),
        ("voc_labels.txt", "aeroplane 0", "class 1 has no name"),
        (
            "voc_labels.txt",
            "\n".join(f"{name} {n}" for n, name in enumerate((*voc_lt.NAMES, "extra"))),
            "21 names, e.g. 'extra' 20; expected 20",
        ),
        ("voc_lt_test.txt", f"{FOLDER}/7.jpg 1", r"line 1: .*/7\.jpg is on line 8 of voc_lt_train"),
        ("voc_lt_train.txt", "a.jpg 20", "line 1: class id 20 lies outside"),
        ("voc_lt_train.txt", "a.jpg 1", "none of the first 4 images exists, e.g. a.jpg"),
        ("voc_lt_captions.txt", "a.jpg x", "no caption is of a listed image"),
    ],
)
def test_mistakes_are_one_line(voc: MakeVoc, file: str, text: str, message: str) -> None:
    config = voc()
    (config.root / file).write_text(text)
    with pytest.raises(DatasetError, match=message) as error:
        config.open()
    assert str(config.root) in one_line(error)


def test_coco_lt(tmp_path: Path) -> None:
    (tmp_path / "train2017").mkdir()
    (tmp_path / "train2017/000000000009.jpg").write_bytes(b"")
    lists = tmp_path / "lists"
    lists.mkdir()
    (lists / "coco_lt_train.txt").write_text("train2017/000000000009.jpg 79 0\n")
    (lists / "coco_lt_test.txt").write_text("val2017/000000000139.jpg \n")
    labels = "\r\n".join(f"{name} {n}" for n, name in enumerate(coco_classes.NAMES))
    (lists / "coco_labels.txt").write_text(labels)
    manifest = CocoLtConfig(root=tmp_path, lists=lists).open()
    assert manifest.classes["name"].tolist() == list(coco_classes.NAMES)
    assert manifest.rows.column("labels").to_pylist() == [[0, 79], []]
    assert manifest.splits == ["train", "test"]
    assert manifest.caption_values == []


# --- class frequencies ---------------------------------------------------------------------------


def slow_frequencies(rows: list[list[int]], num_classes: int) -> dict[str, Any]:
    hot = np.asarray([[int(c in row) for c in range(num_classes)] for row in rows])
    share = np.eye(num_classes)
    for a in range(num_classes):
        for b in range(num_classes):
            with_a = [row for row in rows if a in row]
            if a != b and with_a:
                share[a, b] = sum(b in row for row in with_a) / len(with_a)
    return {
        "class_freq": hot.sum(0),
        "neg_class_freq": len(rows) - hot.sum(0),
        "gt_labels": hot,
        "condition_prob": share,
    }


def test_class_frequencies_against_a_loop_and_an_old_pickle(
    voc: MakeVoc, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = voc(val_fraction=0)
    file = config.root / "voc_lt_train.txt"
    file.write_text(f"{FOLDER}/0.jpg 0 3\n{FOLDER}/1.jpg\n{FOLDER}/2.jpg 3 19\n{FOLDER}/4.jpg 3 0")
    expected = slow_frequencies([[0, 3], [], [3, 19], [0, 3]], 20)
    (tmp_path / "class_freq.pkl").write_bytes(pickle.dumps(expected, 2))
    for name in ("freq.npz", "deep/freq.json"):
        found = run(
            ClassFrequencyConfig(
                dataset=config, out=tmp_path / name, compare=tmp_path / "class_freq.pkl"
            )
        )
        again = ClassFrequency.read(tmp_path / name)
        for key, value in expected.items():
            np.testing.assert_array_equal(getattr(found, key), value)
            np.testing.assert_array_equal(getattr(again, key), value)
    assert "4 rows, 6 labels, 20 classes: 0 head, 0 medium, 20 tail" in capsys.readouterr().out
    assert not np.isnan(found.condition_prob).any()


def test_other_class_frequencies_are_named(voc: MakeVoc, tmp_path: Path) -> None:
    config = voc(val_fraction=0)
    run(ClassFrequencyConfig(dataset=config, out=tmp_path / "f.npz"))
    with pytest.raises(DatasetError, match=r"class_freq\[14\]: 19 here, 44 there") as error:
        run(ClassFrequencyConfig(dataset=voc(val_fraction=0, shots=1), compare=tmp_path / "f.npz"))
    assert "gt_labels: shape" in str(error.value)
    (tmp_path / "bad.json").write_text('{"class_freq": [1]}')
    with pytest.raises(DatasetError, match=r"bad\.json: expected class_freq, neg_class_freq"):
        ClassFrequency.read(tmp_path / "bad.json")
    (tmp_path / "bad.npz").write_bytes(b"PK")
    with pytest.raises(DatasetError, match=r"bad\.npz: damaged"):
        ClassFrequency.read(tmp_path / "bad.npz")
    with pytest.raises(
        DatasetError, match="no row in split dev; the voc_lt dataset has train, test"
    ):
        run(ClassFrequencyConfig(dataset=config, splits=("dev",)))
    with pytest.raises(ConfigError, match=r"has to end with \.npz or \.json"):
        ClassFrequencyConfig.from_command_line(["--dataset", "digits", "--out", "a.pkl"])
