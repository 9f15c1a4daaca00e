"""Head, medium and tail: the classes of a long-tailed set by their number of training images."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd

GROUPS = ("head", "medium", "tail")
"""The groups, from many training images to few."""

COLUMN = "group"
"""Class metadata column in which a dataset states its own groups."""

BOUNDARIES = (20, 100)
"""Smallest count of the medium and of the head group: the long-tail literature's ≥100 / 20..99 /
<20."""


def shot_groups(
    counts: npt.NDArray[np.integer],
    boundaries: tuple[int, int] = BOUNDARIES,
    groups: Sequence[str] | None = None,
) -> dict[str, npt.NDArray[np.bool_]]:
    """Masks (C,) of the head, medium and tail classes.

    Args:
        counts: (C,) training images of each class.
        boundaries: smallest count of the medium and of the head group.
        groups: C group names that are taken instead of the counts; None = count.
    """
    names = np.asarray(group_names(counts, boundaries) if groups is None else groups, dtype=object)
    return {group: np.asarray(names == group, bool) for group in GROUPS}


def group_names(
    counts: npt.NDArray[np.integer], boundaries: tuple[int, int] = BOUNDARIES
) -> list[str]:
    """C group names by training images; see `shot_groups`."""
    low, high = boundaries
    return ["head" if n >= high else "medium" if n >= low else "tail" for n in counts.tolist()]


def stated_groups(classes: pd.DataFrame) -> list[str] | None:
    """C groups that the class table states, None if it does not.

    A dataset defines its groups over its official training list. Counts of the rows that are left
    after carving out validation rows, or after picking a few shots, would move classes.
    """
    if COLUMN not in classes.columns:
        return None
    names = [str(name) for name in classes[COLUMN]]
    # Another meaning of the word (a user's own metadata) is no statement about the long tail.
    return names if names and set(names) <= set(GROUPS) else None
