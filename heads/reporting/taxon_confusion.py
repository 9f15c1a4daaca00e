"""What a head takes for what, class by class and taxon by taxon."""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from featcache.reporting import style
from featcache.reporting.confusion import draw_shares
from heads.metrics import IntArray

MOST_DRAWN = 60
"""Rows of a matrix, at most; beyond, those with the most errors."""


def taxonomic_order(codes: Mapping[str, IntArray], num_classes: int) -> IntArray:
    """(C,) class numbers such that taxa stand together at every level, where levels nest.

    Args:
        codes: level -> (C,) taxon of each class, -1 = none; from fine to coarse.
        num_classes: C.
    """
    keys = [np.arange(num_classes), *codes.values()]
    return np.lexsort(keys).astype(np.int64)


def draw_classes(
    labels: IntArray,
    predicted: IntArray,
    names: Sequence[str],
    codes: Mapping[str, IntArray],
) -> Figure:
    """The classes in the order of their taxonomy; frames hold what stays within a taxon.

    Args:
        labels: (N,) true class of each row.
        predicted: (N,) class it was taken for.
        names: C class names.
        codes: level -> (C,) taxon of each class, from fine to coarse; may be empty.
    """
    num_classes = len(names)
    shown = _most_confused(labels, predicted, num_classes)
    order = taxonomic_order(codes, num_classes)
    order = order[np.isin(order, shown)]
    made = draw_shares(_shares(labels, predicted, order), [names[index] for index in order])
    axes = made.axes[0]
    for level, width in zip(codes, (1.2, 2.0), strict=False):
        taxa = codes[level][order]
        ends = np.flatnonzero(np.append(taxa[1:] != taxa[:-1], True))
        start = 0
        for end in ends.tolist():
            side = end + 1 - start
            if side > 1 and taxa[start] >= 0:
                corner, color = (start - 0.5, start - 0.5), style.PALETTE[1]
                axes.add_patch(
                    Rectangle(corner, side, side, fill=False, ec=color, lw=width, zorder=4)
                )
            start = end + 1
    return made


def draw_taxa(labels: IntArray, predicted: IntArray, code: IntArray, taxa: Sequence[str]) -> Figure:
    """One level's taxa; rows whose true class has none there are left out.

    Args:
        labels: (N,) true class of each row.
        predicted: (N,) class it was taken for; without a taxon it counts as an error elsewhere.
        code: (C,) taxon of each class, -1 = none.
        taxa: their names.
    """
    kept = code[labels] >= 0
    true, taken = code[labels[kept]], code[predicted[kept]]
    order = np.sort(_most_confused(true, taken, len(taxa)))
    return draw_shares(_shares(true, taken, order), [taxa[index] for index in order])


def largest(labels: IntArray, predicted: IntArray, num: int) -> list[tuple[int, int, int]]:
    """(true class, class it was taken for, rows), most rows first."""
    wrong = labels != predicted
    pairs, counts = np.unique(
        np.stack([labels[wrong], predicted[wrong]], 1), axis=0, return_counts=True
    )
    order = np.argsort(-counts, kind="stable")[:num]
    return [(int(pairs[i, 0]), int(pairs[i, 1]), int(counts[i])) for i in order]


def _most_confused(true: IntArray, taken: IntArray, num: int) -> IntArray:
    """At most `MOST_DRAWN` of `num` numbers: those in the largest confusions, pair by pair."""
    if num <= MOST_DRAWN:
        return np.arange(num, dtype=np.int64)
    known = taken >= 0
    pairs = largest(true[known], taken[known], 10 * MOST_DRAWN)
    ends = dict.fromkeys(end for pair in pairs for end in pair[:2])
    return np.asarray(list(ends)[:MOST_DRAWN], np.int64)


def _shares(true: IntArray, taken: IntArray, order: IntArray) -> npt.NDArray[np.float64]:
    """(n, n) shares of the rows of `order[i]` that were taken for `order[j]`."""
    size = int(max(true.max(initial=0), taken.max(initial=0), order.max(initial=0))) + 1
    place = np.full(size, -1)
    place[order] = np.arange(len(order))
    totals = np.bincount(true, minlength=size)[order]
    kept = (taken >= 0) & (place[true] >= 0)
    kept[kept] = place[taken[kept]] >= 0
    counts = np.zeros((len(order), len(order)))
    np.add.at(counts, (place[true[kept]], place[taken[kept]]), 1)
    return counts / np.maximum(totals, 1)[:, None]
