"""Kaggle-style multi-label sets: `train.csv` and `test.csv` with captions, images in one folder."""

from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from featcache.datasets.base import require_some_image
from featcache.datasets.kaggle_records import Record, read_records
from featcache.datasets.path_lists import read_names
from featcache.datasets.splitting import CarveConfig, carve
from featcache.errors import DatasetError
from featcache.manifest import Manifest


class KaggleCsvConfig(CarveConfig):
    """`ImageID,Labels,Caption` with bare quotes in the captions; labels are numbers with gaps."""

    kind: Literal["kaggle_csv"] = "kaggle_csv"
    """Dataset kind."""
    root: Path
    """Folder with the CSV files and the images' folder."""
    train: Path = Path("train.csv")
    """Training file, from `root`: `ImageID,Labels,Caption`."""
    test: Path | None = None
    """Test file, from `root`: `ImageID,Caption`; unset = test.csv if it is there."""
    images: str = "data"
    """Folder with the images, from `root`; "." = the root itself."""
    label_encoder: Path | None = None
    """.npy vector of the label ids in class order, ascending; unset = the ids found in train."""
    class_names: Path | None = None
    """List with a name and its label id on each line; unset = the ids are the names."""

    def manifest(self) -> Manifest:
        """Rows in file order within each split; ids are ImageIDs, class index = rank of the id.

        The class table keeps the original id as `label_id`. Validation rows are carved out of
        train; test rows have no labels.

        Raises:
            DatasetError: one line naming file and line.
        """
        train = read_records(self.root / self.train, labelled=True)
        test = self._test()
        _check_disjoint(self.root / self.train, train, test)
        label_ids = self._label_ids(train)
        index = {label: number for number, label in enumerate(label_ids.tolist())}
        for record in train:
            for label in record.labels:
                if label not in index:
                    raise DatasetError(
                        f"{self.root / self.train} line {record.line}: label {label} is not in "
                        f"{self.label_encoder}; give the encoder of this dataset"
                    )
        labels = [sorted(index[label] for label in record.labels) for record in train]
        offsets = np.concatenate([[0], np.cumsum([len(row) for row in labels])]).astype(np.int64)
        values = np.asarray([label for row in labels for label in row], np.int32)
        ids = [record.name for record in train]
        held = carve(ids, offsets, values, self.val_fraction, self.seed)
        records = train + test
        paths = [
            record.name if self.images == "." else f"{self.images}/{record.name}"
            for record in records
        ]
        require_some_image(self.root, paths)
        offsets = np.concatenate([offsets, np.full(len(test), offsets[-1])])
        return Manifest.build(
            kind=self.kind,
            root=self.root,
            ids=[record.name for record in records],
            paths=paths,
            splits=["val" if one else "train" for one in held] + ["test"] * len(test),
            labels=pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(values)),
            classes=self._classes(label_ids),
            task="multi_label",
            captions=[[record.caption] if record.caption else [] for record in records],
        )

    def _test(self) -> list[Record]:
        if self.test is None:
            usual = self.root / "test.csv"
            return read_records(usual, labelled=False) if usual.exists() else []
        return read_records(self.root / self.test, labelled=False)

    def _label_ids(self, train: list[Record]) -> npt.NDArray[np.int64]:
        if self.label_encoder is not None:
            return read_label_encoder(self.label_encoder)
        found = {label for record in train for label in record.labels}
        if not found:
            raise DatasetError(f"{self.root / self.train}: no record has a label")
        return np.asarray(sorted(found), np.int64)

    def _classes(self, label_ids: npt.NDArray[np.int64]) -> pd.DataFrame:
        numbers = [str(label) for label in label_ids]
        if self.class_names is None:
            return pd.DataFrame({"name": numbers, "label_id": numbers})
        names = read_names(self.class_names)
        missing = [label for label in label_ids.tolist() if label not in names]
        if missing:
            raise DatasetError(f"{self.class_names}: no name for label {missing[0]}; add a line")
        return pd.DataFrame(
            {"name": [names[label] for label in label_ids.tolist()], "label_id": numbers}
        )


def read_label_encoder(file: Path) -> npt.NDArray[np.int64]:
    """(C,) label ids in class order, from a .npy file; never unpickles.

    Raises:
        DatasetError: one line: missing, damaged, or no ascending vector of whole numbers.
    """
    try:
        found = np.load(file, allow_pickle=False)
    except FileNotFoundError:
        raise DatasetError(f"{file}: no such file; expected a .npy vector of label ids") from None
    except (ValueError, OSError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise DatasetError(f"{file}: not a plain .npy file ({reason})") from None
    fits = isinstance(found, np.ndarray) and found.ndim == 1 and found.dtype.kind in "iu"
    if not fits or len(found) == 0 or (np.diff(found.astype(np.int64)) <= 0).any():
        raise DatasetError(f"{file}: expected a vector of ascending whole numbers")
    label_ids: npt.NDArray[np.int64] = found.astype(np.int64)
    return label_ids


def write_label_encoder(file: Path, label_ids: npt.NDArray[np.int64]) -> None:
    """Writes what `read_label_encoder` reads."""
    np.save(file, np.sort(label_ids).astype(np.int64), allow_pickle=False)


def _check_disjoint(file: Path, train: list[Record], test: list[Record]) -> None:
    first = {record.name: record.line for record in train}
    for record in test:
        if record.name in first:
            raise DatasetError(
                f"{file} line {first[record.name]}: {record.name} is on line {record.line} of the "
                "test file too; expected test images that are not trained on"
            )
