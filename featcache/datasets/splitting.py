"""Train, val and test for datasets that come without: seeded, stratified, independent of row order.

Rows of a class are ranked by a hash over seed and id, so that a row keeps its split when the
dataset is read in another order, and most rows keep it when others are added.
"""

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import numpy.typing as npt
from pydantic import Field, NonNegativeInt, model_validator

from featcache.datasets.base import DatasetConfig
from featcache.datasets.shots import ranks

ALIASES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}
"""Names under which a split may be found, compared in lower case."""


class SplitConfig(DatasetConfig):
    """A dataset that may have to be split here."""

    val_fraction: float = Field(default=0.1, ge=0, lt=1)
    """Share of every class that becomes `val`, 0 up to but not 1; unused if the data is split."""
    test_fraction: float = Field(default=0.1, ge=0, lt=1)
    """Share of every class that becomes `test`, 0 up to but not 1; unused if the data is split."""
    seed: NonNegativeInt = 0
    """Seed of the split, 0 or larger; unused if the data is split."""

    @model_validator(mode="after")
    def _leave_train(self) -> "SplitConfig":
        if self.val_fraction + self.test_fraction >= 1:
            raise ValueError(
                f"val_fraction {self.val_fraction} and test_fraction {self.test_fraction} "
                "leave nothing to train on; their sum must stay below 1"
            )
        return self

    def split(self, ids: Sequence[str], strata: npt.NDArray[np.int64]) -> list[str]:
        """Split names of rows that came without; see `stratified`."""
        return stratified(ids, strata, self.val_fraction, self.test_fraction, self.seed)


def stratified(
    ids: Sequence[str],
    strata: npt.NDArray[np.int64],
    val_fraction: float,
    test_fraction: float,
    seed: int,
) -> list[str]:
    """N split names; every stratum keeps at least one row in train.

    Within a stratum the shares are met within one row; over all strata their rounding errors are
    carried on, so that sets of many small classes meet them too.

    Args:
        ids: N unique row ids.
        strata: (N,) stratum of each row, e.g. its class.
        val_fraction: share of val, 0..1.
        test_fraction: share of test, 0..1.
        seed: seed of the ranking.
    """
    order = np.lexsort((ranks(ids, seed), strata))
    names = np.full(len(ids), "train", dtype=object)
    bounds = np.flatnonzero(np.diff(strata[order])) + 1
    # Exact fractions: 0.1 + 0.2 style rounding must not move a row.
    shares = (Fraction(str(test_fraction)), Fraction(str(val_fraction)))
    owed = [Fraction(0), Fraction(0)]
    for members in np.split(order, bounds):
        start, room = 0, len(members) - 1
        for position, (share, name) in enumerate(zip(shares, ("test", "val"), strict=True)):
            exact = len(members) * share
            owed[position] += exact
            wanted = min(round(owed[position]), -(-exact.numerator // exact.denominator))
            taken = max(0, min(wanted, room))
            owed[position] -= taken
            names[members[start : start + taken]] = name
            start, room = start + taken, room - taken
    return list(names)


def rarest_label(
    offsets: npt.NDArray[np.int64], values: npt.NDArray[np.int32]
) -> npt.NDArray[np.int64]:
    """(N,) each row's rarest class over all rows, -1 without labels: strata of a multi-label set.

    Args:
        offsets: (N+1,) start of each row's labels in `values`.
        values: class indices, one row's after the other.
    """
    counts = np.bincount(values) if len(values) else np.zeros(1, np.int64)
    strata = np.full(len(offsets) - 1, -1, np.int64)
    rows = np.repeat(np.arange(len(strata)), np.diff(offsets))
    # Written from the most to the least frequent class: the last write, the rarest, stays.
    order = np.argsort(-counts[values], kind="stable")
    strata[rows[order]] = values[order]
    return strata


class CarveConfig(DatasetConfig):
    """A dataset with a test split but none for validation: that is carved out of train."""

    val_fraction: float = Field(default=0.1, ge=0, lt=1)
    """Share of every class's training images that becomes `val`, 0 up to but not 1. The test split
    is never used for it."""
    seed: NonNegativeInt = 0
    """Seed of the validation rows, 0 or larger."""


def carve(
    ids: Sequence[str],
    offsets: npt.NDArray[np.int64],
    values: npt.NDArray[np.int32],
    fraction: float,
    seed: int,
) -> npt.NDArray[np.bool_]:
    """(N,) mask of the training rows that become validation rows; several labels a row.

    Each class gives `fraction` of its rows, rounded, but at least one if it has two, and keeps at
    least one. Where that cannot all hold (the only rows of two classes are the same), keeping wins.
    Classes are served from the rarest to the most frequent, which is what is left to serve then.
    Independent of row order.

    Reference: Sechidis et al., On the Stratification of Multi-Label Data, 2011 (their iterative
    form, for one held-out share, with bounds instead of expected shares).

    Args:
        ids: N unique row ids.
        offsets: (N+1,) start of each row's labels in `values`.
        values: class indices, one row's after the other.
        fraction: share to hold out, 0 (nothing) up to but not 1.
        seed: seed of the ranking.
    """
    num_rows = len(ids)
    held = np.zeros(num_rows, bool)
    if fraction == 0:
        return held
    rank = ranks(ids, seed)
    labels = [values[offsets[row] : offsets[row + 1]].tolist() for row in range(num_rows)]
    members: dict[int, list[int]] = {}
    for row in np.argsort(rank, kind="stable").tolist():
        for label in labels[row] or [-1]:  # rows without a label are a class of their own
            members.setdefault(label, []).append(row)
    counts = {name: len(rows) for name, rows in members.items()}
    wanted = {
        name: min(max(1, round(fraction * count)), count - 1) for name, count in counts.items()
    }
    wanted[-1] = round(fraction * counts.get(-1, 0))
    have = dict.fromkeys(members, 0)

    def take(name: int, bounds: dict[int, int]) -> None:
        for row in members[name]:
            if have[name] >= wanted[name]:
                return
            own = labels[row] or [-1]
            if not held[row] and all(have[label] < bounds[label] for label in own):
                held[row] = True
                for label in own:
                    have[label] += 1

    spare = {name: count - 1 for name, count in counts.items()} | {-1: counts.get(-1, 0)}
    for name in sorted(members, key=lambda name: (counts[name], name)):
        take(name, wanted)  # first rows that overfill no class ...
        take(name, spare)  # ... then any row that leaves each of its classes one to train on
    return held
