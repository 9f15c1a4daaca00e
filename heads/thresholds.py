"""A threshold for each class, found on validation rows: coordinate by coordinate, for micro-F1.

Reference: the threshold search of systems "MultiCLIP": all thresholds start at 0.5; class by class,
80 candidates from 0.01 to 0.80 are tried with the other thresholds as they are, and the one with
the best micro-F1 stays. Departures: passes go on until none changes anything (each can only gain);
a class whose candidates gain nothing keeps what it has, so that there always is a threshold; equal
candidates are decided by nearness to 0.5, not by order.

Micro-F1 is 2 TP / (predicted + positive) over all classes, so a class's candidates only need its
own counts: rows are sorted once a class, and a candidate costs no look at any row.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

START = 0.5
"""Threshold before the search."""

CANDIDATES: npt.NDArray[np.float64] = np.linspace(0.01, 0.80, 80)
"""Probabilities that are tried for each class."""

_MOST_PASSES = 20


@dataclass(frozen=True)
class Search:
    """What a search found.

    Attributes:
        thresholds: (C,) float64 probabilities.
        before, after: micro-F1 at 0.5 and at `thresholds`, on the rows searched, 0..1.
    """

    thresholds: npt.NDArray[np.float64]
    before: float
    after: float


def search_thresholds(
    probabilities: npt.NDArray[np.floating], targets: npt.NDArray[np.uint8]
) -> Search:
    """Thresholds that make micro-F1 of these rows as good as single changes can.

    Args:
        probabilities: (N, C) 0..1, of validation rows: rows that trained would give thresholds
            that are too high for others.
        targets: (N, C) multi-hot.
    """
    num_classes = targets.shape[1]
    # The last candidate is the start, so that a class can keep it.
    candidates = np.append(CANDIDATES, START)
    hits = np.empty((num_classes, len(candidates)))
    chosen = np.empty_like(hits)
    for c in range(num_classes):
        hits[c], chosen[c] = _counts(probabilities[:, c], targets[:, c] > 0, candidates)
    num_positive = float(targets.sum(dtype=np.int64))
    preference = np.argsort(np.abs(candidates - START), kind="stable")
    current = np.full(num_classes, len(candidates) - 1)
    classes = np.arange(num_classes)
    total_hits, total_chosen = hits[:, -1].sum(), chosen[:, -1].sum()
    before = _f1(total_hits, total_chosen + num_positive)
    for _ in range(_MOST_PASSES):
        previous = current.copy()
        for c in range(num_classes):
            other_hits = total_hits - hits[c, current[c]]
            other_chosen = total_chosen - chosen[c, current[c]]
            f1 = 2 * (other_hits + hits[c]) / np.maximum(other_chosen + chosen[c] + num_positive, 1)
            best = preference[f1[preference].argmax()]
            if f1[best] > f1[current[c]]:
                current[c] = best
            total_hits = other_hits + hits[c, current[c]]
            total_chosen = other_chosen + chosen[c, current[c]]
        if (current == previous).all():
            break
    after = _f1(hits[classes, current].sum(), chosen[classes, current].sum() + num_positive)
    return Search(candidates[current], before, after)


def nearest_class(
    probabilities: npt.NDArray[np.floating], thresholds: float | npt.NDArray[np.floating]
) -> npt.NDArray[np.int64]:
    """(N,) class that lacks least to its threshold, or exceeds it most; equal ones by lower index.

    Args:
        probabilities: (N, C) 0..1.
        thresholds: one for all, or (C,).
    """
    gap = np.asarray(probabilities, np.float64) - thresholds
    closest: npt.NDArray[np.int64] = gap.argmax(1)
    return closest


def _counts(
    probabilities: npt.NDArray[np.floating],
    positive: npt.NDArray[np.bool_],
    candidates: npt.NDArray[np.float64],
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """True positives and predictions of one class at each candidate."""
    everywhere = np.sort(probabilities)
    hits = np.sort(probabilities[positive])
    num_chosen = len(everywhere) - np.searchsorted(everywhere, candidates, side="left")
    num_hits = len(hits) - np.searchsorted(hits, candidates, side="left")
    return num_hits.astype(np.float64), num_chosen.astype(np.float64)


def _f1(hits: float, denominator: float) -> float:
    return float(2 * hits / max(denominator, 1))
