"""Bootstrap: how far metrics would move on other rows of the same kind.

Rows are drawn with replacement, as many as there are; a drawn row counts as often as it was drawn.
Metrics are therefore computed from weights, (N, R) for R draws at a time, without copying a row.
The draws follow from the seed alone: two models scored on the same rows with the same seed see the
same draws, so that the differences of their replicates are paired.

Reference: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapters 6 and 13
(percentile intervals).
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse

from featcache.shot_groups import BOUNDARIES, shot_groups
from heads.metrics import FloatArray, IntArray, RowScores, Taxonomy, average_precision

Replicates = dict[str, npt.NDArray[np.float64]]
"""Metric name -> (R,) its value on each draw; NaN where it is not defined there."""

_BLOCK_VALUES = 1 << 22
"""Weights held at a time: 16 MiB of float32, so that the passes over them stay in the cache."""


def draws(num_rows: int, num: int, seed: int) -> Iterator[npt.NDArray[np.float32]]:
    """(N, r) how often each row was drawn, `num` draws in all, some columns at a time.

    Args:
        num_rows: N.
        num: R.
        seed: of the draws; they do not depend on how many come at a time.
    """
    rng = np.random.default_rng(seed)
    step = max(1, min(num, _BLOCK_VALUES // num_rows))
    for start in range(0, num, step):
        block = np.empty((num_rows, min(step, num - start)), np.float32)
        for column in range(block.shape[1]):
            drawn = rng.integers(0, num_rows, num_rows)
            block[:, column] = np.bincount(drawn, minlength=num_rows)
        yield block


def percentile_intervals(
    replicates: Mapping[str, FloatArray], confidence: float = 0.95
) -> dict[str, tuple[float, float]]:
    """The middle `confidence` (0..1) of each metric's replicates, as (low, high).

    A metric that is undefined on some draws is described by the others; on all: left out.
    """
    tail = 50 * (1 - confidence)
    found = {}
    for name, values in replicates.items():
        defined = values[~np.isnan(values)]
        if len(defined):
            low, high = np.percentile(defined, [tail, 100 - tail])
            found[name] = (float(low), float(high))
    return found


def two_sided_p(differences: FloatArray) -> float:
    """How likely replicates of a difference fall on the far side of 0, both sides counted.

    2 min(P(d <= 0), P(d >= 0)) with one added draw on each side, so that it is never 0.
    """
    defined = differences[~np.isnan(differences)]
    below = (1 + int((defined <= 0).sum())) / (1 + len(defined))
    above = (1 + int((defined >= 0).sum())) / (1 + len(defined))
    return min(1.0, 2 * min(below, above))


def single_label_replicates(
    rows: RowScores,
    counts: IntArray,
    boundaries: tuple[int, int] = BOUNDARIES,
    taxonomy: Taxonomy | None = None,
    groups: Sequence[str] | None = None,
    *,
    num: int,
    seed: int = 0,
) -> Replicates:
    """Every share of `single_label_metrics` on each of `num` draws, and `ece_calibrated`.

    Args:
        rows: scores of N rows.
        counts: (C,) training images of each class.
        boundaries: see `shot_groups`.
        taxonomy: the levels that `rows.taxa` was made with.
        groups: C group names that are taken instead of the counts; None = count.
        num: R.
        seed: of the draws.
    """
    num_rows, num_classes = len(rows), len(counts)
    hits = rows.rank < 1
    columns: dict[str, tuple[npt.NDArray[Any], npt.NDArray[np.bool_] | None]] = {
        "top1": (hits, None),
        "top5": (rows.rank < 5, None),
        "mean_margin": (rows.margin, None),
    }
    for level, code in ({} if taxonomy is None else taxonomy.codes).items():
        truth = code[rows.label]
        known = truth >= 0
        if known.any():
            columns[level] = ((code[rows.predicted] == truth) & known, known)
            columns[f"{level}_summed"] = ((rows.taxa[level] == truth) & known, known)
    values = np.stack([value for value, _ in columns.values()], 1).astype(np.float32)
    ones = np.ones(num_rows, bool)
    bases = np.stack([ones if known is None else known for _, known in columns.values()], 1)
    owner = sparse.csr_matrix(
        (np.ones(num_rows, np.float32), (rows.label, np.arange(num_rows))),
        shape=(num_classes, num_rows),
    )
    masks = shot_groups(counts, boundaries, groups)
    gaps = {
        name: _gap_matrix(confidence, hits)
        for name, confidence in (("ece", rows.confidence), ("ece_calibrated", rows.calibrated))
    }
    found: dict[str, list[FloatArray]] = {}
    for weights in draws(num_rows, num, seed):
        means = _ratio(values.T @ weights, bases.T.astype(np.float32) @ weights)
        for name, row in zip(columns, means, strict=True):
            found.setdefault(name, []).append(row)
        accuracy = _ratio(owner @ (weights * hits[:, None]), owner @ weights)
        found.setdefault("balanced_accuracy", []).append(_column_means(accuracy))
        for group, mask in masks.items():
            found.setdefault(f"top1_{group}", []).append(_column_means(accuracy[mask]))
        for name, gap in gaps.items():
            found.setdefault(name, []).append(np.abs(gap @ weights).sum(0) / num_rows)
    return _joined(found)


def multi_label_replicates(
    scores: FloatArray,
    targets: npt.NDArray[np.uint8],
    counts: IntArray,
    boundaries: tuple[int, int] = BOUNDARIES,
    groups: Sequence[str] | None = None,
    predicted: npt.NDArray[np.bool_] | None = None,
    *,
    num: int,
    seed: int = 0,
) -> Replicates:
    """Mean average precisions on each of `num` draws, and micro and macro F1.

    A class counts in a draw's mAP if a positive of it was drawn.

    Args:
        scores: (N, C) logits.
        targets: (N, C) multi-hot.
        counts: (C,) training images of each class.
        boundaries: see `shot_groups`.
        groups: C group names that are taken instead of the counts; None = count.
        predicted: (N, C) what counts as predicted; None = without precision, recall and F1.
        num: R.
        seed: of the draws.
    """
    masks = shot_groups(counts, boundaries, groups)
    labelled = targets.any(1)
    row_ap = np.zeros(len(scores), np.float32)
    if labelled.any():
        row_ap[labelled] = average_precision(scores[labelled].T, targets[labelled].T)
    rankings = [_Ranking(scores[:, c], targets[:, c] > 0) for c in range(scores.shape[1])]
    found: dict[str, list[FloatArray]] = {}
    for weights in draws(len(scores), num, seed):
        ap = np.stack([ranking.average_precision(weights) for ranking in rankings])
        found.setdefault("map", []).append(_column_means(ap))
        for group, mask in masks.items():
            found.setdefault(f"map_{group}", []).append(_column_means(ap[mask]))
        base = labelled.astype(np.float32) @ weights
        found.setdefault("map_rows", []).append(_ratio(row_ap @ weights, base))
        if predicted is not None:
            for name, value in _threshold_replicates(predicted, targets, weights).items():
                found.setdefault(name, []).append(value)
    return _joined(found)


class _Ranking:
    """One class's rows from the best score to the worst, for average precision under weights."""

    def __init__(self, scores: FloatArray, positive: npt.NDArray[np.bool_]) -> None:
        self._order = np.argsort(-scores, kind="stable")
        ranked = scores[self._order]
        last = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))  # ends of equal scores
        places = np.flatnonzero(positive[self._order])
        self._ends = last[np.searchsorted(last, places)]
        self._found = np.searchsorted(places, self._ends, side="right") - 1
        self._positives = self._order[places]

    def average_precision(self, weights: npt.NDArray[np.float32]) -> FloatArray:
        """(r,) AP where row i stands `weights[i]` times; NaN where no positive is left.

        Args:
            weights: (N, r) whole numbers, below 2**24 in sum, so that float32 holds them.
        """
        if not len(self._positives):
            return np.full(weights.shape[1], np.nan)
        own = weights[self._positives]
        before = np.cumsum(weights[self._order], axis=0)[self._ends]
        hits = np.cumsum(own, axis=0)[self._found]
        return _ratio((own * hits / np.maximum(before, 1)).sum(0), own.sum(0))


def _threshold_replicates(
    predicted: npt.NDArray[np.bool_],
    targets: npt.NDArray[np.uint8],
    weights: npt.NDArray[np.float32],
) -> Replicates:
    """Precision, recall and F1, (r,) each, by the names of `threshold_metrics`."""
    positive = targets > 0
    hits = ((predicted & positive).astype(np.float32).T @ weights).astype(np.float64)
    chosen = (predicted.astype(np.float32).T @ weights).astype(np.float64)
    wanted = (positive.astype(np.float32).T @ weights).astype(np.float64)
    precision, recall = hits / np.maximum(chosen, 1), hits / np.maximum(wanted, 1)
    f1 = 2 * hits / np.maximum(chosen + wanted, 1)
    all_hits, all_chosen, all_wanted = hits.sum(0), chosen.sum(0), wanted.sum(0)
    return {
        "micro_precision": all_hits / np.maximum(all_chosen, 1),
        "micro_recall": all_hits / np.maximum(all_wanted, 1),
        "micro_f1": 2 * all_hits / np.maximum(all_chosen + all_wanted, 1),
        "macro_precision": precision.mean(0),
        "macro_recall": recall.mean(0),
        "macro_f1": f1.mean(0),
    }


def _gap_matrix(confidence: FloatArray, correct: npt.NDArray[np.bool_]) -> sparse.csr_matrix:
    """(bins, N) accuracy minus confidence of each row, in its bin of confidence."""
    num_bins = 15
    bins = np.clip(np.ceil(confidence * num_bins).astype(np.int64) - 1, 0, num_bins - 1)
    gap = correct.astype(np.float32) - confidence
    place = np.arange(len(bins))
    return sparse.csr_matrix((gap, (bins, place)), shape=(num_bins, len(bins)))


def _ratio(part: FloatArray, whole: FloatArray) -> FloatArray:
    """The quotient in float64; NaN where `whole` is 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        result: FloatArray = np.asarray(part, np.float64) / np.asarray(whole, np.float64)
    return result


def _column_means(values: FloatArray) -> FloatArray:
    """(r,) mean over the rows that are not NaN; NaN where all are, or there is none."""
    defined = ~np.isnan(values)
    return _ratio(np.where(defined, values, 0.0).sum(0), defined.sum(0))


def _joined(found: Mapping[str, list[FloatArray]]) -> Replicates:
    joined = {name: np.concatenate(parts).astype(np.float64) for name, parts in found.items()}
    return {name: values for name, values in joined.items() if not np.isnan(values).all()}
