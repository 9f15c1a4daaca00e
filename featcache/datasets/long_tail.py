"""What VOC-LT and COCO-LT share: text lists of paths with class ids, and captions beside them."""

from pathlib import Path
from typing import ClassVar

import numpy as np
import pandas as pd
import pyarrow as pa

from featcache.datasets.base import require_some_image
from featcache.datasets.path_lists import PathList, check_names, read_captions, read_path_list
from featcache.datasets.splitting import CarveConfig, carve
from featcache.errors import DatasetError
from featcache.manifest import Manifest
from featcache.shot_groups import group_names


class LongTailConfig(CarveConfig):
    """Images, classes and captions from text lists; validation is carved out of the train list."""

    prefix: ClassVar[str]
    """First part of the lists' file names: `voc` reads `voc_labels.txt`, `voc_lt_train.txt`, ..."""
    names: ClassVar[tuple[str, ...]]
    """Class names in id order, as in the label list."""

    root: Path
    """Folder that the lists' paths start from."""
    lists: Path | None = None
    """Folder with the lists; unset = `root`."""
    captions: Path | None = None
    """List of captions, `path caption` on each line; unset = the one beside the lists, if there is
    one. Joined by path; images without a caption stay."""

    def manifest(self) -> Manifest:
        """Rows in list order within each split; ids are the paths.

        A listed image that is missing stays a row, and so does one without a label (a row without
        positives). Class metadata: `group` (head, medium or tail) and `list_count`, both over the
        whole train list.

        Raises:
            DatasetError: one line naming file and line.
        """
        folder = self.root if self.lists is None else self.lists
        label_file = folder / f"{self.prefix}_labels.txt"
        if label_file.exists():
            check_names(label_file, self.names)
        train = read_path_list(folder / f"{self.prefix}_lt_train.txt", len(self.names))
        test = read_path_list(folder / f"{self.prefix}_lt_test.txt", len(self.names))
        _check_disjoint(train, test)
        paths = train.paths + test.paths
        require_some_image(self.root, paths)
        labels = train.labels + test.labels
        offsets = np.concatenate([[0], np.cumsum([len(row) for row in labels])]).astype(np.int64)
        values = np.asarray([label for row in labels for label in row], np.int32)
        num_train = len(train.paths)
        held = carve(
            train.paths,
            offsets[: num_train + 1],
            values[: offsets[num_train]],
            self.val_fraction,
            self.seed,
        )
        counts = np.bincount(values[: offsets[num_train]], minlength=len(self.names))
        captions = self._captions(folder, set(paths))
        return Manifest.build(
            kind=self.kind,
            root=self.root,
            ids=paths,
            paths=paths,
            splits=["val" if one else "train" for one in held] + ["test"] * len(test.paths),
            labels=pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(values)),
            classes=self.class_table().assign(
                group=group_names(counts), list_count=[str(count) for count in counts]
            ),
            task="multi_label",
            captions=None if captions is None else [captions.get(path, []) for path in paths],
        )

    def class_table(self) -> pd.DataFrame:
        """Class names in id order."""
        return pd.DataFrame({"name": self.names})

    def _captions(self, folder: Path, known: set[str]) -> dict[str, list[str]] | None:
        file = self.captions
        if file is None:
            file = folder / f"{self.prefix}_lt_captions.txt"
            if not file.exists():
                return None
        return read_captions(file, known)


def _check_disjoint(train: PathList, test: PathList) -> None:
    first = dict(zip(train.paths, train.numbers, strict=True))
    for path, number in zip(test.paths, test.numbers, strict=True):
        if path in first:
            raise DatasetError(
                f"{test.file} line {number}: {path} is on line {first[path]} of {train.file.name} "
                "too; expected test images that are not trained on"
            )
