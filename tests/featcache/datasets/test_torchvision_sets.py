"""Benchmark sets, made small: rows, pixels and class order are those of torchvision."""

import gzip
import json
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torchvision.datasets as tv
from PIL import Image
from pydantic import ValidationError
from scipy.io import savemat

from featcache.datasets.car_names import car_metadata
from featcache.datasets.listed_sets import FOLDERS, IMAGE_FOLDERS
from featcache.datasets.torchvision_sets import TorchvisionConfig
from featcache.errors import DatasetError, UserError
from featcache.manifest import Manifest
from featcache.prompts import TEMPLATES, choose, format_prompts

RANDOM = np.random.default_rng(0)


def touch(root: Path, *paths: str) -> None:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()


def write(root: Path, path: str, text: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)


def config(name: str, root: Path, **options: Any) -> TorchvisionConfig:
    return TorchvisionConfig.model_validate({"name": name, "root": root, **options})


def rows_of(manifest: Manifest, *splits: str) -> list[tuple[str, int]]:
    """(absolute path, class index) of some splits, sorted."""
    found = zip(manifest.splits, manifest.paths, manifest.label_values.tolist(), strict=True)
    root = manifest.root
    return sorted((str(root / path), label) for split, path, label in found if split in splits)


def pairs(files: Any, labels: Any) -> list[tuple[str, int]]:
    return sorted((str(file), int(label)) for file, label in zip(files, labels, strict=True))


# --- sets of files -----------------------------------------------------------------------------


def test_food101(tmp_path: Path) -> None:
    for split, number in (("train", 10), ("test", 3)):
        listed = {
            name: [f"{name}/{split}{i}" for i in range(number)] for name in ("ramen", "apple_pie")
        }
        write(tmp_path, f"food-101/meta/{split}.json", json.dumps(listed))
        touch(tmp_path, *(f"food-101/images/{p}.jpg" for paths in listed.values() for p in paths))
    manifest = config("food101", tmp_path).open()
    for split, ours in (("train", ("train", "val")), ("test", ("test",))):
        theirs = tv.Food101(tmp_path, split=split)
        assert rows_of(manifest, *ours) == pairs(theirs._image_files, theirs._labels)
        assert manifest.classes["name"].tolist() == theirs.classes
    assert Counter(manifest.splits) == {"train": 18, "val": 2, "test": 6}
    none = config("food101", tmp_path / "food-101", val_fraction=0).open()
    assert Counter(none.splits) == {"train": 20, "test": 6}
    assert choose(manifest.kind, ["name"]) == "food101"


def test_oxford_pets(tmp_path: Path) -> None:
    base = tmp_path / "oxford-iiit-pet"
    kinds = [("pug", 2), ("Abyssinian", 1), ("great_pyrenees", 3)]
    for file, numbers in (("trainval", range(10)), ("test", range(10, 14))):
        lines = [f"{name}_{i} {label} 1 {i}" for i in numbers for name, label in kinds]
        write(base, f"annotations/{file}.txt", "\n".join(lines))
        touch(base, *(f"images/{line.split()[0]}.jpg" for line in lines))
    manifest = config("oxford_pets", tmp_path).open()
    for split, ours in (("trainval", ("train", "val")), ("test", ("test",))):
        theirs = tv.OxfordIIITPet(tmp_path, split=split)
        assert rows_of(manifest, *ours) == pairs(theirs._images, theirs._labels)
        assert manifest.classes["name"].tolist() == theirs.classes
    write(base, "annotations/test.txt", "# header\nAbyssinian_1 2 1 1\n")
    with pytest.raises(DatasetError, match=r"test\.txt line 2: class 2 is 'Pug' before"):
        config("oxford_pets", tmp_path).open()


@pytest.mark.parametrize("partition", [None, 4])
def test_dtd(tmp_path: Path, partition: int | None) -> None:
    base = tmp_path / "dtd" / "dtd"
    for number in (1, 4):
        for split in ("train", "val", "test"):
            lines = [f"{name}/{name}_{split}{number}.jpg" for name in ("zigzagged", "banded")]
            write(base, f"labels/{split}{number}.txt", "\n".join(lines) + "\n")
            touch(base, *(f"images/{line}" for line in lines))
    manifest = config("dtd", tmp_path, partition=partition).open()
    for split in ("train", "val", "test"):
        theirs = tv.DTD(tmp_path, split=split, partition=partition or 1)
        assert rows_of(manifest, split) == pairs(theirs._image_files, theirs._labels)
        assert manifest.classes["name"].tolist() == theirs.classes


@pytest.mark.parametrize("level", ["variant", "family", "manufacturer"])
def test_fgvc_aircraft(tmp_path: Path, level: str) -> None:
    base = tmp_path / "fgvc-aircraft-2013b" / "data"
    names = ["F-16A/B", "707 320", "A340-200"]  # the file's order, which is no alphabetical one
    plural = {"variant": "variants", "family": "families", "manufacturer": "manufacturers"}[level]
    write(base, f"{plural}.txt", "\r\n".join(names) + "\r\n")
    for start, split in enumerate(("train", "val", "test")):
        lines = [f"{1000 * start + i:07d} {name}" for i, name in enumerate(names)]
        write(base, f"images_{level}_{split}.txt", "\n".join(lines))
        touch(base, *(f"images/{line.split()[0]}.jpg" for line in lines))
    manifest = config("fgvc_aircraft", tmp_path, level=level).open()
    for split in ("train", "val", "test"):
        theirs = tv.FGVCAircraft(tmp_path, split=split, annotation_level=level)
        assert rows_of(manifest, split) == pairs(theirs._image_files, theirs._labels)
        assert manifest.classes["name"].tolist() == theirs.classes


def test_stanford_cars(tmp_path: Path) -> None:
    base = tmp_path / "stanford_cars"
    names = ["AM General Hummer SUV 2000", "Audi S4 Sedan 2012", "Ford F-150 Regular Cab 2007"]
    kind = [("class", "O"), ("fname", "O")]
    rows = [(1 + i % 3, f"{i:05d}.jpg") for i in range(12)]
    (base / "devkit").mkdir(parents=True)
    savemat(base / "devkit/cars_meta.mat", {"class_names": np.asarray(names, object)})
    for split, file in (
        ("train", "devkit/cars_train_annos.mat"),
        ("test", "cars_test_annos_withlabels.mat"),
    ):
        part = rows[:9] if split == "train" else rows[9:]
        savemat(base / file, {"annotations": np.asarray(part, kind)})
        touch(base, *(f"cars_{split}/{name}" for _, name in part))
    manifest = config("stanford_cars", tmp_path).open()
    for split, ours in (("train", ("train", "val")), ("test", ("test",))):
        theirs = tv.StanfordCars(tmp_path, split=split)
        assert rows_of(manifest, *ours) == pairs(*zip(*theirs._samples, strict=True))
        assert manifest.classes["name"].tolist() == theirs.classes
    assert choose(manifest.kind, list(manifest.classes.columns)) == "vehicles"
    texts = format_prompts(manifest.classes, ["{type} made by {make}", "{category} {model} {year}"])
    assert texts[0] == ["SUV made by AM General", "Sedan made by Audi", "Regular Cab made by Ford"]
    assert texts[1] == ["SUV Hummer 2000", "sedan S4 2012", "pickup F-150 2007"]


def test_car_names_that_say_less() -> None:
    found = car_metadata(["Acura Integra Type R 2001", "smart fortwo Convertible 2012", "Spyker"])
    assert found["make"] == ["Acura", "smart", "Spyker"]
    assert found["model"] == ["Integra Type R", "fortwo", ""]
    assert found["type"] == ["", "Convertible", ""]
    assert found["year"] == ["2001", "2012", ""]
    assert found["full_name"][2] == "Spyker"


def test_eurosat(tmp_path: Path) -> None:
    names = [f"{name}/{name}_{i}.jpg" for name in ("River", "AnnualCrop") for i in range(20)]
    touch(tmp_path / "eurosat" / "2750", *names)
    manifest = config("eurosat", tmp_path, test_fraction=0.2).open()
    theirs = tv.EuroSAT(str(tmp_path))
    assert rows_of(manifest, "train", "val", "test") == pairs(*zip(*theirs.samples, strict=True))
    assert manifest.classes["name"].tolist() == theirs.classes
    assert Counter(manifest.splits) == {"train": 28, "val": 4, "test": 8}
    prompts = format_prompts(manifest.classes, TEMPLATES[choose("eurosat", ["name"])])
    assert prompts[0] == [
        "a centered satellite photo of annual crop land.",
        "a centered satellite photo of river.",
    ]
    others = pd.DataFrame({"name": ["Marsh"]})  # the set's templates over another class table
    assert format_prompts(others, TEMPLATES["eurosat"])[1] == [
        "a centered satellite photo of a Marsh."
    ]


def test_caltech101(tmp_path: Path) -> None:
    base = tmp_path / "caltech101" / "101_ObjectCategories"
    kinds = ("accordion", "BACKGROUND_Google", "Faces_easy", "Faces")
    touch(base, *(f"{name}/image_{i:04d}.jpg" for name in kinds for i in range(1, 5)))
    manifest = config("caltech101", tmp_path).open()
    theirs = tv.Caltech101(tmp_path)
    assert manifest.classes["name"].tolist() == theirs.categories
    wanted = [
        (base / theirs.categories[label] / f"image_{number:04d}.jpg", label)
        for number, label in zip(theirs.index, theirs.y, strict=True)
    ]
    assert rows_of(manifest, "train", "val", "test") == pairs(*zip(*wanted, strict=True))


def test_sun397(tmp_path: Path) -> None:
    base = tmp_path / "SUN397"
    folders = ["z/zoo", "a/apartment/outdoor", "a/apartment", "a/abbey"]
    write(base, "ClassName.txt", "".join(f"/{folder}\n" for folder in folders))
    names = [f"{folder}/sun_{i}.jpg" for folder in folders for i in range(10)]
    touch(base, *names)
    manifest = config("sun397", tmp_path).open()
    theirs = tv.SUN397(tmp_path)
    found = rows_of(manifest, "train", "val", "test")
    assert found == pairs(theirs._image_files, theirs._labels)
    assert manifest.classes["name"].tolist() == theirs.classes
    write(base, "Partitions/Training_02.txt", "".join(f"/{name}\n" for name in names[::2]))
    write(base, "Partitions/Testing_02.txt", "".join(f"/{name}\n" for name in names[1::2]))
    official = config("sun397", tmp_path, partition=2, val_fraction=0).open()
    assert rows_of(official, "test") == sorted(row for row in found if row[0][-5] in "13579")
    for classes in (manifest.classes, official.classes):
        assert format_prompts(classes, TEMPLATES["sun397"])[0] == [
            "a photo of a zoo.",
            "a photo of a apartment outdoor.",
            "a photo of a apartment.",
            "a photo of a abbey.",
        ]


def test_ucf101(tmp_path: Path) -> None:
    write(
        tmp_path,
        "ucfTrainTestlist/classInd.txt",
        "1 ApplyEyeMakeup\r\n2 YoYo\r\n3 HandstandPushups",
    )
    train = "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1\nYoYo/v_YoYo_g09_c01.avi 2\n"
    write(tmp_path, "ucfTrainTestlist/trainlist01.txt", train)
    write(
        tmp_path,
        "ucfTrainTestlist/testlist01.txt",
        "HandStandPushups/v_HandStandPushups_g01_c01.avi",
    )
    touch(tmp_path / "UCF-101-midframes", "Apply_Eye_Makeup/v_ApplyEyeMakeup_g08_c01.jpg")
    touch(tmp_path / "UCF-101-midframes", "YoYo/v_YoYo_g09_c01.jpg")
    touch(tmp_path / "UCF-101-midframes", "Handstand_Pushups/v_HandStandPushups_g01_c01.jpg")
    manifest = config("ucf101", tmp_path).open()
    assert manifest.classes["name"].tolist() == ["Apply Eye Makeup", "Yo Yo", "Handstand Pushups"]
    assert manifest.label_values.tolist() == [0, 1, 2]
    assert manifest.splits == ["train", "train", "test"]
    assert all((manifest.root / path).is_file() for path in manifest.paths)


def test_kikibouba_is_a_folder_of_its_own_kind(tmp_path: Path) -> None:
    touch(tmp_path, "train/kiki/1.jpg", "train/bouba/2.jpg", "test/kiki/3.jpg")
    manifest = config("kikibouba", tmp_path).open()
    assert (manifest.kind, manifest.identity.kind) == ("kikibouba", "kikibouba")
    assert manifest.classes["name"].tolist() == ["bouba", "kiki"]


def test_few_shot_split_is_another_kind(tmp_path: Path) -> None:
    base = tmp_path / "dtd" / "dtd"
    for split in ("train", "test"):  # and none of the official lists
        touch(base, f"images/banded/{split}.jpg")
    rows = {
        "train": [["banded/test.jpg", 0, "banded"]],
        "test": [["banded/train.jpg", 0, "banded"]],
    }
    write(tmp_path, "split_zhou.json", json.dumps(rows))
    manifest = config("dtd", tmp_path, few_shot_json=tmp_path / "split_zhou.json").open()
    assert manifest.identity.kind == "dtd_few_shot"
    assert list(zip(manifest.splits, manifest.paths, strict=True)) == [
        ("train", "images/banded/test.jpg"),
        ("test", "images/banded/train.jpg"),
    ]
    assert choose(manifest.kind, ["name"]) == "dtd"


def test_few_shot_cars_know_make_and_model(tmp_path: Path) -> None:
    names = ["2000 AM General Hummer SUV", "2007 Ford F-150 Regular Cab"]
    rows = {
        split: [[f"cars_{split}/{i}.jpg", i, name] for i, name in enumerate(names)]
        for split in ("train", "test")
    }
    for split in rows:
        touch(tmp_path / "stanford_cars", *(path for path, _, _ in rows[split]))
    write(tmp_path, "split.json", json.dumps(rows))
    manifest = config("stanford_cars", tmp_path, few_shot_json=tmp_path / "split.json").open()
    assert all((manifest.root / path).is_file() for path in manifest.paths)
    assert manifest.classes["name"].tolist() == names
    assert choose(manifest.kind, list(manifest.classes.columns)) == "vehicles"
    texts = format_prompts(manifest.classes, ["{type} made by {make}", "{model} of {year}"])
    assert texts[0] == ["SUV made by AM General", "Regular Cab made by Ford"]
    assert texts[1] == ["Hummer of 2000", "F-150 of 2007"]


@pytest.mark.parametrize("name", sorted(FOLDERS))
def test_a_few_shot_split_of_any_set_reads_no_official_list(tmp_path: Path, name: str) -> None:
    path = f"{IMAGE_FOLDERS[name]}/a.jpg" if name in IMAGE_FOLDERS else "a.jpg"
    touch(tmp_path / FOLDERS[name][0], path)
    write(tmp_path, "split.json", json.dumps({"train": [["a.jpg", 0, "Forest"]], "test": []}))
    manifest = config(name, tmp_path, few_shot_json=tmp_path / "split.json").open()
    assert (manifest.kind, manifest.paths) == (f"{name}_few_shot", [path])
    assert (manifest.root / path).is_file()


# --- sets of arrays ----------------------------------------------------------------------------


def pixels_of(manifest: Manifest, split: str) -> np.ndarray:
    found = []
    for name, path in zip(manifest.splits, manifest.paths, strict=True):
        if name == split:
            with Image.open(manifest.root / path) as image:
                found.append((path, np.asarray(image)))
    return np.stack([pixels for _, pixels in sorted(found, key=lambda one: one[0])])


def labels_of(manifest: Manifest, split: str) -> list[int]:
    return [label for _, label in rows_of(manifest, split)]


def idx(array: np.ndarray) -> bytes:
    head = bytes([0, 0, 8, array.ndim]) + np.asarray(array.shape, ">u4").tobytes()
    return head + array.tobytes()


@pytest.mark.parametrize(
    ("name", "theirs"),
    [("mnist", tv.MNIST), ("fashion_mnist", tv.FashionMNIST), ("kmnist", tv.KMNIST)],
)
def test_mnist_and_its_kin(tmp_path: Path, name: str, theirs: Any) -> None:
    raw = tmp_path / theirs.__name__ / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 30), ("t10k", 10)):
        images = RANDOM.integers(0, 256, (count, 28, 28), np.uint8)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(idx(images))
        labels = (np.arange(count) % 10).astype(np.uint8)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(idx(labels))
    manifest = config(name, tmp_path, val_fraction=0).open()
    for split, train in (("train", True), ("test", False)):
        known = theirs(tmp_path, train=train)
        np.testing.assert_array_equal(pixels_of(manifest, split), known.data.numpy())
        assert labels_of(manifest, split) == known.targets.tolist()
    assert manifest.num_classes == len(known.classes) == 10
    names = [one.removeprefix(f"{i} - ") for i, one in enumerate(known.classes)]
    assert manifest.classes["word" if name == "mnist" else "name"].tolist() == names
    for file in raw.iterdir():
        (raw / f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
        file.unlink()
    assert config(name, tmp_path, val_fraction=0).open().identity == manifest.identity


def make_cifar(root: Path, kind: int, binary: bool) -> None:
    """CIFAR's files with few rows."""
    names = {10: ["cat", "dog", "frog"], 100: ["maple_tree", "oak_tree", "tiger", "wolf"]}[kind]
    coarse = np.asarray([1, 1, 0, 0])  # superclass of each of the 100's classes
    parts = {"train": 6, "test": 4}
    if kind == 10:
        parts = {**{f"data_batch_{n}": 6 for n in range(1, 6)}, "test_batch": 4}
    suffix = {(10, 0): "10-batches-py", (10, 1): "10-batches-bin"} | {
        (100, 0): "100-python",
        (100, 1): "100-binary",
    }
    base = root / f"cifar-{suffix[kind, binary]}"
    base.mkdir(parents=True)
    random = np.random.default_rng(kind)
    for part, count in parts.items():
        data = random.integers(0, 256, (count, 3072), np.uint8)
        labels = random.integers(0, len(names), count)
        if binary:
            columns = [labels[:, None].astype(np.uint8), data]
            if kind == 100:
                columns.insert(0, coarse[labels][:, None].astype(np.uint8))
            (base / f"{part}.bin").write_bytes(np.concatenate(columns, 1).tobytes())
        else:
            both = {"fine_labels": labels.tolist(), "coarse_labels": coarse[labels].tolist()}
            fields = {"labels": labels.tolist()} if kind == 10 else both
            (base / part).write_bytes(pickle.dumps({"data": data, **fields}, protocol=2))
    if binary and kind == 10:
        (base / "batches.meta.txt").write_text("\n".join(names) + "\n\n")
    elif binary:
        (base / "fine_label_names.txt").write_text("\n".join(names))
        (base / "coarse_label_names.txt").write_text("carnivores\ntrees\n")
    elif kind == 10:
        (base / "batches.meta").write_bytes(pickle.dumps({"label_names": names}, protocol=2))
    else:
        meta = {"fine_label_names": names, "coarse_label_names": ["carnivores", "trees"]}
        (base / "meta").write_bytes(pickle.dumps(meta, protocol=2))


@pytest.mark.parametrize(("name", "theirs"), [("cifar10", tv.CIFAR10), ("cifar100", tv.CIFAR100)])
def test_cifar(tmp_path: Path, name: str, theirs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tv.cifar, "check_integrity", lambda *_: True)
    make_cifar(tmp_path / "py", 100 if theirs is tv.CIFAR100 else 10, binary=False)
    manifest = config(name, tmp_path / "py", val_fraction=0).open()
    for split, train in (("train", True), ("test", False)):
        known = theirs(tmp_path / "py", train=train)
        np.testing.assert_array_equal(pixels_of(manifest, split), known.data)
        assert labels_of(manifest, split) == known.targets
    assert manifest.classes["name"].tolist() == known.classes
    if name == "cifar100":
        coarse = ["trees", "trees", "carnivores", "carnivores"]
        assert manifest.classes["coarse"].tolist() == coarse
        assert format_prompts(manifest.classes, ["a {name}."])[0][0] == "a maple tree."
    # The binary version is the same data set, down to the identity.
    make_cifar(tmp_path / "bin", 100 if theirs is tv.CIFAR100 else 10, binary=True)
    binary = config(name, tmp_path / "bin", val_fraction=0).open()
    assert binary.identity == manifest.identity


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
            return print, ("no",)

    make_cifar(tmp_path, 10, binary=False)
    (tmp_path / "cifar-10-batches-py/data_batch_3").write_bytes(pickle.dumps({"data": Evil()}))
    with pytest.raises(UserError, match=r"data_batch_3: it wants builtins\.print") as error:
        config("cifar10", tmp_path).open()
    assert "\n" not in str(error.value)


def test_svhn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tv.SVHN, "_check_integrity", lambda self: True)
    for split, count in (("train", 20), ("test", 11)):
        images = RANDOM.integers(0, 256, (32, 32, 3, count), np.uint8)
        labels = (1 + np.arange(count) % 10).astype(np.uint8)[:, None]
        savemat(tmp_path / f"{split}_32x32.mat", {"X": images, "y": labels})
    manifest = config("svhn", tmp_path, val_fraction=0).open()
    for split in ("train", "test"):
        known = tv.SVHN(tmp_path, split=split)
        np.testing.assert_array_equal(pixels_of(manifest, split), known.data.transpose(0, 2, 3, 1))
        assert labels_of(manifest, split) == known.labels.tolist()
    assert manifest.classes["name"].tolist()[3] == "3"


def test_stl10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tv.STL10, "_check_integrity", lambda self: True)
    base = tmp_path / "stl10_binary"
    base.mkdir()
    for split, count in (("train", 6), ("test", 4)):
        RANDOM.integers(0, 256, (count, 3, 96, 96), np.uint8).tofile(base / f"{split}_X.bin")
        (1 + np.arange(count) % 3).astype(np.uint8).tofile(base / f"{split}_y.bin")
    (base / "class_names.txt").write_text("airplane\nbird\ncar\n")
    manifest = config("stl10", tmp_path, val_fraction=0).open()
    for split in ("train", "test"):
        known = tv.STL10(tmp_path, split=split)
        np.testing.assert_array_equal(pixels_of(manifest, split), known.data.transpose(0, 2, 3, 1))
        assert labels_of(manifest, split) == known.labels.tolist()
    assert manifest.classes["name"].tolist() == known.classes


def test_images_are_written_once_and_never_taken_for_others(tmp_path: Path) -> None:
    make_cifar(tmp_path / "a", 10, binary=True)
    images = tmp_path / "images"
    manifest = config("cifar10", tmp_path / "a", images=images).open()
    assert manifest.root == images
    stamps = {file: file.stat().st_mtime_ns for file in images.rglob("*.png")}
    assert len(stamps) == 34
    again = config("cifar10", tmp_path / "a", images=images).open()
    assert again.identity == manifest.identity
    assert {file: file.stat().st_mtime_ns for file in images.rglob("*.png")} == stamps
    batch = tmp_path / "a" / "cifar-10-batches-bin" / "test_batch.bin"
    data = bytearray(batch.read_bytes())
    data[5] ^= 1  # one pixel
    batch.write_bytes(bytes(data))
    changed = config("cifar10", tmp_path / "a", images=images).open()
    assert changed.identity.rows != manifest.identity.rows
    assert len(list(images.iterdir())) == 2, "and nothing half written"


def test_validation_is_carved_out_of_train_alone(tmp_path: Path) -> None:
    make_cifar(tmp_path, 10, binary=True)
    whole = config("cifar10", tmp_path, val_fraction=0).open()
    carved = config("cifar10", tmp_path, val_fraction=0.3).open()
    assert rows_of(carved, "test") == rows_of(whole, "test")
    assert rows_of(carved, "train", "val") == rows_of(whole, "train")
    assert 6 <= carved.splits.count("val") <= 12
    assert set(labels_of(carved, "val")) == {0, 1, 2}
    other = config("cifar10", tmp_path, val_fraction=0.3, seed=1).open()
    assert rows_of(other, "val") != rows_of(carved, "val")


# --- mistakes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("food101", "meta/train.json"),
        ("oxford_pets", "annotations/trainval.txt"),
        ("dtd", "labels/train1.txt"),
        ("fgvc_aircraft", "variants.txt"),
        ("stanford_cars", "devkit/cars_meta.mat"),
        ("sun397", "ClassName.txt"),
        ("ucf101", "classInd.txt"),
        ("mnist", "train-images-idx3-ubyte"),
        ("cifar10", "batches.meta.txt"),
        ("cifar100", "fine_label_names.txt"),
        ("svhn", "train_32x32.mat"),
        ("stl10", "train_X.bin"),
    ],
)
def test_what_is_missing_is_named(tmp_path: Path, name: str, file: str) -> None:
    with pytest.raises(DatasetError, match="no such file") as error:
        config(name, tmp_path).open()
    assert str(tmp_path / file) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["eurosat", "caltech101"])
def test_an_empty_folder_has_no_images(tmp_path: Path, name: str) -> None:
    with pytest.raises(DatasetError, match=f"found no images of {name}"):
        config(name, tmp_path).open()
    with pytest.raises(DatasetError, match="no such folder"):
        config(name, tmp_path / "none").open()


def test_damaged_arrays(tmp_path: Path) -> None:
    make_cifar(tmp_path, 10, binary=True)
    batch = tmp_path / "cifar-10-batches-bin/data_batch_2.bin"
    batch.write_bytes(batch.read_bytes()[:-1])
    with pytest.raises(
        DatasetError, match=r"data_batch_2\.bin: 18437 bytes are no records of 3073"
    ):
        config("cifar10", tmp_path).open()
    batch.write_bytes(bytes([9]) + bytes(3072))
    with pytest.raises(DatasetError, match="train has label 9; expected 0 to 2"):
        config("cifar10", tmp_path).open()
    raw = tmp_path / "MNIST/raw"
    raw.mkdir(parents=True)
    (raw / "train-images-idx3-ubyte").write_bytes(idx(np.zeros((2, 28, 28), np.uint8))[:-5])
    with pytest.raises(DatasetError, match="1563 bytes of 2 x 28 x 28; is it a whole download"):
        config("mnist", tmp_path).open()
    (raw / "train-images-idx3-ubyte").write_bytes(b"<html>")
    with pytest.raises(DatasetError, match="expected IDX data of bytes in 3 dimensions"):
        config("mnist", tmp_path).open()


def test_files_of_another_content(tmp_path: Path) -> None:
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta/train.json").write_text('{"apple_pie": 5}')
    with pytest.raises(DatasetError, match="expected an object with a list of images a class"):
        config("food101", tmp_path).open()
    (tmp_path / "devkit").mkdir()
    savemat(tmp_path / "devkit/cars_meta.mat", {"class_names": np.asarray(["Audi S4"], object)})
    nothing = {"annotations": np.zeros(0, [("class", "O"), ("fname", "O")])}
    savemat(tmp_path / "devkit/cars_train_annos.mat", nothing)
    savemat(tmp_path / "cars_test_annos_withlabels.mat", nothing)
    with pytest.raises(DatasetError, match="found no images of stanford_cars"):
        config("stanford_cars", tmp_path).open()
    python = tmp_path / "cifar-10-batches-py"
    python.mkdir()
    files = {"batches.meta": {"label_names": ["a"]}}
    names = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    files |= {name: {"data": np.zeros((1, 3072), np.uint8), "labels": ["a"]} for name in names}
    for name, content in files.items():
        (python / name).write_bytes(pickle.dumps(content))
    with pytest.raises(DatasetError, match="data_batch_1: 'labels' is no array of numbers"):
        config("cifar10", tmp_path).open()


def test_a_wrong_root_is_noticed(tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        write(tmp_path, f"labels/{split}1.txt", f"banded/{split}.jpg\n")
    with pytest.raises(DatasetError, match=r"none of the first 3 images exists, e\.g\. images/b"):
        config("dtd", tmp_path).open()


def test_options_that_mean_nothing_for_a_set(tmp_path: Path) -> None:
    for options in ({"partition": 2}, {"level": "family"}, {"few_shot_json": "x.json"}):
        with pytest.raises(ValidationError, match="has no meaning for name 'mnist'"):
            config("mnist", tmp_path, **options)
