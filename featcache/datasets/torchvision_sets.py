"""Known benchmark sets from local copies in torchvision's layout; nothing is downloaded."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from featcache.datasets.array_sets import ARRAY_SETS
from featcache.datasets.base import require_some_image
from featcache.datasets.folder import FolderConfig
from featcache.datasets.label_lists import one_or_none
from featcache.datasets.listed_sets import (
    IMAGE_FOLDERS,
    LISTED_SETS,
    ListedSet,
    Variant,
    class_table,
    set_folder,
)
from featcache.datasets.png_files import write_png
from featcache.datasets.split_json import SUFFIX, read_split_json
from featcache.datasets.splitting import SplitConfig, carve
from featcache.errors import DatasetError
from featcache.manifest import Manifest

SetName = Literal[
    "caltech101",
    "cifar10",
    "cifar100",
    "dtd",
    "eurosat",
    "fashion_mnist",
    "fgvc_aircraft",
    "food101",
    "kikibouba",
    "kmnist",
    "mnist",
    "oxford_pets",
    "stanford_cars",
    "stl10",
    "sun397",
    "svhn",
    "ucf101",
]


class TorchvisionConfig(SplitConfig):
    """A benchmark set by its name, with its own class order and test split."""

    kind: Literal["torchvision"] = "torchvision"
    """Dataset kind."""
    name: SetName
    """Which set; a cache's dataset kind is this name."""
    root: Path
    """Folder that torchvision would be given, or the set's own folder in it."""
    partition: int | None = Field(default=None, ge=1, le=10)
    """Which of the published splits of dtd (1..10), ucf101 (1..3) or sun397 (1..10); unset = 1, for
    sun397 a split of all images made here."""
    level: Literal["variant", "family", "manufacturer"] = "variant"
    """What a class of fgvc_aircraft is."""
    few_shot_json: Path | None = None
    """Few-shot split file (split_zhou_….json) to use instead of the set's own lists, which are not
    read; the kind ends in _few_shot then, since figures of the two do not compare."""
    val_fraction: float = Field(default=0.1, ge=0, lt=1)
    """Share of every class's training images (of all images where the set has no split) that
    becomes `val`, 0 up to but not 1; unused if the set has a val split."""
    images: Path | None = None
    """Folder to write the images of sets that are arrays to, as PNG, once; unset = `root`."""

    @model_validator(mode="after")
    def _only_where_it_means_something(self) -> "TorchvisionConfig":
        if self.partition is not None and self.name not in ("dtd", "ucf101", "sun397"):
            raise ValueError(f"partition has no meaning for name {self.name!r}; leave it unset")
        if self.level != "variant" and self.name != "fgvc_aircraft":
            raise ValueError(f"level has no meaning for name {self.name!r}; leave it unset")
        if self.few_shot_json is not None and self.name not in LISTED_SETS:
            raise ValueError(f"few_shot_json has no meaning for name {self.name!r}; leave it unset")
        return self

    def manifest(self) -> Manifest:
        """Rows in the source's order within each split; ids are paths below the set's folder.

        A set with a test split but none for validation gets `val_fraction` of train, by class.

        Raises:
            DatasetError: a file is missing or does not say what it should.
        """
        if not self.root.is_dir():
            raise DatasetError(f"{self.root}: no such folder; expected {self.name} in it")
        if self.name == "kikibouba":  # has no lists: train, val and test or class directories
            options = self.model_dump(include={"root", "val_fraction", "test_fraction", "seed"})
            return replace(FolderConfig(**options).manifest(), kind=self.name)
        kind: str = self.name
        if self.few_shot_json is not None:  # instead of the official lists, which may be missing
            kind += SUFFIX
            found = self._few_shot(self.few_shot_json)
        elif self.name in ARRAY_SETS:
            found = self._from_arrays()
        else:
            found = LISTED_SETS[self.name](self.root, Variant(self.partition, self.level))
        if not found.paths:
            raise DatasetError(f"{found.base}: found no images of {self.name}; check dataset.root")
        require_some_image(found.base, found.paths)
        labels = np.asarray(found.labels, np.int64)
        return Manifest.build(
            kind=kind,
            root=found.base,
            ids=found.paths,
            paths=found.paths,
            splits=self._splits(found, labels),
            labels=one_or_none(labels),
            classes=found.classes,
            task="single_label",
        )

    def _splits(self, found: ListedSet, labels: "np.typing.NDArray[np.int64]") -> list[str]:
        if found.splits is None:
            return self.split(found.paths, labels)
        splits = np.asarray(found.splits, dtype=object)
        if "val" not in found.splits:
            train = np.flatnonzero(splits == "train")
            held = carve(
                [found.paths[row] for row in train],
                np.arange(len(train) + 1),
                labels[train].astype(np.int32),
                self.val_fraction,
                self.seed,
            )
            splits[train[held]] = "val"
        return list(splits)

    def _from_arrays(self) -> ListedSet:
        found = ARRAY_SETS[self.name](self.root)
        parent = self.images or self.root
        folder, paths = write_png(parent, self.name, found.pixels)
        return ListedSet(
            base=parent,
            paths=[f"{folder}/{path}" for split in paths for path in paths[split]],
            labels=np.concatenate([found.labels[split] for split in paths]).tolist(),
            splits=[split for split in paths for _ in paths[split]],
            classes=found.classes,
        )

    def _few_shot(self, file: Path) -> ListedSet:
        listed = read_split_json(file)
        folder = IMAGE_FOLDERS.get(self.name)
        paths = [f"{folder}/{path}" if folder else path for path in listed.paths]
        classes = class_table(self.name, listed.classes["name"].tolist())
        base = set_folder(self.root, self.name)
        return ListedSet(base, paths, listed.labels, listed.splits, classes)
