"""Metrics of single-label and multi-label classification.

Single-label metrics take two steps, so that 10,000 classes never need all scores at once:
`score_rows` turns a batch of logits into a few numbers a row, `single_label_metrics` aggregates
them. Multi-label metrics rank a class's rows against each other and therefore take all scores.

Every metric is a share in 0..1. A metric that is not defined (a group without classes) is left out.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor

from featcache.shot_groups import BOUNDARIES, shot_groups

FloatArray = npt.NDArray[np.floating]
IntArray = npt.NDArray[np.integer]

_TALL = 512
"""Rows from which on average precision is counted column by column."""

LEVELS = ("genus", "family", "order", "class", "phylum", "kingdom", "supercategory")
"""Class metadata columns that are read as taxonomy, from fine to coarse."""


@dataclass(frozen=True)
class Taxonomy:
    """The taxa that classes belong to, level by level.

    Attributes:
        codes: level name -> (C,) int64 taxon of each class, -1 where the class table says nothing.
    """

    codes: Mapping[str, npt.NDArray[np.int64]]

    @classmethod
    def from_classes(cls, classes: pd.DataFrame, levels: Sequence[str] | None = None) -> "Taxonomy":
        """The levels among `levels` (default `LEVELS`) that group at least two classes.

        Args:
            classes: class table, C rows.
            levels: metadata columns, from fine to coarse.

        Raises:
            KeyError: if a level asked for by name is not a column.
        """
        codes = {}
        for level in LEVELS if levels is None else levels:
            if level not in classes.columns:
                if levels is not None:
                    raise KeyError(level)
                continue
            names = classes[level].astype(str).to_numpy(dtype=object)
            known = names != ""
            taxa, inverse = np.unique(names[known], return_inverse=True)
            if levels is None and not 0 < len(taxa) < known.sum():
                continue  # all empty, or one taxon a class: says nothing beyond top-1
            code = np.full(len(names), -1, np.int64)
            code[known] = inverse
            codes[level] = code
        return cls(codes)


@dataclass(frozen=True)
class RowScores:
    """What single-label metrics need of each row; all arrays have one entry a row.

    Attributes:
        label: true class. predicted: class of the best score, the lowest index among equals.
        rank: how many classes come before the true one (0 = right answer).
        confidence: softmax probability of `predicted`.
        margin: `confidence` minus the runner-up's probability.
        calibrated: probability of `predicted` after temperature scaling; see `heads.calibration`.
        taxa: level -> taxon with the largest sum of probabilities.
    """

    label: npt.NDArray[np.int64]
    predicted: npt.NDArray[np.int64]
    rank: npt.NDArray[np.int64]
    confidence: npt.NDArray[np.float32]
    margin: npt.NDArray[np.float32]
    calibrated: npt.NDArray[np.float32]
    taxa: Mapping[str, npt.NDArray[np.int64]]

    def __len__(self) -> int:
        return len(self.label)

    @classmethod
    def concatenate(cls, parts: Iterable["RowScores"]) -> "RowScores":
        """The rows of all parts, in order."""
        parts = list(parts)
        plain = [f.name for f in fields(cls) if f.name != "taxa"]
        return cls(
            **{name: np.concatenate([getattr(part, name) for part in parts]) for name in plain},
            taxa={
                level: np.concatenate([part.taxa[level] for part in parts])
                for level in parts[0].taxa
            },
        )


def target_rank(logits: Tensor, labels: Tensor) -> Tensor:
    """(B,) int64 number of classes that come before the true one; equal scores by lower index.

    Args:
        logits: (B, C).
        labels: (B,) int64.
    """
    own = logits.gather(1, labels[:, None])
    rank = (logits > own).sum(1)
    ties = logits == own
    if int(ties.sum()) > len(labels):
        index = torch.arange(logits.shape[1], device=logits.device)
        rank = rank + (ties & (index < labels[:, None])).sum(1)
    return rank


def score_rows(
    logits: Tensor, labels: Tensor, taxonomy: Taxonomy | None = None, temperature: float = 1.0
) -> RowScores:
    """What single-label metrics need of each row of a batch.

    Args:
        logits: (B, C) finite.
        labels: (B,) int64.
        taxonomy: levels for which probabilities are summed; None = none.
        temperature: what logits are divided by for `calibrated`, > 0.
    """
    logits = logits.float()
    probabilities = logits.softmax(1)
    top = probabilities.topk(min(2, logits.shape[1]), dim=1).values
    runner_up = top[:, 1] if top.shape[1] > 1 else torch.zeros_like(top[:, 0])
    taxa = {}
    for level, code in ({} if taxonomy is None else taxonomy.codes).items():
        known = torch.from_numpy(np.flatnonzero(code >= 0)).to(logits.device)
        index = torch.from_numpy(code[code >= 0]).to(logits.device)
        sums = probabilities.new_zeros(len(logits), int(code.max()) + 1)
        sums.index_add_(1, index, probabilities[:, known])
        taxa[level] = sums.argmax(1).cpu().numpy()
    calibrated = top[:, 0]
    if temperature != 1.0:
        scaled = logits / temperature
        calibrated = (scaled.amax(1) - scaled.logsumexp(1)).exp()
    return RowScores(
        label=labels.cpu().numpy(),
        predicted=logits.argmax(1).cpu().numpy(),
        rank=target_rank(logits, labels).cpu().numpy(),
        confidence=top[:, 0].cpu().numpy(),
        margin=(top[:, 0] - runner_up).cpu().numpy(),
        calibrated=calibrated.cpu().numpy(),
        taxa=taxa,
    )


def per_class_accuracy(rows: RowScores, num_classes: int) -> npt.NDArray[np.float64]:
    """(C,) share of each class's rows that are right; NaN for classes without rows."""
    support = np.bincount(rows.label, minlength=num_classes)
    right = np.bincount(rows.label[rows.rank == 0], minlength=num_classes)
    with np.errstate(invalid="ignore"):
        return right / support


def expected_calibration_error(
    confidence: FloatArray, correct: npt.NDArray[np.bool_], num_bins: int = 15
) -> float:
    """Mean |accuracy − confidence| over equally wide bins of confidence, weighted by their rows.

    Reference: Guo et al., On Calibration of Modern Neural Networks, 2017, eq. 3.
    """
    bins = np.clip(np.ceil(confidence * num_bins).astype(np.int64) - 1, 0, num_bins - 1)
    gap = np.bincount(bins, correct.astype(np.float64), num_bins) - np.bincount(
        bins, confidence.astype(np.float64), num_bins
    )
    return float(np.abs(gap).sum() / len(confidence))


def single_label_metrics(
    rows: RowScores,
    counts: IntArray,
    boundaries: tuple[int, int] = BOUNDARIES,
    taxonomy: Taxonomy | None = None,
    groups: Sequence[str] | None = None,
) -> dict[str, float]:
    """All single-label metrics by name.

    `top1`, `top5`; `balanced_accuracy` = mean over classes with rows; `mean_margin`; `ece`;
    `top1_head`, `top1_medium`, `top1_tail` = means of the groups' per-class accuracies, with
    `num_head_classes` and so on; for each taxonomy level `<level>` = the predicted class's taxon is
    right, and `<level>_summed` = the taxon with the largest summed probability is right. Rows whose
    true class has no taxon at a level do not count there.

    Args:
        rows: scores of at least one row.
        counts: (C,) training images of each class.
        boundaries: see `shot_groups`.
        taxonomy: the levels that `rows.taxa` was made with.
        groups: C group names that are taken instead of the counts; None = count.
    """
    accuracy = per_class_accuracy(rows, len(counts))
    seen = ~np.isnan(accuracy)
    metrics = {
        "num_rows": len(rows),
        "top1": float((rows.rank < 1).mean()),
        "top5": float((rows.rank < 5).mean()),
        "balanced_accuracy": float(accuracy[seen].mean()),
        "mean_margin": float(rows.margin.mean(dtype=np.float64)),
        "ece": expected_calibration_error(rows.confidence, rows.rank == 0),
    }
    metrics |= _group_means("top1", accuracy, shot_groups(counts, boundaries, groups))
    for level, code in ({} if taxonomy is None else taxonomy.codes).items():
        truth = code[rows.label]
        known = truth >= 0
        if known.any():
            mapped, summed = code[rows.predicted], rows.taxa[level]
            metrics[level] = float((mapped == truth)[known].mean())
            metrics[f"{level}_summed"] = float((summed == truth)[known].mean())
    return metrics


def average_precision(
    scores: FloatArray, targets: npt.NDArray[np.uint8]
) -> npt.NDArray[np.float64]:
    """(C,) AP of each column: Σₙ (Rₙ − Rₙ₋₁) Pₙ over distinct scores; NaN without a positive.

    Rows with equal scores enter together, so their order does not matter.

    Args:
        scores: (N, C) any monotone scores, finite.
        targets: (N, C) 1 = positive.
    """
    num_rows, num_classes = scores.shape
    result = np.full(num_classes, np.nan)
    if num_rows >= _TALL:  # sorting values alone is far faster than finding their order
        for c in range(num_classes):
            result[c] = _column_precision(scores[:, c], targets[:, c] > 0)
        return result
    step = max(1, 2**24 // max(num_rows, 1))
    position = np.arange(num_rows)[:, None]
    for start in range(0, num_classes, step):
        part = scores[:, start : start + step]
        order = np.argsort(-part, axis=0, kind="stable")
        ranked = np.take_along_axis(part, order, 0)
        hits = np.take_along_axis(targets[:, start : start + step], order, 0) > 0
        last = np.concatenate(
            [ranked[1:] != ranked[:-1], np.ones((1, part.shape[1]), bool)]
        )  # last row of each run of equal scores
        end = np.where(last, position, num_rows)
        end = np.minimum.accumulate(end[::-1], axis=0)[::-1]
        precision = np.take_along_axis(np.cumsum(hits, axis=0), end, 0) / (end + 1)
        positives = hits.sum(0)
        with np.errstate(invalid="ignore"):
            result[start : start + step] = (precision * hits).sum(0) / positives
    return result


def _column_precision(scores: FloatArray, positive: npt.NDArray[np.bool_]) -> float:
    """AP of (N,) scores: the mean over positives of the precision where each of them enters."""
    own = np.sort(scores[positive])
    if not len(own):
        return np.nan
    above = len(scores) - np.searchsorted(np.sort(scores), own, side="left")
    hits = len(own) - np.searchsorted(own, own, side="left")
    return float((hits / above).mean())


def multi_label_metrics(
    scores: FloatArray,
    targets: npt.NDArray[np.uint8],
    counts: IntArray,
    boundaries: tuple[int, int] = BOUNDARIES,
    threshold: float | None = 0.5,
    groups: Sequence[str] | None = None,
    predicted: npt.NDArray[np.bool_] | None = None,
) -> dict[str, float]:
    """All multi-label metrics by name.

    `map` = mean AP over classes with at least one positive, `num_classes_skipped` = the others;
    `map_head`, `map_medium`, `map_tail`; `map_rows` = mean AP over rows with a label. `ece` = that
    of all N x C sigmoids as statements about their class. At the
    threshold, over the whole split: micro, macro and weighted precision, recall and F1 (those of
    scikit-learn with `zero_division=0`), the same under the literature's names `cp`, `cr`, `op`,
    `or`, `of1`, and CF1 in both conventions: `cf1` = harmonic mean of CP and CR, `macro_f1` = mean
    of the classes' F1.

    Args:
        scores: (N, C) logits.
        targets: (N, C) multi-hot.
        counts: (C,) training images of each class.
        boundaries: see `shot_groups`.
        threshold: probability from which on a class counts as predicted, in (0, 1); None = scores
            that only rank: without calibration error and the metrics at a threshold.
        groups: C group names that are taken instead of the counts; None = count.
        predicted: (N, C) what counts as predicted instead; see `predictions` and `best_classes`.
    """
    ap = average_precision(scores, targets)
    labelled = targets.any(1)
    metrics = {
        "num_rows": len(scores),
        "map": float(np.nanmean(ap)) if not np.isnan(ap).all() else 0.0,
        "num_classes_skipped": int(np.isnan(ap).sum()),
    }
    metrics |= _group_means("map", ap, shot_groups(counts, boundaries, groups))
    if labelled.any():
        by_row = average_precision(scores[labelled].T, targets[labelled].T)
        metrics["map_rows"] = float(by_row.mean())
    if threshold is not None:
        metrics["ece"] = multi_label_calibration_error(scores, targets)
        predicted = predictions(scores, threshold) if predicted is None else predicted
    return metrics if predicted is None else metrics | threshold_metrics(predicted, targets)


def threshold_metrics(
    predicted: npt.NDArray[np.bool_], targets: npt.NDArray[np.uint8]
) -> dict[str, float]:
    """Precision, recall and F1 of all N rows by name; see `multi_label_metrics`.

    Args:
        predicted: (N, C).
        targets: (N, C) multi-hot.
    """
    precision, recall, f1 = precision_recall_f1(predicted, targets)
    support = targets.sum(0, dtype=np.float64)
    weights = support / max(support.sum(), 1.0)
    hits = float((predicted & (targets > 0)).sum())
    overall_precision = _share(hits, float(predicted.sum()))
    overall_recall = _share(hits, float(support.sum()))
    overall_f1 = _harmonic(overall_precision, overall_recall)
    macro_precision, macro_recall = float(precision.mean()), float(recall.mean())
    return {
        "micro_precision": overall_precision,
        "micro_recall": overall_recall,
        "micro_f1": overall_f1,
        "macro_precision": macro_precision,
        "macro_recall": macro_recall,
        "macro_f1": float(f1.mean()),
        "weighted_precision": float(precision @ weights),
        "weighted_recall": float(recall @ weights),
        "weighted_f1": float(f1 @ weights),
        "cp": macro_precision,
        "cr": macro_recall,
        "cf1": _harmonic(macro_precision, macro_recall),
        "op": overall_precision,
        "or": overall_recall,
        "of1": overall_f1,
    }


def predictions(
    scores: FloatArray, threshold: float | FloatArray, temperature: float = 1.0
) -> npt.NDArray[np.bool_]:
    """(N, C) which sigmoids reach their threshold.

    Args:
        scores: (N, C) logits.
        threshold: probability in (0, 1), one for all or (C,).
        temperature: what logits are divided by before the sigmoid, > 0.
    """
    threshold = np.asarray(threshold, np.float64)
    reached: npt.NDArray[np.bool_] = scores >= temperature * np.log(threshold / (1 - threshold))
    return reached


def best_classes(scores: FloatArray, num: int) -> npt.NDArray[np.bool_]:
    """(N, C) the `num` best scores of each row; equal ones by lower index."""
    order = np.argsort(-scores, axis=1, kind="stable")[:, :num]
    chosen = np.zeros(scores.shape, bool)
    np.put_along_axis(chosen, order, True, 1)
    return chosen


def multi_label_calibration_error(
    scores: FloatArray, targets: npt.NDArray[np.uint8], temperature: float = 1.0
) -> float:
    """`expected_calibration_error` of all N x C sigmoids as statements that the class is there."""
    present = _sigmoid(scores / temperature).ravel()
    return expected_calibration_error(present, targets.ravel() > 0)


def _sigmoid(scores: FloatArray) -> FloatArray:
    result: FloatArray = 0.5 * (1 + np.tanh(0.5 * scores))
    return result


def precision_recall_f1(
    predicted: npt.NDArray[np.bool_], targets: npt.NDArray[np.uint8]
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """(C,) precision, recall and F1 of each class; 0 where the denominator is 0."""
    positive = targets > 0
    hits = (predicted & positive).sum(0).astype(np.float64)
    num_predicted, num_positive = predicted.sum(0), positive.sum(0)
    precision = hits / np.maximum(num_predicted, 1)
    recall = hits / np.maximum(num_positive, 1)
    return precision, recall, 2 * hits / np.maximum(num_predicted + num_positive, 1)


def _group_means(
    name: str, values: FloatArray, groups: Mapping[str, npt.NDArray[np.bool_]]
) -> dict[str, float]:
    result: dict[str, float] = {}
    for group, mask in groups.items():
        kept = mask & ~np.isnan(values)
        result[f"num_{group}_classes"] = int(kept.sum())
        if kept.any():
            result[f"{name}_{group}"] = float(values[kept].mean())
    return result


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _harmonic(a: float, b: float) -> float:
    return 2 * a * b / (a + b) if a + b else 0.0
