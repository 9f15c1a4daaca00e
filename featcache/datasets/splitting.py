"""Train, val and test for datasets that come without: seeded, stratified, independent of row order.

Rows of a class are ranked by a hash over seed and id, so that a row keeps its split when the
dataset is read in another order, and most rows keep it when others are added.
"""

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import xxhash
from pydantic import Field, NonNegativeInt, model_validator

from featcache.datasets.base import DatasetConfig

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
    prefix = f"{seed}:"
    ranks = np.fromiter(
        (xxhash.xxh3_64_intdigest((prefix + text).encode()) for text in ids), np.uint64, len(ids)
    )
    order = np.lexsort((ranks, strata))
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
