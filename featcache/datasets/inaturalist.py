"""iNaturalist 2018 and 2021: annotation JSON, a taxonomy, and images in one of several layouts."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BeforeValidator, model_validator

from featcache.datasets.base import DatasetConfig
from featcache.datasets.inaturalist_json import (
    Split,
    class_table,
    in_order,
    join,
    read_split,
)
from featcache.datasets.inaturalist_layout import resolve
from featcache.datasets.label_lists import one_or_none
from featcache.errors import DatasetError
from featcache.formats.json_arrays import read_arrays
from featcache.manifest import Manifest

SplitName = Literal["train", "val", "test"]
Version = Annotated[Literal["2018", "2021"], BeforeValidator(str)]


class InaturalistConfig(DatasetConfig):
    """Species in the wild: images in `root/{2018|2021}/…`, `root/train{V}.json`, `val{V}.json`."""

    kind: Literal["inaturalist"] = "inaturalist"
    """Dataset kind."""
    root: Path
    """Folder with the JSON files and the images."""
    version: Version = "2021"
    """2018 or 2021: the JSON names and the image folder that are looked for."""
    splits: tuple[SplitName, ...] = ("train", "val", "test")
    """Splits to read; one whose JSON is not there is left out."""
    train_json: Path | None = None
    """Annotations of train; unset = train2021.json, train_2021.json or train.json in `root`."""
    val_json: Path | None = None
    """Annotations of val; unset = val2021.json, val_2021.json or val.json in `root`."""
    test_json: Path | None = None
    """Images of test, labelled or not; unset = test2021.json, test_2021.json, test.json or
    public_test.json in `root`."""
    categories_json: Path | None = None
    """List of categories; unset = categories.json in `root`, otherwise a split's `categories`."""
    category_ids: tuple[int, ...] | None = None
    """Keep only these categories (ids of the JSON); classes are numbered anew by ascending id, and
    unlabelled images left out."""
    only_class_id: int | None = None
    """Keep only images of this category id; the class list stays as it is."""
    subset_name: str | None = None
    """Name for the subset that `category_ids` or `only_class_id` choose; recorded, nothing more."""
    ids: Literal["image_id", "file_name"] = "image_id"
    """Row ids: the JSON's image id, or the file name where two splits use one image id."""
    check_files: bool = False
    """Look for every image (by listing folders) and stop if one is missing. Otherwise some of each
    split are looked for, and extraction reports the missing ones."""

    @model_validator(mode="after")
    def _only_inside_the_subset(self) -> "InaturalistConfig":
        chosen = self.category_ids
        if chosen is not None and not chosen:
            raise ValueError("category_ids is empty; name at least one category, or leave it unset")
        if chosen is not None and self.only_class_id not in (None, *chosen):
            raise ValueError(
                f"only_class_id {self.only_class_id} is not among category_ids {chosen}; "
                "add it there or choose another"
            )
        return self

    def manifest(self) -> Manifest:
        """Rows in JSON order; class index = rank of the category id; names are Latin.

        Metadata columns, lower-cased: scientific_name, species (both the Latin name), common_name
        and the taxonomy where the source has them; `category_id` as it is.

        Raises:
            DatasetError: one line naming the file and what is wrong in it.
        """
        file, categories, parts = self.read()
        classes, parts = self._subset(class_table(categories), parts, file)
        labels = np.concatenate([part.labels for part in parts])
        return Manifest.build(
            kind=self.kind,
            root=self.root,
            ids=self._ids(parts),
            paths=pa.concat_arrays([self.paths(part) for part in parts]),
            splits=pa.concat_arrays([_repeated(part.split, len(part.labels)) for part in parts]),
            labels=one_or_none(labels),
            classes=classes,
            task="single_label",
        )

    def read(self) -> tuple[Path, list[dict[str, Any]], list[Split]]:
        """What the JSON files say: categories by ascending id, their file, and all splits' images.

        Raises:
            DatasetError: see `manifest`.
        """
        files = self._files()
        listed = self._listed_categories()
        tables = {}
        for split, file in files.items():
            images, annotations, found = read_split(file, with_categories=listed is None)
            listed = listed or ((file, found) if found else None)
            tables[split] = images, annotations
        if listed is None:
            raise DatasetError(
                f"{self.root}: no categories.json and no 'categories' in "
                f"{', '.join(file.name for file in files.values())}; expected one of them"
            )
        file, categories = listed[0], in_order(*listed)
        numbers = np.asarray([one["id"] for one in categories], np.int64)
        parts = [join(split, files[split], *tables.pop(split), numbers) for split in files]
        return file, categories, parts

    def paths(self, part: Split) -> pa.Array:
        """Image paths of a split, relative to `root`."""
        return resolve(self.root, self.version, part.split, part.names, self.check_files)

    def _files(self) -> dict[str, Path]:
        """JSON file of each split that is there."""
        if not self.root.is_dir():
            raise DatasetError(f"{self.root}: no such folder; expected iNaturalist {self.version}")
        given = {"train": self.train_json, "val": self.val_json, "test": self.test_json}
        found: dict[str, Path] = {}
        for split in dict.fromkeys(self.splits):
            names = [f"{split}{self.version}.json", f"{split}_{self.version}.json", f"{split}.json"]
            names += ["public_test.json"] if split == "test" else []
            candidates = [self.root / name for name in names]
            named = given[split]
            file = named or next((path for path in candidates if path.is_file()), None)
            if file is not None:
                found[split] = file
        if not found:
            wanted = ", ".join(f"{split}{self.version}.json" for split in self.splits)
            raise DatasetError(
                f"{self.root}: found none of {wanted} (nor with _ or without the year); check "
                "dataset.root and dataset.version, or name the files (dataset.train_json)"
            )
        return found

    def _listed_categories(self) -> tuple[Path, list[Any]] | None:
        """The category list and its file, if there is one beside the splits."""
        file = self.categories_json or self.root / "categories.json"
        if self.categories_json is None and not file.is_file():
            return None
        found = read_arrays(file, {"": None, "categories": None})
        listed = found.get("", found.get("categories"))
        if not listed:
            raise DatasetError(f"{file}: no categories; expected a list of them")
        return file, list(listed)

    def _subset(
        self, classes: pd.DataFrame, parts: list[Split], file: Path
    ) -> tuple[pd.DataFrame, list[Split]]:
        """Classes and rows that `category_ids` and `only_class_id` leave."""
        chosen = self.category_ids
        only = chosen if self.only_class_id is None else (self.only_class_id,)
        if only is None:
            return classes, parts
        numbers = classes["category_id"].to_numpy(np.int64)
        for number in {*only, *(chosen or ())}:
            if number not in numbers:
                raise DatasetError(
                    f"{file}: no category has the id {number}; found {len(numbers)} from "
                    f"{numbers[0]} to {numbers[-1]}; check dataset.category_ids and only_class_id"
                )
        kept = np.append(np.isin(numbers, only), False)  # the last one for label -1
        parts = [part.only(kept[part.labels]) for part in parts]
        if chosen is None:
            return classes, parts
        in_list = np.isin(numbers, chosen)
        rank = np.cumsum(in_list) - 1
        return classes[in_list], [replace(part, labels=rank[part.labels]) for part in parts]

    def _ids(self, parts: Sequence[Split]) -> pa.Array:
        if self.ids == "file_name":
            return pa.concat_arrays([part.names for part in parts])
        numbers = np.concatenate([part.numbers for part in parts])
        for index, part in enumerate(parts):
            for other in parts[index + 1 :]:
                shared = np.intersect1d(part.numbers, other.numbers)
                if len(shared):
                    raise DatasetError(
                        f"{other.file}: image id {shared[0]} and {len(shared) - 1} more are also "
                        f"in {part.file.name}; use --dataset.ids file_name"
                    )
        return pc.cast(pa.array(numbers), pa.large_string())


def _repeated(text: str, count: int) -> pa.Array:
    return pa.repeat(pa.scalar(text, pa.large_string()), count)
