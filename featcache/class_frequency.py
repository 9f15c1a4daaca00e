"""Job: how often each class occurs, and how often classes occur together, in a multi-label set.

    python -m featcache.class_frequency --dataset voc_lt --dataset.root data/voc \
        --dataset.val_fraction 0 --out class_freq.npz --compare class_freq.pkl

The figures that re-weighting losses start from, recomputed from the labels; an existing file (.npz,
.json, or the pickle of older code, which is read without running anything) is compared with them.
"""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from featcache.config import Config, run_job
from featcache.datasets import AnyDataset
from featcache.errors import DatasetError
from featcache.formats.safe_pickle import load_plain_pickle
from featcache.manifest import Manifest
from featcache.shot_groups import GROUPS, group_names, stated_groups

_SUFFIXES = (".npz", ".json")


@dataclass(frozen=True)
class ClassFrequency:
    """Counts over N rows and C classes, under the names that older code uses.

    Attributes:
        class_freq: (C,) int64 rows with the class.
        neg_class_freq: (C,) int64 rows without it.
        gt_labels: (N, C) uint8 multi-hot labels, in row order.
        condition_prob: (C, C) float64 share of the rows with the row's class that have the column's
            class too; 1 on the diagonal, 0 beside it for a class without rows.
    """

    class_freq: npt.NDArray[np.int64]
    neg_class_freq: npt.NDArray[np.int64]
    gt_labels: npt.NDArray[np.uint8]
    condition_prob: npt.NDArray[np.float64]

    @classmethod
    def of(cls, manifest: Manifest, splits: tuple[str, ...] = ("train",)) -> "ClassFrequency":
        """Counts over the rows of some splits.

        Raises:
            DatasetError: if there is no such row.
        """
        num_classes = manifest.num_classes
        together = np.zeros((num_classes, num_classes))
        parts = []
        for block in manifest.blocks():  # what streams its rows has no list of all of them
            hot = np.zeros((len(block), num_classes), np.uint8)
            rows = np.repeat(np.arange(len(block)), np.diff(block.label_offsets))
            hot[rows, block.label_values] = 1
            hot = hot[np.isin(np.asarray(block.splits, dtype=object), splits)]
            together += hot.T.astype(np.float64) @ hot
            parts.append(hot)
        hot = np.concatenate(parts)
        if not len(hot):
            raise DatasetError(
                f"{manifest.root}: no row in split {' or '.join(splits)}; the {manifest.kind} "
                f"dataset has {', '.join(manifest.split_ranges)}"
            )
        count = np.diagonal(together).copy()
        share = together / np.maximum(count, 1)[:, None]
        np.fill_diagonal(share, 1)
        frequency = count.astype(np.int64)
        return cls(frequency, len(hot) - frequency, hot, share)

    @classmethod
    def read(cls, file: Path) -> "ClassFrequency":
        """What `write`, or older code's pickle.dump, wrote.

        Raises:
            DatasetError: missing or damaged file, or one without these four arrays.
            UnsafePickleError: a pickle with anything but arrays and plain values.
        """
        names = [field.name for field in fields(cls)]
        try:
            if file.suffix == ".npz":
                with np.load(file, allow_pickle=False) as archive:
                    found: Any = {name: archive[name] for name in archive.files}
            elif file.suffix == ".json":
                found = json.loads(file.read_bytes())
            else:
                found = load_plain_pickle(file)
            arrays = [np.asarray(found[name]) for name in names]
        except FileNotFoundError:
            raise DatasetError(f"{file}: no such file; expected class frequencies") from None
        except (KeyError, TypeError):
            raise DatasetError(f"{file}: expected {', '.join(names)} in it") from None
        except (ValueError, OSError) as error:
            raise DatasetError(f"{file}: damaged ({str(error).splitlines()[0]})") from error
        return cls(*arrays)

    def write(self, file: Path) -> None:
        """Writes .npz, or .json with nested lists."""
        arrays = asdict(self)
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".npz":
            np.savez_compressed(file, **arrays)
        else:
            file.write_text(json.dumps({name: array.tolist() for name, array in arrays.items()}))

    def differences(self, other: "ClassFrequency") -> list[str]:
        """Names of the arrays that differ from another's, each with what differs."""
        lines = []
        for field in fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if mine.shape != theirs.shape:
                lines.append(f"{field.name}: shape {mine.shape} here, {theirs.shape} there")
            elif not np.allclose(mine, theirs, rtol=0, atol=1e-6):  # also what float32 keeps
                where = np.unravel_index(np.argmax(np.abs(mine - theirs.astype(float))), mine.shape)
                place = ", ".join(str(int(index)) for index in where)
                lines.append(
                    f"{field.name}[{place}]: {mine[where]:g} here, {theirs[where]:g} there"
                )
        return lines


class ClassFrequencyConfig(Config):
    """Counts classes, and pairs of classes, in a dataset's labels."""

    dataset: AnyDataset = Field(discriminator="kind")
    """Dataset to count."""
    splits: tuple[str, ...] = ("train",)
    """Splits whose rows count; where validation rows are carved out of train, `train,val` or
    dataset.val_fraction 0 counts the whole list."""
    out: Path | None = None
    """File to write: .npz or .json; unset = only print."""
    compare: Path | None = None
    """File of earlier figures (.npz, .json or .pkl) that must be equal."""

    @model_validator(mode="after")
    def _known_suffix(self) -> "ClassFrequencyConfig":
        if self.out is not None and self.out.suffix not in _SUFFIXES:
            raise ValueError(f"out={self.out} has to end with {' or '.join(_SUFFIXES)}")
        return self


def run(config: ClassFrequencyConfig) -> ClassFrequency:
    """Counts, prints, writes and compares.

    Raises:
        DatasetError: if the figures differ from those in `compare`, one line an array.
    """
    manifest = config.dataset.open()
    found = ClassFrequency.of(manifest, config.splits)
    stated = stated_groups(manifest.classes)
    groups = group_names(found.class_freq) if stated is None else stated
    print(
        f"{len(found.gt_labels):,} rows, {int(found.class_freq.sum()):,} labels, "
        f"{manifest.num_classes} classes: "
        + ", ".join(f"{groups.count(name)} {name}" for name in GROUPS)
        + ("" if stated is None else " (as the dataset states them)")
    )
    if config.out is not None:
        found.write(config.out)
        print(f"written: {config.out}")
    if config.compare is not None:
        different = found.differences(ClassFrequency.read(config.compare))
        if different:
            raise DatasetError("\n".join(f"{config.compare}: {line}" for line in different))
        print(f"equal to {config.compare}")
    return found


if __name__ == "__main__":
    run_job(ClassFrequencyConfig, run)
