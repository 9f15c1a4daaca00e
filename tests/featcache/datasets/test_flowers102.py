"""Flowers-102: both splits, their order against torchvision's, and one line for each mistake."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from scipy.io import savemat
from torchvision.datasets import Flowers102, flowers102

from featcache.datasets.flower_names import FLOWER_NAMES
from featcache.datasets.flowers102 import Flowers102Config
from featcache.errors import DatasetError
from featcache.prompts import choose

LABELS = np.asarray([77, 1, 102, 1, 40, 77, 3, 3, 102, 5])
PARTS = {"trnid": [2, 9, 1], "valid": [10, 4], "tstid": [8, 3, 7, 5, 6]}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    base = tmp_path / "flowers-102"
    (base / "jpg").mkdir(parents=True)
    for number in range(1, 11):
        (base / "jpg" / f"image_{number:05d}.jpg").touch()
    savemat(base / "imagelabels.mat", {"labels": LABELS.reshape(1, -1).astype(np.uint8)})
    savemat(base / "setid.mat", {n: np.asarray([v], np.uint16) for n, v in PARTS.items()})
    return tmp_path


def few_shot_rows() -> dict[str, list[list[Any]]]:
    return {
        "train": [["image_00002.jpg", 1, "rose"], ["image_00001.jpg", 0, "passion flower"]],
        "val": [["image_00004.jpg", 1, "rose"]],
        "test": [["image_00006.jpg", 0, "passion flower"], ["image_00003.jpg", 2, "lotus"]],
    }


def test_rows_and_classes_are_torchvisions(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flowers102, "check_integrity", lambda *_: True)
    theirs = {split: Flowers102(str(root), split=split) for split in ("train", "val", "test")}
    manifest = Flowers102Config(root=root).open()
    wanted = [
        (split, str(file), label)
        for split, one in theirs.items()
        for file, label in zip(one._image_files, one._labels, strict=True)
    ]
    found = zip(manifest.splits, manifest.paths, manifest.label_values.tolist(), strict=True)
    assert [(s, str(manifest.root / path), label) for s, path, label in found] == wanted
    assert manifest.classes["name"].tolist() == Flowers102.classes
    assert Flowers102Config(root=root / "flowers-102").open().identity == manifest.identity


def test_passion_flower_is_label_77(root: Path) -> None:
    assert len(set(FLOWER_NAMES)) == 102
    assert FLOWER_NAMES[76] == "passion flower"
    manifest = Flowers102Config(root=root).open()
    assert manifest.label_values[manifest.ids.index("image_00001.jpg")] == 76
    assert choose(manifest.kind, ["name"]) == "flowers102"


def test_names_from_a_file(root: Path, tmp_path: Path) -> None:
    file = tmp_path / "cat_to_name.json"
    names = {str(label): f"flower {label}" for label in range(1, 103)}
    file.write_text(json.dumps(dict(sorted(names.items()))))  # "1", "10", "100", …
    classes = Flowers102Config(root=root, names_json=file).open().classes
    assert classes["name"].tolist() == [f"flower {label}" for label in range(1, 103)]
    del names["7"]
    file.write_text(json.dumps(names))
    with pytest.raises(DatasetError, match='expected names under "1" to "102"'):
        Flowers102Config(root=root, names_json=file).open()


def test_the_few_shot_split_is_another_dataset(root: Path) -> None:
    (root / "flowers-102" / "split_zhou_OxfordFlowers.json").write_text(json.dumps(few_shot_rows()))
    official = Flowers102Config(root=root).open()
    manifest = Flowers102Config(root=root, split="few_shot").open()
    assert manifest.splits == ["train", "train", "val", "test", "test"]
    assert manifest.ids == [row[0] for part in few_shot_rows().values() for row in part]
    assert manifest.label_values.tolist() == [1, 0, 1, 0, 2]
    assert manifest.classes["name"].tolist() == ["passion flower", "rose", "lotus"]
    assert (official.identity.kind, manifest.identity.kind) == ("flowers102", "flowers102_few_shot")
    assert choose(manifest.kind, ["name"]) == "flowers102"


@pytest.mark.parametrize(
    ("split", "row", "message"),
    [
        ("train", ["image_00005.jpg", "1", "rose"], "row 2 of train is .*expected"),
        ("train", ["image_00005.jpg", 1], "row 2 of train is .*expected"),
        ("test", ["image_00005.jpg", 1, "lily"], "image_00005.jpg calls label 1 'lily', others 'r"),
        ("test", ["image_00002.jpg", 1, "rose"], "image_00002.jpg is listed twice"),
        ("test", ["image_00005.jpg", 9, "lily"], "no image has label 3, but others reach 9"),
    ],
)
def test_few_shot_mistakes(root: Path, split: str, row: list[Any], message: str) -> None:
    rows = few_shot_rows()
    rows[split].append(row)
    file = root / "mine.json"
    file.write_text(json.dumps(rows))
    with pytest.raises(DatasetError, match=message) as error:
        Flowers102Config(root=root, split="few_shot", few_shot_json=file).open()
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        (
            "setid",
            {**PARTS, "tstid": [8, 11]},
            "image 11; imagelabels.mat has labels of images 1 t",
        ),
        ("setid", {**PARTS, "tstid": [8, 0]}, "image 0;"),
        ("setid", {**PARTS, "tstid": [8, 2]}, "image 2 is listed twice"),
        ("setid", {"trnid": [1]}, "no variable 'valid'; found trnid"),
        ("imagelabels", {"labels": [0] * 10}, "label 0; expected 1 to 102"),
        ("imagelabels", {"labels": [103] * 10}, "label 103; expected 1 to 102"),
    ],
)
def test_mistakes(root: Path, name: str, values: dict[str, list[int]], message: str) -> None:
    file = root / "flowers-102" / f"{name}.mat"
    savemat(file, {key: np.asarray([value], np.uint8) for key, value in values.items()})
    with pytest.raises(DatasetError, match=message) as error:
        Flowers102Config(root=root).open()
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_are_not_there_or_broken(root: Path, tmp_path: Path) -> None:
    (tmp_path / "odd.json").write_text('{"train": 5, "test": []}')
    with pytest.raises(DatasetError, match="expected an object with lists train, val and test"):
        Flowers102Config(root=root, split="few_shot", few_shot_json=tmp_path / "odd.json").open()
    with pytest.raises(DatasetError, match=r"split_zhou_OxfordFlowers\.json: no such file"):
        Flowers102Config(root=root, split="few_shot").open()
    labels = root / "flowers-102" / "imagelabels.mat"
    labels.write_bytes(labels.read_bytes()[:150])
    with pytest.raises(DatasetError, match="not a readable MATLAB file"):
        Flowers102Config(root=root).open()
    labels.unlink()
    with pytest.raises(DatasetError, match=r"imagelabels\.mat: no such file"):
        Flowers102Config(root=root).open()
    with pytest.raises(DatasetError, match="no folder 'jpg'"):
        Flowers102Config(root=tmp_path / "elsewhere").open()
    with pytest.raises(ValidationError, match="few_shot_json has no meaning with split 'official'"):
        Flowers102Config(root=root, few_shot_json=tmp_path / "x.json")


def test_missing_images_stay_rows_but_not_all_may_miss(root: Path) -> None:
    (root / "flowers-102/jpg/image_00002.jpg").unlink()
    assert len(Flowers102Config(root=root).open()) == 10
    for file in (root / "flowers-102/jpg").iterdir():
        file.unlink()
    with pytest.raises(DatasetError, match=r"images exists, e\.g\. jpg/image_00002\.jpg"):
        Flowers102Config(root=root).open()
