"""Scores as a table: the best classes of each row, and those that count as present."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor

from featcache.prediction_table import table_bytes
from heads.base import Features
from heads.calibration import calibration_of
from heads.run_folder import LoadedRun, RunError, write_atomic
from heads.thresholds import nearest_class


@dataclass(frozen=True)
class Unreadable:
    """A row that could not be predicted, and why."""

    id: str
    path: str
    reason: str


@dataclass(frozen=True)
class Rule:
    """How scores become statements.

    Attributes:
        top_k: classes listed, best first.
        thresholds: probability from which on a class counts as present, one for all or (C,); None
            where none can be said.
        temperature: what logits are divided by before they become probabilities, > 0.
    """

    top_k: int = 5
    thresholds: float | npt.NDArray[np.floating] | None = 0.5
    temperature: float = 1.0


def rule_of(
    run: LoadedRun, top_k: int, threshold: float | Literal["searched"] | None, scaled: bool = True
) -> Rule:
    """The rule that options mean for a head.

    Args:
        run: trained head.
        top_k: classes listed.
        threshold: stated by the user; "searched" = one a class, as the training searched them; None
            = 0.5, unless the head's logits only rank, in which case no class can be said to be
            present.
        scaled: divide by the temperature that the training fitted, if it did. Searched thresholds
            move along, so that the same classes are present either way.

    Raises:
        RunError: if searched thresholds are asked for and there are none.
    """
    calibration = calibration_of(run)
    temperature = calibration.temperature if calibration is not None and scaled else 1.0
    if run.task != "multi_label":
        return Rule(top_k, None, temperature)
    if threshold is None:
        return Rule(top_k, 0.5 if run.head.has_probabilities else None, temperature)
    if threshold != "searched":
        return Rule(top_k, threshold, temperature)
    if calibration is None or calibration.thresholds is None:
        raise RunError(
            f"threshold=searched: {run.path} holds no searched thresholds of these weights and "
            "classes; train it again, or give a probability such as 0.5"
        )
    searched = calibration.threshold_array()
    if not scaled:
        searched = 1 / (1 + (1 / searched - 1) ** calibration.temperature)
    return Rule(top_k, searched, temperature)


@torch.inference_mode()
def probabilities(
    run: LoadedRun, batches: Iterator[Features], temperature: float = 1.0
) -> Iterator[Tensor]:
    """(b, C) probabilities of each batch that has rows, on the CPU.

    Args:
        run: trained head.
        batches: features as it reads them.
        temperature: see `Rule`.

    Raises:
        RunError: if a score is NaN or infinite.
    """
    for features in batches:
        if not len(features[0]):
            continue
        logits = run.head(*features)
        if not torch.isfinite(logits).all():
            raise RunError(f"{run.path}: the head gives NaN or infinite scores; train it again")
        logits = logits / temperature
        scores = logits.sigmoid() if run.task == "multi_label" else logits.softmax(1)
        yield scores.cpu()


def tabulate(
    run: LoadedRun,
    ids: Sequence[str],
    paths: Sequence[str],
    scores: Iterator[Tensor],
    rule: Rule,
) -> pd.DataFrame:
    """One line a row: id, path, class_1, probability_1, class_2, ….

    In a multi-label set also `classes`, a list of those at or above their threshold; left out where
    the rule has none. Where classes have thresholds of their own, `nearest` is the class closest to
    (or furthest above) its threshold: the answer where one has to be given and none reaches.

    Args:
        run: trained head.
        ids: of the rows; read when all scores have been drawn.
        paths: likewise.
        scores: see `probabilities`.
        rule: how they become statements.
    """
    names = np.asarray(run.class_names, dtype=object)
    top_k = min(rule.top_k, len(names))
    order, best, present, nearest = [], [], list[list[str]](), list[str]()
    says_present = run.task == "multi_label" and rule.thresholds is not None
    for batch in scores:
        found, indices = best_first(batch, top_k)
        order.append(indices.numpy())
        best.append(found.numpy())
        if says_present:
            present += [names[row].tolist() for row in batch.numpy() >= rule.thresholds]
        if isinstance(rule.thresholds, np.ndarray):
            nearest += names[nearest_class(batch.numpy(), rule.thresholds)].tolist()
    index = np.concatenate(order) if order else np.zeros((0, top_k), np.int64)
    values = np.concatenate(best) if best else np.zeros((0, top_k), np.float32)
    columns: dict[str, Any] = {"id": list(ids), "path": list(paths)}
    if says_present:
        columns["classes"] = present
    if isinstance(rule.thresholds, np.ndarray):
        columns["nearest"] = nearest
    for rank in range(top_k):
        columns[f"class_{rank + 1}"] = names[index[:, rank]]
        columns[f"probability_{rank + 1}"] = values[:, rank]
    return pd.DataFrame(columns)


def best_first(scores: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """(b, num) best scores of each row and their classes; equal scores in class order.

    Args:
        scores: (b, C).
        num: 1 to C.
    """
    top = scores.topk(min(num + 1, scores.shape[1]), dim=1)
    values, indices = top.values[:, :num], top.indices[:, :num]
    # Only rows with equal scores among these are sorted whole, which takes 40 times as long.
    tied = (top.values[:, 1:] == top.values[:, :-1]).any(1)
    if tied.any():
        ranked = scores[tied].sort(stable=True, dim=1, descending=True)
        values[tied], indices[tied] = ranked.values[:, :num], ranked.indices[:, :num]
    return values, indices


def write_table(file: Path, frame: pd.DataFrame, class_names: Sequence[str]) -> None:
    """Writes what `tabulate` gives; see `featcache.prediction_table` for the kinds."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, table_bytes(frame, file.suffix, class_names))


def write_unreadable(file: Path, unreadable: Sequence[Unreadable]) -> None:
    """Writes id, path and reason of rows that were not predicted; no file if there are none."""
    file.unlink(missing_ok=True)
    if unreadable:
        lines = pd.DataFrame([vars(one) for one in unreadable])
        write_atomic(file, lines.to_csv(index=False).encode())


def describe_row(row: pd.Series) -> str:
    """The classes of one row as aligned lines; `*` marks those that count as present."""
    ranks = range(1, 1 + sum(str(name).startswith("class_") for name in row.index))
    names = [str(row[f"class_{rank}"]) for rank in ranks]
    width = max(map(len, names))
    present = set(row["classes"]) if "classes" in row.index else set()
    lines = [
        f"  {name:<{width}}  {row[f'probability_{rank}']:7.2%}{' *' if name in present else ''}"
        for rank, name in zip(ranks, names, strict=True)
    ]
    beyond = sorted(present - set(names))
    more = [f"  * also: {', '.join(beyond)}"] if beyond else []
    return "\n".join([f"{row['path']}:", *lines, *more])
