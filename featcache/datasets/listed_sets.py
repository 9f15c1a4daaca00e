"""Known sets of image files with their published lists: Food-101, Pets, DTD, Cars and others.

Each reader takes the folder above or of the set (as torchvision lays it out) and gives paths, class
indices, splits and classes in the source's own order.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from featcache.datasets.array_sets import base_folder
from featcache.datasets.car_names import car_metadata
from featcache.datasets.folder import entries, images_below
from featcache.datasets.path_lists import read_lines, read_text
from featcache.datasets.readable_names import eurosat_metadata, sun397_metadata
from featcache.errors import DatasetError
from featcache.formats.image_names import IMAGE_SUFFIXES
from featcache.formats.mat_file import read_mat

_WHAT = "a list of the set; check dataset.root and dataset.name"
SUFFIXES = tuple(suffix for suffix in IMAGE_SUFFIXES if suffix != ".gif")
"""Without .gif, which torchvision does not read either."""


@dataclass(frozen=True)
class Variant:
    """Which of a set's published lists to read.

    Attributes:
        partition: number of the split where a set has several; None = the usual one.
        level: annotation level of Aircraft.
    """

    partition: int | None = None
    level: str = "variant"


@dataclass(frozen=True)
class ListedSet:
    """N rows and C classes.

    Attributes:
        base: folder that the paths start from.
        paths: N paths.
        labels: N class indices.
        splits: N split names; None = the set has no split of its own.
        classes: C rows in index order.
    """

    base: Path
    paths: list[str]
    labels: list[int]
    splits: list[str] | None
    classes: pd.DataFrame


FOLDERS: dict[str, tuple[str, ...]] = {
    "food101": ("food-101",),
    "oxford_pets": ("oxford-iiit-pet",),
    "dtd": ("dtd/dtd", "dtd"),
    "fgvc_aircraft": ("fgvc-aircraft-2013b/data", "data"),
    "stanford_cars": ("stanford_cars",),
    "eurosat": ("eurosat/2750", "2750"),
    "caltech101": ("caltech101/101_ObjectCategories", "101_ObjectCategories"),
    "sun397": ("SUN397",),
    "ucf101": ("UCF-101-midframes", "ucf101", "UCF-101"),
}
"""Where a set's own folder may lie below the given one; the first that is there counts."""

METADATA: dict[str, Callable[[Sequence[str]], dict[str, list[str]]]] = {
    "stanford_cars": car_metadata,
    "eurosat": eurosat_metadata,
    "sun397": sun397_metadata,
}
"""What class names alone say of a set's classes, as columns."""


def set_folder(root: Path, name: str) -> Path:
    """The set's own folder, from which its paths start: below `root`, or `root` itself."""
    return base_folder(root, *FOLDERS[name])


def class_table(name: str, classes: Sequence[str]) -> pd.DataFrame:
    """C rows in the given order, with the metadata that the names of this set carry."""
    names = list(classes)
    columns = METADATA[name](names) if name in METADATA else {"name": names}
    return pd.DataFrame(columns, dtype=object)


def read_food101(root: Path, variant: Variant) -> ListedSet:
    """`food-101/meta/train.json` {class: [class/number]}; class index = rank of the name."""
    base = set_folder(root, "food101")
    rows: list[tuple[str, str, str]] = []
    for split in ("train", "test"):
        file = base / "meta" / f"{split}.json"
        try:
            listed = json.loads(read_text(file, _WHAT))
        except json.JSONDecodeError as error:
            raise DatasetError(f"{file}: not JSON ({error})") from None
        if not isinstance(listed, dict) or not all(isinstance(p, list) for p in listed.values()):
            raise DatasetError(f"{file}: expected an object with a list of images a class")
        rows += [
            (split, name, f"images/{path}.jpg") for name, paths in listed.items() for path in paths
        ]
    return _ranked(base, rows)


def read_oxford_pets(root: Path, variant: Variant) -> ListedSet:
    """`oxford-iiit-pet/annotations/trainval.txt`: `Abyssinian_100 1 1 1`; index = number - 1."""
    base = set_folder(root, "oxford_pets")
    names: dict[int, str] = {}
    paths, labels, splits = [], [], []
    for split, file in (("train", "trainval.txt"), ("test", "test.txt")):
        for place, line in _lines(base / "annotations" / file):
            fields = line.split()
            if len(fields) != 4 or not fields[1].isdigit():
                raise DatasetError(f"{place}: found {line[:60]!r}; expected NAME_100 1 1 1")
            name = " ".join(part.title() for part in fields[0].rsplit("_", 1)[0].split("_"))
            label = int(fields[1]) - 1
            if names.setdefault(label, name) != name:
                raise DatasetError(f"{place}: class {label + 1} is {names[label]!r} before")
            paths.append(f"images/{fields[0]}.jpg")
            labels.append(label)
            splits.append(split)
    if sorted(names) != list(range(len(names))):
        raise DatasetError(f"{base / 'annotations'}: class numbers have gaps; expected 1, 2, 3, …")
    classes = pd.DataFrame({"name": [names[label] for label in sorted(names)]}, dtype=object)
    return ListedSet(base, paths, labels, splits, classes)


def read_dtd(root: Path, variant: Variant) -> ListedSet:
    """`dtd/dtd/labels/train1.txt`: `banded/banded_0002.jpg`; class index = rank of the name."""
    base = set_folder(root, "dtd")
    number = 1 if variant.partition is None else variant.partition
    rows = []
    for split in ("train", "val", "test"):
        for place, line in _lines(base / "labels" / f"{split}{number}.txt"):
            name, slash, _ = line.partition("/")
            if not slash:
                raise DatasetError(f"{place}: found {line[:60]!r}; expected class/image.jpg")
            rows.append((split, name, f"images/{line}"))
    return _ranked(base, rows)


def read_fgvc_aircraft(root: Path, variant: Variant) -> ListedSet:
    """`fgvc-aircraft-2013b/data/images_variant_train.txt`; index = line of variants.txt."""
    base = set_folder(root, "fgvc_aircraft")
    plural = {"variant": "variants", "family": "families", "manufacturer": "manufacturers"}
    names = [line for _, line in _lines(base / f"{plural[variant.level]}.txt")]
    index = {name: number for number, name in enumerate(names)}
    paths, labels, splits = [], [], []
    for split in ("train", "val", "test"):
        for place, line in _lines(base / f"images_{variant.level}_{split}.txt"):
            image, _, name = line.partition(" ")
            if name not in index:
                raise DatasetError(f"{place}: {name!r} is not in {plural[variant.level]}.txt")
            paths.append(f"images/{image}.jpg")
            labels.append(index[name])
            splits.append(split)
    return ListedSet(base, paths, labels, splits, pd.DataFrame({"name": names}, dtype=object))


def read_stanford_cars(root: Path, variant: Variant) -> ListedSet:
    """`stanford_cars/devkit/cars_meta.mat`, `cars_train_annos.mat`; index = class - 1."""
    base = set_folder(root, "stanford_cars")
    (names,) = read_mat(base / "devkit/cars_meta.mat", ["class_names"])
    names = [str(name) for name in np.atleast_1d(names)]
    paths, labels, splits = [], [], []
    for split in ("train", "test"):
        usual = base / "devkit" / f"cars_{split}_annos.mat"
        file = base / "cars_test_annos_withlabels.mat" if split == "test" else usual
        (found,) = read_mat(file, ["annotations"])
        fields = found.dtype.names or ()
        if not {"fname", "class"} <= set(fields):
            raise DatasetError(
                f"{file}: annotations have {', '.join(fields)}; expected fname, class"
            )
        for row in np.atleast_1d(found):
            paths.append(f"cars_{split}/{row['fname']}")
            labels.append(int(row["class"]) - 1)
            splits.append(split)
    if labels and not 0 <= min(labels) <= max(labels) < len(names):
        raise DatasetError(
            f"{base}: classes {min(labels) + 1} to {max(labels) + 1}, {len(names)} names"
        )
    return ListedSet(base, paths, labels, splits, class_table("stanford_cars", names))


def read_eurosat(root: Path, variant: Variant) -> ListedSet:
    """`eurosat/2750/AnnualCrop/….jpg`; class index = rank of the name; no split of its own."""
    found = _tree(set_folder(root, "eurosat"))
    return replace(found, classes=class_table("eurosat", found.classes["name"].tolist()))


def read_caltech101(root: Path, variant: Variant) -> ListedSet:
    """`caltech101/101_ObjectCategories/…` without BACKGROUND_Google; no split of its own."""
    return _tree(set_folder(root, "caltech101"), without=("BACKGROUND_Google",))


def read_sun397(root: Path, variant: Variant) -> ListedSet:
    """`SUN397/ClassName.txt`: `/a/abbey`; index = its line; partitions Training_01.txt if asked."""
    base = set_folder(root, "sun397")
    folders = [line.strip("/") for _, line in _lines(base / "ClassName.txt")]
    names = [folder.partition("/")[2] for folder in folders]
    index = {folder: number for number, folder in enumerate(folders)}
    classes = class_table("sun397", names)
    paths, labels, splits = [], [], []
    if variant.partition is None:
        for folder in folders:
            found = sorted(images_below(base, folder, SUFFIXES)) if (base / folder).is_dir() else []
            own = [path for path in found if path.rpartition("/")[0] == folder]  # not a sub-class's
            paths += own
            labels += [index[folder]] * len(own)
        return ListedSet(base, paths, labels, None, classes)
    for split, word in (("train", "Training"), ("test", "Testing")):
        name = f"{word}_{variant.partition:02d}.txt"
        places = (base / name, base / "Partitions" / name, root / "Partitions" / name, root / name)
        file = next((place for place in places if place.is_file()), places[0])
        for place, line in _lines(file):
            folder = line.strip("/").rpartition("/")[0]
            if folder not in index:
                raise DatasetError(f"{place}: {folder!r} is not in ClassName.txt")
            paths.append(line.strip("/"))
            labels.append(index[folder])
            splits.append(split)
    return ListedSet(base, paths, labels, splits, classes)


def read_ucf101(root: Path, variant: Variant) -> ListedSet:
    """One frame a video: `UCF-101-midframes/Apply_Eye_Makeup/v_….jpg`, `ucfTrainTestlist/…`.

    Class index = number in classInd.txt - 1; a frame has its video's name. Class folders are named
    as in the lists (ApplyEyeMakeup) or with underscores between the words.
    """
    base = set_folder(root, "ucf101")
    lists = base_folder(root, "ucfTrainTestlist", "UCF-101-midframes/ucfTrainTestlist")
    number = 1 if variant.partition is None else variant.partition
    names: list[str] = []
    for place, line in _lines(lists / "classInd.txt"):
        count, _, name = line.partition(" ")
        if count != str(len(names) + 1) or not name:
            raise DatasetError(f"{place}: found {line[:60]!r}; expected {len(names) + 1} ClassName")
        names.append(name)
    index = {name.lower(): number for number, name in enumerate(names)}
    folders = {folder.replace("_", "").lower(): folder for folder in entries(base)[0]}
    paths, labels, splits = [], [], []
    for split in ("train", "test"):
        for place, line in _lines(lists / f"{split}list{number:02d}.txt"):
            name, _, video = line.split(" ")[0].partition("/")
            if name.lower() not in index:
                raise DatasetError(f"{place}: {name!r} is not in classInd.txt")
            folder = folders.get(name.lower(), name)
            paths.append(f"{folder}/{video.removesuffix('.avi')}.jpg")
            labels.append(index[name.lower()])
            splits.append(split)
    words = [_spaced(name) for name in names]
    return ListedSet(base, paths, labels, splits, pd.DataFrame({"name": words}, dtype=object))


def _spaced(name: str) -> str:
    """ApplyEyeMakeup as "Apply Eye Makeup", and YoYo as "Yo Yo"; TaiChi stays two words."""
    starts = [
        i for i in range(len(name)) if name[i].isupper() and (i == 0 or name[i - 1].islower())
    ]
    return " ".join(name[a:b] for a, b in zip(starts, [*starts[1:], None], strict=True)) or name


def _tree(base: Path, without: tuple[str, ...] = ()) -> ListedSet:
    """One directory a class; class index = rank of its name."""
    if not base.is_dir():
        raise DatasetError(f"{base}: no such folder; expected one directory per class")
    rows = [
        ("", name, path)
        for name in entries(base)[0]
        if name not in without
        for path in sorted(images_below(base, name, SUFFIXES))
    ]
    found = _ranked(base, rows)
    return ListedSet(base, found.paths, found.labels, None, found.classes)


def _ranked(base: Path, rows: list[tuple[str, str, str]]) -> ListedSet:
    """(split, class name, path) rows with the classes in name order."""
    names = sorted({name for _, name, _ in rows})
    index = {name: number for number, name in enumerate(names)}
    return ListedSet(
        base,
        [path for _, _, path in rows],
        [index[name] for _, name, _ in rows],
        [split for split, _, _ in rows],
        pd.DataFrame({"name": names}, dtype=object),
    )


def _lines(file: Path) -> Iterator[tuple[str, str]]:
    """(place, text) of the lines with something on them, comments left out."""
    for line in read_lines(file, _WHAT):
        if not line.text.startswith("#"):
            yield line.place, line.text


LISTED_SETS: dict[str, Callable[[Path, Variant], ListedSet]] = {
    "food101": read_food101,
    "oxford_pets": read_oxford_pets,
    "dtd": read_dtd,
    "fgvc_aircraft": read_fgvc_aircraft,
    "stanford_cars": read_stanford_cars,
    "eurosat": read_eurosat,
    "caltech101": read_caltech101,
    "sun397": read_sun397,
    "ucf101": read_ucf101,
}
"""Readers by name."""

IMAGE_FOLDERS: dict[str, str] = {
    "food101": "images",
    "oxford_pets": "images",
    "dtd": "images",
    "fgvc_aircraft": "images",
}
"""Folder, below the set's own, that the paths of a few-shot split file start from; others: none."""
