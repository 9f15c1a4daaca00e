"""Kaggle-style CSV files with bare quotes, and submissions."""

import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from featcache import submission
from featcache.datasets.kaggle_csv import (
    KaggleCsvConfig,
    read_label_encoder,
    write_label_encoder,
)
from featcache.datasets.kaggle_records import read_records
from featcache.errors import ConfigError, DatasetError
from featcache.prediction_table import read_predictions

HEAD = "ImageID,Labels,Caption"


def one_line(error: "pytest.ExceptionInfo[Exception]") -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def bare(caption: str) -> str:
    return f'"{caption}"'


def doubled(caption: str) -> str:
    return '"' + caption.replace('"', '""') + '"'


def write(file: Path, header: str, lines: list[str], end: str = "\n", last: bool = True) -> Path:
    file.write_bytes((end.join([header, *lines]) + (end if last else "")).encode())
    return file


# --- records -------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("last", [True, False])
def test_the_three_shapes_of_the_source(tmp_path: Path, end: str, last: bool) -> None:
    lines = [
        '17.jpg,8 3 13,"a clock tower, near a tree"',
        '18.jpg,1,"A sign that reads "closed.""',
        '19.jpg,18,"first line',
        'second line."',
        '20.jpg,2 ,"either/or"',
        '21.jpg,,"no label"',
        "22.JPG,05,plain, text",
        '23.png,7,"he said ""hi"""',
        "24.jpg,7,",
        '25.jpg,7,"',
        '26.jpg,7,""',
    ]
    file = write(tmp_path / "train.csv", HEAD, lines, end, last)
    records = read_records(file, labelled=True)
    assert [r.name for r in records] == [f"{n}.jpg" for n in (17, 18, 19, 20, 21)] + [
        "22.JPG",
        "23.png",
        "24.jpg",
        "25.jpg",
        "26.jpg",
    ]
    assert [r.labels for r in records[:6]] == [[8, 3, 13], [1], [18], [2], [], [5]]
    assert [r.caption for r in records] == [
        "a clock tower, near a tree",
        'A sign that reads "closed."',
        f"first line{end}second line.",
        "either/or",
        "no label",
        "plain, text",
        'he said "hi"',
        "",
        '"',
        "",
    ]
    assert [r.line for r in records[:4]] == [2, 3, 4, 6]


def test_f46_slashes_stay_in_captions(tmp_path: Path) -> None:
    captions = [r"a cat/dog sign", 'the "on/off" switch', "/", r"c:\d/e", '"/"', "a // b"]
    for quoted in (bare, doubled):
        lines = [f"{row}.jpg,1,{quoted(caption)}" for row, caption in enumerate(captions)]
        records = read_records(write(tmp_path / "train.csv", HEAD, lines), labelled=True)
        assert [record.caption for record in records] == captions


def test_a_caption_may_go_on_with_a_file_name(tmp_path: Path) -> None:
    lines = ['1.jpg,7,"see', 'cat.jpg, and "dogs', 'b.png,"', '2.jpg,8,"next"']
    records = read_records(write(tmp_path / "train.csv", HEAD, lines), labelled=True)
    assert [r.caption for r in records] == ['see\ncat.jpg, and "dogs\nb.png,', "next"]


def nasty_captions(count: int, seed: int) -> list[str]:
    """Captions of pieces that break CSV readers."""
    draw = random.Random(seed)
    pieces = ['"', ",", "\n", "\r\n", "/", "\\", " ", "'", ";", "a dog", "9", "1 2,", "17.jpg", "é"]
    pieces += ['""', "\t", "\u2028", "#", "ImageID", '"closed."', "x.y,", "\x0c"]
    made = []
    while len(made) < count:
        caption = "".join(draw.choices(pieces, k=draw.randint(1, 9)))
        # A line inside a caption that looks like a record cannot be told from one.
        if not re.search(r"(?:^|\n)[^\s,\"]+\.jpg,", caption):
            made.append(caption)
    return made


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_nasty_captions_come_back(tmp_path: Path, labelled: bool, seed: int) -> None:
    """Bare quotes as in the source; doubled ones wherever a regular CSV writer was at work."""
    captions = nasty_captions(400, seed)
    fields = [
        # Bare quotes that happen to be all doubled are valid CSV, and are read as such.
        doubled(text) if n % 2 or not re.sub('""', "", text).count('"') else bare(text)
        for n, text in enumerate(captions)
    ]
    middle = "3 1," if labelled else ""
    lines = [f"{n}.jpg,{middle}{field}" for n, field in enumerate(fields)]
    header = HEAD if labelled else "ImageID,Caption"
    records = read_records(write(tmp_path / "a.csv", header, lines), labelled)
    assert [r.name for r in records] == [f"{n}.jpg" for n in range(400)]
    assert [r.caption for r in records] == captions
    assert all(r.labels == ([3, 1] if labelled else []) for r in records)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", f"header is '', expected '{HEAD}'"),
        ("ImageID,Caption\n1.jpg,x", "header is 'ImageID,Caption', expected"),
        (HEAD, "a header but no records"),
        (f"{HEAD}\nx\n", "line 2: found 'x'; expected an image's file name"),
        (f'{HEAD}\n1.jpg,3,"a"\n2.jpg,dog,"b"\n', "line 3: found 'dog' after the image's name"),
        (f'{HEAD}\n1.jpg,3,"a"\n\n1.jpg,3,"b"\n', r"line 4: 1\.jpg was already on line 2"),
        (f'{HEAD}\n1.jpg,3 4 3,"a"\n', "line 2: a label occurs twice"),
    ],
)
def test_mistakes_in_the_file(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "train.csv").write_text(text)
    with pytest.raises(DatasetError, match=message) as error:
        read_records(tmp_path / "train.csv", labelled=True)
    assert str(tmp_path) in one_line(error)


# --- the dataset ---------------------------------------------------------------------------------


@pytest.fixture
def kaggle(tmp_path: Path) -> Callable[..., KaggleCsvConfig]:
    """`kaggle(**options)`: 40 training images with ids {1..19} without 12, and 5 test images."""
    root = tmp_path / "kaggle"
    (root / "data").mkdir(parents=True)
    (root / "data/0.jpg").write_bytes(b"")
    used = [number for number in range(1, 20) if number != 12]
    lines = [f'{n}.jpg,{used[n % 18]}{" 1" if n % 18 else ""},"image "{n}""' for n in range(40)]
    write(root / "train.csv", HEAD, lines, "\r\n", last=False)
    write(root / "test.csv", "ImageID,Caption", [f'{n}.jpg,"x, y"' for n in (90, 7000, 91, 42, 50)])
    return lambda **options: KaggleCsvConfig.model_validate({"root": root, **options})


MakeKaggle = Callable[..., KaggleCsvConfig]


def test_kaggle_csv(kaggle: MakeKaggle) -> None:
    manifest = kaggle().open()
    assert manifest.task == "multi_label"
    assert manifest.classes["label_id"].tolist() == [str(n) for n in range(1, 20) if n != 12]
    assert manifest.classes["name"].tolist() == manifest.classes["label_id"].tolist()
    counts = Counter(manifest.splits)
    assert counts["test"] == 5
    assert counts["train"] + counts["val"] == 40
    val = [row["labels"] for row in manifest.rows.to_pylist() if row["split"] == "val"]
    assert {label for labels in val for label in labels} == set(range(18))
    rows = {row["id"]: row for row in manifest.rows.to_pylist()}
    assert rows["13.jpg"]["labels"] == [0, 13]  # ids 1 and 15: no 0, no 12 below it
    assert rows["13.jpg"]["path"] == "data/13.jpg"
    assert rows["13.jpg"]["captions"] == ['image "13"']
    assert [row["id"] for row in manifest.rows.to_pylist()[-5:]] == [
        "90.jpg",
        "7000.jpg",
        "91.jpg",
        "42.jpg",
        "50.jpg",
    ]
    assert rows["90.jpg"]["labels"] == []


def test_label_encoder_gives_the_classes(kaggle: MakeKaggle, tmp_path: Path) -> None:
    file = tmp_path / "classes.npy"
    write_label_encoder(file, np.asarray([19, *range(1, 12), *range(13, 19), 30]))
    assert read_label_encoder(file).tolist() == [*range(1, 12), *range(13, 20), 30]
    manifest = kaggle(label_encoder=file).open()
    assert manifest.classes["label_id"].tolist()[-1] == "30"
    assert manifest.classes["count"].tolist()[-1] == 0
    np.save(file, np.asarray([1, 2]))
    with pytest.raises(DatasetError, match=r"train\.csv line 4: label 3 is not in .*classes\.npy"):
        kaggle(label_encoder=file).open()
    bad: list[Any] = [[2, 1], [[1, 2]], [1.5], [1, 1], []]
    for values in bad:
        np.save(file, np.asarray(values))
        with pytest.raises(DatasetError, match="ascending whole numbers") as error:
            read_label_encoder(file)
        one_line(error)
    np.save(file, np.asarray(["a", {}], dtype=object), allow_pickle=True)
    with pytest.raises(DatasetError, match=r"not a plain \.npy file"):
        read_label_encoder(file)
    with pytest.raises(DatasetError, match="no such file"):
        read_label_encoder(tmp_path / "none.npy")


def test_classes_can_have_names(kaggle: MakeKaggle, tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("\n".join(f"thing no. {chr(64 + n)} {n}" for n in range(1, 20)))
    classes = kaggle(class_names=names).open().classes
    assert classes["name"].tolist()[:2] == ["thing no. A", "thing no. B"]
    assert classes["label_id"].tolist()[-1] == "19"
    names.write_text("person 1")
    with pytest.raises(DatasetError, match="no name for label 2"):
        kaggle(class_names=names).open()


def test_files_that_do_not_fit_together(kaggle: MakeKaggle, tmp_path: Path) -> None:
    config = kaggle()
    write(config.root / "test.csv", "ImageID,Caption", ['90.jpg,"a"', '3.jpg,"b"'])
    with pytest.raises(DatasetError, match=r"train\.csv line 5: 3\.jpg is on line 3 of the test"):
        config.open()
    (config.root / "test.csv").unlink()
    assert set(config.open().splits) == {"train", "val"}
    with pytest.raises(DatasetError, match=r"no\.csv: no such file"):
        kaggle(test="no.csv").open()
    with pytest.raises(DatasetError, match=r"none of the first 20 images exists, e\.g\. 0\.jpg"):
        kaggle(images=".").open()
    write(config.root / "train.csv", HEAD, ['0.jpg,,"a"'])
    with pytest.raises(DatasetError, match="no record has a label"):
        config.open()


# --- submissions ---------------------------------------------------------------------------------


def test_class_names_that_look_like_missing_cells(tmp_path: Path) -> None:
    classes = pd.DataFrame({"name": ["None", "NA", "dog"], "label_id": ["4", "7", "9"]})
    table = pd.DataFrame(
        {"id": ["1.jpg", "2.jpg"], "classes": ["NA; dog", ""], "class_1": ["dog", "None"]}
    )
    table.to_csv(tmp_path / "p.csv", index=False)
    read = read_predictions(tmp_path / "p.csv", classes["name"].tolist())
    assert submission.labels_of(read, classes) == {"1.jpg": [7, 9], "2.jpg": [4]}
    with pytest.raises(ConfigError, match="predicted class 'NA' is none of the 1 of the class"):
        submission.labels_of(read, classes[2:])


def test_a_submission_has_the_order_and_the_ids_of_the_test_file(
    kaggle: MakeKaggle, tmp_path: Path
) -> None:
    config = kaggle()
    classes = config.open().classes
    table = pd.DataFrame(
        {
            "id": ["42.jpg", "90.jpg", "91.jpg", "7000.jpg"],
            "classes": [["19", "2", "13"], [], [], ["1"]],
            "class_1": ["2", "19", 3, "1"],
        }
    )
    labels = submission.labels_of(table, classes)
    order = submission.read_order(config.root / "test.csv")
    frame = submission.submission(order, labels)
    submission.write_submission(tmp_path / "out/s.csv", frame)
    assert (tmp_path / "out/s.csv").read_bytes() == (
        b"ImageID,Labels\n90.jpg,19\n7000.jpg,1\n91.jpg,3\n42.jpg,2 13 19\n50.jpg,\n"
    )
    text = submission.summary(Path("s.csv"), frame)
    assert text == "5 rows: s.csv; 1 not predicted and left empty, e.g. 50.jpg"
    assert submission.read_order(tmp_path / "out/s.csv") == order
    with pytest.raises(DatasetError, match=r"none of the 2 images was predicted, the first is a"):
        submission.submission(["a.jpg", "b.jpg"], labels)
    with pytest.raises(ConfigError, match="class 'oak' has no label id"):
        submission.labels_of(table, pd.DataFrame({"name": ["oak"]}))


def test_scores_become_labels() -> None:
    scores = np.asarray([[0.9, 0.5, 0.1], [0.1, 0.3, 0.3], [0.2, 0.4, 0.1]])
    ids = np.asarray([4, 2, 19])
    assert submission.labels_from_scores(scores, ids) == [[2, 4], [2, 19], [2]]
    thresholds = np.asarray([0.95, 0.6, 0.12])
    assert submission.labels_from_scores(scores, ids, thresholds) == [[19], [19], [19]]
