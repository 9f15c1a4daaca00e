"""How scores become statements: one temperature, and one threshold a class, from validation rows.

Reference: Guo et al., On Calibration of Modern Neural Networks, 2017, section 4.2 (temperature
scaling: logits are divided by the one number that minimises the negative log-likelihood of
validation rows; the order of classes stays). Sigmoids of multi-label heads are scaled the same way.

`calibration.json` in a run folder holds both, with the figures before and after. Rows that a head
was trained on cannot fit them, and test rows must not: they come from the rows that picked the
epoch.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from heads.metrics import expected_calibration_error, multi_label_calibration_error
from heads.run_folder import LoadedRun, read_json, write_json
from heads.thresholds import search_thresholds

FILE = "calibration.json"
"""Name in a run folder."""

MOST_SCORES = 1 << 25
"""Scores that a single-label temperature is fitted to, at most (128 MiB of float32): 3,300 rows of
10,000 classes. One number needs no more."""

_RANGE = (1e-3, 1e3)
"""Temperatures that are looked at; rows that are all right would want 0."""


@dataclass(frozen=True)
class Calibration:
    """What validation rows say about a head's scores.

    Attributes:
        temperature: what logits are divided by before softmax or sigmoid, > 0.
        thresholds: (C,) probabilities after that division, from which on a class counts as present;
            None for single-label heads.
        split: rows it was fitted to. num_rows: how many.
        nll_before, nll_after: their negative log-likelihood in nats (mean over rows, or over rows
            and classes), without and with the temperature.
        ece_before, ece_after: their expected calibration error, 0..1.
        micro_f1_before, micro_f1_after: at 0.5 and at the thresholds; None for single-label heads.
    """

    temperature: float
    thresholds: list[float] | None
    split: str
    num_rows: int
    nll_before: float
    nll_after: float
    ece_before: float
    ece_after: float
    micro_f1_before: float | None = None
    micro_f1_after: float | None = None

    def write(self, folder: Path) -> None:
        """Writes `calibration.json` into a run folder, atomically."""
        write_json(folder / FILE, asdict(self))

    def threshold_array(self) -> npt.NDArray[np.float64]:
        """(C,) thresholds of a multi-label head."""
        return np.asarray(self.thresholds, np.float64)


def read_calibration(folder: Path) -> Calibration | None:
    """What a run folder holds; None for runs without (heads whose scores only rank, older runs).

    Raises:
        RunError: if the file is damaged.
    """
    if not (folder / FILE).is_file():
        return None
    record: dict[str, Any] = read_json(folder / FILE)
    return Calibration(**record)


def calibration_of(run: LoadedRun) -> Calibration | None:
    """What a loaded run's scores are calibrated by.

    None for weights other than the best, and for classes other than those it was trained on: both
    have other scores than those that were fitted.
    """
    trained_on = read_json(run.path / "head.json")["class_hash"]
    if run.weights != "best" or run.record["class_hash"] != trained_on:
        return None
    return read_calibration(run.path)


def fit_single_label(logits: Tensor, labels: Tensor, split: str) -> Calibration:
    """The temperature of a softmax head.

    Args:
        logits: (N, C) finite.
        labels: (N,) int64.
        split: name of the rows.
    """
    logits = logits.float()
    temperature, before, after = fit_temperature(logits, labels)

    def error(temperature: float) -> float:
        top = (logits / temperature).softmax(1).max(1)
        right = (top.indices == labels).cpu().numpy()
        return expected_calibration_error(top.values.cpu().numpy(), right)

    return Calibration(
        temperature=temperature,
        thresholds=None,
        split=split,
        num_rows=len(logits),
        nll_before=before,
        nll_after=after,
        ece_before=error(1.0),
        ece_after=error(temperature),
    )


def fit_multi_label(
    scores: npt.NDArray[np.float32], targets: npt.NDArray[np.uint8], split: str
) -> Calibration:
    """Temperature and thresholds of a sigmoid head.

    Args:
        scores: (N, C) logits, finite.
        targets: (N, C) multi-hot.
        split: name of the rows.
    """
    logits = torch.from_numpy(np.ascontiguousarray(scores))
    temperature, before, after = fit_temperature(logits, torch.from_numpy(targets))
    found = search_thresholds((logits / temperature).sigmoid().numpy(), targets)
    return Calibration(
        temperature=temperature,
        thresholds=found.thresholds.tolist(),
        split=split,
        num_rows=len(scores),
        nll_before=before,
        nll_after=after,
        ece_before=multi_label_calibration_error(scores, targets),
        ece_after=multi_label_calibration_error(scores, targets, temperature),
        micro_f1_before=found.before,
        micro_f1_after=found.after,
    )


def fit_temperature(logits: Tensor, targets: Tensor) -> tuple[float, float, float]:
    """The best temperature, and the negative log-likelihood at 1 and there, in nats.

    The likelihood is concave in 1 / temperature, so halving the interval in which its slope changes
    sign finds the best one, wherever it starts. Where it grows to the very end (all rows right, or
    a constant score), the end of the range is taken only if it is better than 1.

    Args:
        logits: (N, C) float32, finite.
        targets: (N,) int64 class indices, or (N, C) multi-hot.
    """
    low, high = 1 / _RANGE[1], 1 / _RANGE[0]
    if _slope(logits, targets, low) >= 0:
        inverse = low
    elif _slope(logits, targets, high) <= 0:
        inverse = high
    else:
        while high / low > 1 + 1e-4:
            middle = (low * high) ** 0.5
            if _slope(logits, targets, middle) > 0:
                high = middle
            else:
                low = middle
        inverse = (low * high) ** 0.5
    before = _nll(logits, targets, 1.0)
    after = _nll(logits, targets, inverse)
    return (1 / inverse, before, after) if after < before else (1.0, before, before)


def chosen_rows(num_rows: int, num_classes: int, seed: int) -> npt.NDArray[np.int64]:
    """Ascending row numbers whose scores fit into `MOST_SCORES`; drawn by `seed` if not all do."""
    most = max(1, MOST_SCORES // num_classes)
    if num_rows <= most:
        return np.arange(num_rows, dtype=np.int64)
    rng = np.random.default_rng(seed)
    return np.sort(rng.choice(num_rows, most, replace=False)).astype(np.int64)


def _blocks(logits: Tensor, targets: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
    step = max(1, (1 << 22) // logits.shape[1])
    starts = range(0, len(logits), step)
    return ((logits[start : start + step], targets[start : start + step]) for start in starts)


def _nll(logits: Tensor, targets: Tensor, inverse: float) -> float:
    total = 0.0
    for part, wanted in _blocks(logits, targets):
        if targets.ndim == 1:
            losses = F.cross_entropy(part * inverse, wanted, reduction="none")
        else:
            losses = F.softplus(part * inverse) - wanted * part * inverse
        total += float(losses.sum(dtype=torch.float64))
    return total / targets.numel()


def _slope(logits: Tensor, targets: Tensor, inverse: float) -> float:
    """Derivative of the summed negative log-likelihood by 1 / temperature."""
    total = 0.0
    for part, wanted in _blocks(logits, targets):
        if targets.ndim == 1:
            expected = ((part * inverse).softmax(1) * part).sum(1)
            slope = expected - part.gather(1, wanted[:, None])[:, 0]
        else:
            slope = ((part * inverse).sigmoid() - wanted) * part
        total += float(slope.sum(dtype=torch.float64))
    return total
