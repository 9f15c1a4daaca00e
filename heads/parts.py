"""Which rows of a cache train, decide and are reported, with their targets."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from featcache.datasets import splitting
from featcache.datasets.shots import ranks
from featcache.errors import CacheError, ConfigError
from featcache.manifest import Task
from featcache.storage import Where

IntArray = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

CARVE = "carve"
"""Name of the validation split that is carved out of the training split."""

_EXACT_ROWS = 1 << 16
"""Rows counted at a time, below the 2^24 up to which float32 counts exactly."""

logger = logging.getLogger(__name__)


class LabelledRows(Protocol):
    """What rows are chosen from: a cache, or a dataset whose images are read."""

    @property
    def path(self) -> Where:
        """Where it lies, for messages."""

    @property
    def task(self) -> Task:
        """How the labels are to be read."""

    @property
    def num_classes(self) -> int:
        """C."""

    @property
    def split_names(self) -> list[str]:
        """Names of the splits in storage order."""

    @property
    def ids(self) -> Sequence[str]:
        """The N row ids."""

    def rows(self, split: str) -> IntArray:
        """Row numbers of a split that can be read, ascending; ConfigError if there is none such."""

    def labels(self, rows: IntArray) -> IntArray:
        """(n,) class index of each row, -1 = unlabelled."""

    def multi_hot(self, rows: IntArray) -> npt.NDArray[np.uint8]:
        """(n, C): 1 where a row has the class."""


@dataclass(frozen=True)
class Part:
    """Labelled valid rows of a cache.

    Attributes:
        name: split they come from.
        rows: (n,) int64 ascending row numbers.
        targets: (n,) int64 class indices, or (n, C) uint8 multi-hot.
        without_caption: further labelled rows of the split, left out because the head reads nothing
            but what a caption gives, and they have none.
    """

    name: str
    rows: IntArray
    targets: npt.NDArray[Any]
    without_caption: int = 0

    def __len__(self) -> int:
        return len(self.rows)

    def subset(self, mask: Mask, name: str) -> "Part":
        """The rows where `mask` is true."""
        return replace(self, name=name, rows=self.rows[mask], targets=self.targets[mask])

    def target_tensor(self, device: torch.device) -> Tensor:
        """(n,) int64 or (n, C) float32 targets on a device, as losses want them."""
        targets = torch.from_numpy(self.targets)
        return targets.to(device, torch.float32 if targets.ndim == 2 else torch.int64)


@dataclass(frozen=True)
class Parts:
    """What is trained on, what decides, and what is only reported (None: nothing labelled)."""

    train: Part
    val: Part
    test: Part | None


def require_labels(cache: LabelledRows) -> None:
    """Checks that there is something to learn.

    Raises:
        CacheError: without classes or labels.
    """
    if cache.task == "unlabelled" or cache.num_classes == 0:
        raise CacheError(
            f"{cache.path}: holds {cache.num_classes} classes and is {cache.task}; heads need "
            "labels, so extract a labelled dataset"
        )


def labelled_part(cache: LabelledRows, split: str, readable: Mask | None = None) -> Part:
    """The valid labelled rows of a split; a single-label row without a label is left out.

    Args:
        cache: where they are.
        split: its name.
        readable: (N,) rows that hold what the head reads, see `HeadArrays.readable`; None = all.

    Raises:
        ConfigError: if the cache has no such split.
    """
    rows = cache.rows(split)
    if cache.task == "multi_label":
        part = Part(split, rows, cache.multi_hot(rows))
    else:
        labels = cache.labels(rows)
        part = Part(split, rows[labels >= 0], labels[labels >= 0])
    if readable is None:
        return part
    kept = part.subset(readable[part.rows], split)
    return replace(kept, without_caption=len(part) - len(kept))


def has_labels(part: Part) -> bool:
    """Whether any row has a label; a test list without labels reads as rows without positives."""
    return len(part) > 0 and (part.targets.ndim == 1 or bool(part.targets.any()))


def choose_parts(
    cache: LabelledRows,
    *,
    train_split: str,
    val_split: str | None,
    val_fraction: float,
    test_split: str | None,
    select_on: Literal["val", "test"],
    seed: int,
    readable: Mask | None = None,
) -> Parts:
    """The rows to train on, to decide by, and to report.

    Args:
        cache: labelled.
        train_split: split to train on.
        val_split: split that decides; `CARVE` = carve it out of the training split; None = `val` if
            the cache has one, otherwise carve.
        val_fraction: share of each class's training rows that carving takes, 0..1.
        test_split: split that is reported; None = `test` if the cache has one.
        select_on: `test` decides by the test split and trains on all training rows.
        seed: of the carving.
        readable: see `labelled_part`.

    Raises:
        ConfigError: unknown split, or one split in two roles.
        CacheError: no labelled row to train on or to decide by.
    """
    names = cache.split_names
    if val_split is None:
        val_split = "val" if "val" in names and "val" not in (train_split, test_split) else CARVE
    asked_test = test_split is not None
    if test_split is None and "test" in names and "test" not in (train_split, val_split):
        test_split = "test"
    roles = {"train_split": train_split, "val_split": val_split, "test_split": test_split}
    for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
        if roles[f"{one}_split"] == roles[f"{other}_split"]:
            raise ConfigError(
                f"{one}_split and {other}_split are both {roles[f'{one}_split']!r}; rows that were "
                "trained or decided on cannot be reported, choose different splits"
            )
    train = labelled_part(cache, train_split, readable)
    _require_rows(train, cache)
    test = None if test_split is None else labelled_part(cache, test_split, readable)
    if test is not None and (asked_test or select_on == "test"):
        _require_rows(test, cache)
    if test is not None and not has_labels(test):
        if test.without_caption:
            logger.warning(
                "split %r is not reported: none of its %d labelled rows has a caption, and the "
                "head reads nothing else",
                test.name,
                test.without_caption,
            )
        test = None
    if select_on == "test":
        if test is None:
            raise ConfigError("select_on=test, but the cache has no labelled test split")
        logger.warning(
            "select_on=test: the split %r decides and is reported, so its figures are optimistic; "
            "use this only to compare with figures published that way",
            test.name,
        )
        return Parts(train, test, test)
    if val_split != CARVE:
        val = labelled_part(cache, val_split, readable)
        _require_rows(val, cache)
        return Parts(train, val, test)
    ids = cache.ids
    named = [ids[row] for row in train.rows.tolist()]
    held_out = carve(named, train.targets, cache.num_classes, val_fraction, seed)
    if not held_out.any():
        raise CacheError(
            f"{cache.path}: no class of split {train_split!r} has two rows, so no validation rows "
            "can be carved out of it; name another split as val_split"
        )
    return Parts(
        train.subset(~held_out, train_split),
        replace(train.subset(held_out, f"{train_split} (held out)"), without_caption=0),
        test,
    )


def carve(
    ids: Sequence[str],
    targets: npt.NDArray[Any],
    num_classes: int,
    fraction: float,
    seed: int,
) -> Mask:
    """(n,) mask of the rows to hold out: about `fraction` of each class, by a hash of seed and id.

    The rule of `featcache.datasets.splitting.carve`: every class with at least two rows keeps one
    and gives one, as far as the other labels of its rows allow. A row's side does not depend on row
    order, and most rows keep it when others are added.

    Args:
        ids: n unique row ids.
        targets: (n,) class indices or (n, C) multi-hot.
        num_classes: C.
        fraction: 0..1.
        seed: of the hash.
    """
    if targets.ndim == 2:
        rows, values = np.nonzero(targets)
        offsets = np.searchsorted(rows, np.arange(len(targets) + 1)).astype(np.int64)
        return splitting.carve(ids, offsets, values.astype(np.int32), fraction, seed)
    # One label a row: the same rule without a loop over rows, of which there may be millions.
    counts = np.bincount(targets, minlength=num_classes)
    share = np.rint(fraction * counts).astype(np.int64)
    wanted = np.where(counts > 1, np.clip(share, 1, np.maximum(counts - 1, 1)), 0)
    order = np.lexsort((ranks(ids, seed), targets))
    start = np.cumsum(counts) - counts
    place = np.empty(len(targets), np.int64)
    place[order] = np.arange(len(targets)) - np.repeat(start, counts)
    held: Mask = place < wanted[targets]
    return held


def class_counts(part: Part, num_classes: int) -> IntArray:
    """(C,) rows with each class."""
    if part.targets.ndim == 1:
        return np.bincount(part.targets, minlength=num_classes).astype(np.int64)
    counts: IntArray = part.targets.sum(0, dtype=np.int64)
    return counts


def cooccurrence(part: Part, num_classes: int) -> IntArray:
    """(C, C) rows with both classes; rows with each on the diagonal."""
    if part.targets.ndim == 1:
        return np.diag(class_counts(part, num_classes))
    total = np.zeros((num_classes, num_classes), np.int64)
    for start in range(0, len(part), _EXACT_ROWS):  # float32 multiplies far faster than int64
        hot = part.targets[start : start + _EXACT_ROWS].astype(np.float32)
        total += (hot.T @ hot).astype(np.int64)
    return total


def _require_rows(part: Part, cache: LabelledRows) -> None:
    if not has_labels(part):
        if part.without_caption:
            raise CacheError(
                f"{cache.path}: none of the {part.without_caption} labelled rows of split "
                f"{part.name!r} has a caption, and the head reads nothing else; caption the images "
                "(python -m featcache.caption), or choose another head or feature"
            )
        raise CacheError(
            f"{cache.path}: split {part.name!r} has no valid labelled row; choose another split, "
            "or extract again with labels"
        )
