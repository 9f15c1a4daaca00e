"""Oxford's 102 flowers, with the official split or the few-shot one; never both in one cache."""

import json
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import pyarrow as pa
from pydantic import model_validator

from featcache.datasets.base import DatasetConfig, require_some_image
from featcache.datasets.flower_names import FLOWER_NAMES
from featcache.datasets.split_json import SUFFIX, read_split_json
from featcache.errors import DatasetError
from featcache.manifest import Manifest

_SPLITS = {"train": "trnid", "val": "valid", "test": "tstid"}


class Flowers102Config(DatasetConfig):
    """8,189 flowers of 102 species: `jpg/image_00001.jpg` …, `imagelabels.mat`, `setid.mat`."""

    kind: Literal["flowers102"] = "flowers102"
    """Dataset kind."""
    root: Path
    """Folder with `jpg` and the lists, or the one above its `flowers-102`."""
    split: Literal["official", "few_shot"] = "official"
    """official: 10 train and 10 val images a class, 6,149 test, of setid.mat; few_shot: 4,093,
    1,633 and 2,463 of a JSON file, kind flowers102_few_shot. Figures of the two do not compare."""
    few_shot_json: Path | None = None
    """Split file of few_shot; unset = split_zhou_OxfordFlowers.json in `root`."""
    names_json: Path | None = None
    """cat_to_name.json with class names by 1-based label, for the official split; unset = our own
    list of the 102 names."""

    @model_validator(mode="after")
    def _files_of_the_split(self) -> "Flowers102Config":
        name = "few_shot_json" if self.split == "official" else "names_json"
        if getattr(self, name) is not None:
            raise ValueError(f"{name} has no meaning with split {self.split!r}; leave it unset")
        return self

    def manifest(self) -> Manifest:
        """Rows in the order of the split lists; class index = official label - 1.

        Ids are file names, the same for both splits.

        Raises:
            DatasetError: a file is missing or does not say what it should.
        """
        base = self.root / "flowers-102" if (self.root / "flowers-102").is_dir() else self.root
        if not (base / "jpg").is_dir():
            raise DatasetError(f"{base}: no folder 'jpg'; expected the flowers' images in it")
        if self.split == "few_shot":
            listed = read_split_json(self.few_shot_json or base / "split_zhou_OxfordFlowers.json")
            names, splits = listed.paths, listed.splits
            labels, classes = listed.labels, listed.classes
        else:
            names, splits, labels = _official(base)
            classes = pd.DataFrame({"name": self._class_names()}, dtype=object)
        paths = [f"jpg/{name}" for name in names]
        require_some_image(base, paths)
        return Manifest.build(
            kind=self.kind + (SUFFIX if self.split == "few_shot" else ""),
            root=base,
            ids=names,
            paths=paths,
            splits=splits,
            labels=pa.array([[label] for label in labels], pa.large_list(pa.int32())),
            classes=classes,
            task="single_label",
        )

    def _class_names(self) -> list[str]:
        if self.names_json is None:
            return list(FLOWER_NAMES)
        try:
            found = json.loads(self.names_json.read_text(encoding="utf-8-sig"))
        except OSError:
            raise DatasetError(f"{self.names_json}: no such file; expected class names") from None
        except ValueError as error:
            raise DatasetError(f"{self.names_json}: not JSON ({error})") from None
        wanted = [str(label) for label in range(1, len(FLOWER_NAMES) + 1)]
        if not isinstance(found, dict) or set(found) != set(wanted):
            raise DatasetError(
                f'{self.names_json}: expected names under "1" to "{len(FLOWER_NAMES)}"'
            )
        return [str(found[label]) for label in wanted]


def _official(base: Path) -> tuple[list[str], list[str], list[int]]:
    """File names, splits and class indices of the official split."""
    from featcache.formats.mat_file import read_mat

    (labels,) = read_mat(base / "imagelabels.mat", ["labels"])
    labels = np.atleast_1d(labels).astype(np.int64)
    if labels.size and (labels.min() < 1 or labels.max() > len(FLOWER_NAMES)):
        bad = labels.min() if labels.min() < 1 else labels.max()
        raise DatasetError(f"{base / 'imagelabels.mat'}: label {bad}; expected 1 to 102")
    parts = read_mat(base / "setid.mat", list(_SPLITS.values()))
    numbers = [np.atleast_1d(part).astype(np.int64) for part in parts]
    together = np.concatenate(numbers)
    listed, counts = np.unique(together, return_counts=True)
    if len(listed) and (listed[0] < 1 or listed[-1] > len(labels)):
        bad = listed[0] if listed[0] < 1 else listed[-1]
        raise DatasetError(
            f"{base / 'setid.mat'}: image {bad}; imagelabels.mat has labels of images 1 to "
            f"{len(labels)}, expected both files of one release"
        )
    if (counts > 1).any():
        raise DatasetError(
            f"{base / 'setid.mat'}: image {listed[counts > 1][0]} is listed twice; expected each "
            "image in one split"
        )
    splits = [name for name, part in zip(_SPLITS, numbers, strict=True) for _ in part]
    names = [f"image_{number:05d}.jpg" for number in together.tolist()]
    return names, splits, (labels[together - 1] - 1).tolist()
