"""A dataset's rows as training wants them: split into what trains, decides and is reported.

The rules are those of `heads.parts`, so that a head on a frozen cache and a backbone trained on
pixels hold out the same images.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from featcache.errors import ConfigError
from featcache.identity import DatasetIdentity
from featcache.manifest import Manifest, Task
from featcache.reader import Cache
from featcache.storage import Where
from heads.parts import LabelledRows

IntArray = npt.NDArray[np.int64]


class ManifestRows:
    """The rows of a dataset, for `heads.parts.choose_parts`; every image counts as readable."""

    def __init__(self, manifest: Manifest) -> None:
        """Reads nothing."""
        self.manifest = manifest

    @property
    def path(self) -> Where:
        """Root of the dataset."""
        return self.manifest.root

    @property
    def task(self) -> Task:
        """How the labels are to be read."""
        return self.manifest.task

    @property
    def num_classes(self) -> int:
        """C."""
        return self.manifest.num_classes

    @property
    def split_names(self) -> list[str]:
        """Names of the splits in storage order."""
        return list(self.manifest.split_ranges)

    @property
    def ids(self) -> Sequence[str]:
        """The N row ids."""
        return self.manifest.ids

    def rows(self, split: str) -> IntArray:
        """Row numbers of a split, ascending.

        Raises:
            ConfigError: if there is no such split.
        """
        if split not in self.manifest.split_ranges:
            raise ConfigError(
                f"{self.path}: no split {split!r}; the dataset has {', '.join(self.split_names)}"
            )
        return np.arange(*self.manifest.split_ranges[split], dtype=np.int64)

    def labels(self, rows: IntArray) -> IntArray:
        """(n,) class index of each row, -1 = unlabelled."""
        starts = self.manifest.label_offsets[rows]
        labelled = self.manifest.label_offsets[rows + 1] > starts
        labels = np.full(len(rows), -1, np.int64)
        labels[labelled] = self.manifest.label_values[starts[labelled]]
        return labels

    def multi_hot(self, rows: IntArray) -> npt.NDArray[np.uint8]:
        """(n, C): 1 where a row has the class."""
        offsets, values = self.manifest.label_offsets, self.manifest.label_values
        hot = np.zeros((len(rows), self.num_classes), np.uint8)
        for place, row in enumerate(rows.tolist()):
            hot[place, values[offsets[row] : offsets[row + 1]]] = 1
        return hot


@dataclass(frozen=True)
class Material:
    """What is trained on: a dataset's images, or the rows of a cache.

    Attributes:
        rows: to choose parts from.
        classes: class table, C rows in index order.
        kind: of the dataset.
        identity: of the dataset.
        root: where its images lie.
        dataset: options that open it.
        manifest: its rows, where images are read.
        cache: with the rows, where no image is read.
    """

    rows: LabelledRows
    classes: pd.DataFrame
    kind: str
    identity: DatasetIdentity
    root: str
    dataset: Mapping[str, Any]
    manifest: Manifest | None = None
    cache: Cache | None = None

    @classmethod
    def of_manifest(cls, manifest: Manifest, dataset: Mapping[str, Any]) -> "Material":
        """The images of a dataset that is open."""
        return cls(
            rows=ManifestRows(manifest),
            classes=manifest.classes,
            kind=manifest.kind,
            identity=manifest.identity,
            root=str(manifest.root),
            dataset=dataset,
            manifest=manifest,
        )

    @classmethod
    def of_cache(cls, cache: Cache) -> "Material":
        """The rows of a cache; its images are never read."""
        return cls(
            rows=cache,
            classes=cache.classes,
            kind=cache.identity.dataset.kind,
            identity=cache.identity.dataset,
            root=str(cache.attributes["root"]),
            dataset=cache.attributes["dataset"],
            cache=cache,
        )

    @property
    def task(self) -> Task:
        """How the labels are to be read."""
        return self.rows.task

    @property
    def num_classes(self) -> int:
        """C."""
        return len(self.classes)

    def require_labels(self) -> None:
        """Checks that there is something to learn.

        Raises:
            ConfigError: without classes or labels.
        """
        if self.task == "unlabelled" or self.num_classes == 0:
            raise ConfigError(
                f"{self.rows.path}: holds {self.num_classes} classes and is {self.task}; "
                "fine-tuning needs labels (for image-caption pairs without labels: "
                "python -m finetune.pretrain)"
            )
