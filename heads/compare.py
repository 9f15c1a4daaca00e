"""Job: two trained heads on the same rows: what differs, how surely, and in which classes.

python -m heads.compare --run runs/garden-mop-1a2b3c --other runs/garden-linear-4d5e6f

Both are scored on the same rows, so that only rows on which they differ say anything: top-1 by an
exact McNemar test, every metric by paired bootstrap (both heads see the same draws of rows).

References: McNemar, Note on the sampling error of the difference between correlated proportions,
1947; Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from pydantic import field_validator
from scipy.stats import binomtest

from featcache.config import Config, run_job
from featcache.errors import CacheMismatchError
from featcache.precision import resolve_device
from featcache.reader import Cache
from featcache.shot_groups import BOUNDARIES, stated_groups
from featcache.storage import CachePath
from heads import bootstrap
from heads.calibration import calibration_of
from heads.evaluate import choose_split, open_known, outputs_of
from heads.run_folder import LoadedRun, RunError, load_run, write_atomic, write_json
from heads.scoring import MetricsConfig, Outputs, Scores, predicted_classes, summarise

_SHOWN_CLASSES = 5


class CompareConfig(Config):
    """Compares two trained heads on the same rows."""

    run: Path
    """Run folder that heads.train wrote."""
    other: Path
    """Run folder that it is compared with: differences are run minus other."""
    cache: CachePath | None = None
    """Cache to score `run` on; unset = the one (or the joined ones) it was trained on."""
    join: tuple[CachePath, ...] = ()
    """Further caches, joined by id, for a `run` that was trained on several; needs cache."""
    other_cache: CachePath | None = None
    """Cache to score `other` on, with the same rows by id; unset = `cache` if it fits `other`,
    otherwise what `other` was trained on."""
    split: str | None = None
    """Split to compare on; unset = test if it has labels, otherwise val."""
    metrics: MetricsConfig = MetricsConfig(bootstrap=1000)
    """How metrics are counted, and how many draws the intervals rest on."""
    out: Path | None = None
    """Folder for comparison.json and classes.csv; unset = `comparisons/<other>` in the folder of
    `run`."""
    device: str = "auto"
    """auto (the GPU if there is one), cpu or cuda:N."""

    @field_validator("metrics")
    @classmethod
    def _draws(cls, value: MetricsConfig) -> MetricsConfig:
        if value.bootstrap < 100:
            raise ValueError(f"bootstrap is {value.bootstrap}; a comparison needs 100 or more")
        return value


@dataclass(frozen=True)
class Difference:
    """One metric of both heads.

    Attributes:
        first, second: values, 0..1. difference: first minus second.
        low, high: confidence interval of the difference.
        p: two-sided p-value of no difference, by paired bootstrap.
    """

    first: float
    second: float
    difference: float
    low: float
    high: float
    p: float


@dataclass(frozen=True)
class Comparison:
    """What a comparison found.

    Attributes:
        split: rows compared on. num_rows: how many.
        differences: by metric.
        only_first, only_second: rows that only one of two single-label heads has right; None for
            multi-label heads.
        mcnemar_p: exact two-sided p-value of equal top-1; None for multi-label heads.
        classes: C rows: class, name, num_train, num_rows, first, second, difference.
        wins, losses, ties: classes in which the first head is better, worse, equal.
    """

    split: str
    num_rows: int
    differences: dict[str, Difference]
    only_first: int | None
    only_second: int | None
    mcnemar_p: float | None
    classes: pd.DataFrame
    wins: int
    losses: int
    ties: int


def run(config: CompareConfig) -> Comparison:
    """Scores both heads, prints the differences and writes them.

    Raises:
        CacheMismatchError: if the two would be scored on different rows, labels or classes.
        RunError: if their tasks differ, or no row is labelled.
    """
    device = resolve_device(config.device)
    first, second = load_run(config.run), load_run(config.other)
    if first.task != second.task:
        raise RunError(
            f"{config.run} is {first.task}, {config.other} is {second.task}; compare heads of one "
            "task"
        )
    cache = open_known(first, config.cache, config.join)
    split = config.split or choose_split(cache)
    other_cache = _other_cache(config, second, cache)
    require_same_rows(cache, other_cache, split)
    options = config.metrics
    outputs, ids = [], []
    for one, source in ((first, cache), (second, other_cache)):
        found_outputs, part = outputs_of(one, source, split, options, device)
        outputs.append(found_outputs)
        ids.append([source.ids[row] for row in part.rows.tolist()])
    if ids[0] != ids[1]:
        raise CacheMismatchError(
            f"the heads read {len(ids[0])} and {len(ids[1])} rows of split {split!r}, and not the "
            "same ones: a head that reads only captions leaves rows without one out; compare heads "
            "on rows that both can read"
        )
    found = compare(outputs, [first, second], split, options)
    folder = config.out or config.run / "comparisons" / config.other.resolve().name
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "comparison.json", record(found, config))
    write_atomic(folder / "classes.csv", found.classes.to_csv(index=False).encode())
    print(f"{config.run} minus {config.other}")
    print(text(found, options.confidence))
    print(f"written to {folder}")
    return found


def compare(
    outputs: Sequence[Outputs], runs: Sequence[LoadedRun], split: str, options: MetricsConfig
) -> Comparison:
    """Metrics of two heads on the same rows, with paired tests.

    Args:
        outputs: of the first and the second head.
        runs: their folders.
        split: name of the rows.
        options: how metrics are counted; `bootstrap` draws.

    Raises:
        RunError: if there is no class that both have a score for.
    """
    one, two = outputs = _on_common_classes(outputs)
    scores, replicates = [], []
    for output, loaded in zip(outputs, runs, strict=True):
        calibration = calibration_of(loaded)
        plain = options.model_copy(update={"bootstrap": 0})
        scores.append(summarise(output, loaded.classes, plain, calibration))
        shown = None
        if output.scores is not None and options.top_k is None:
            shown = predicted_classes(output, options, calibration)
        replicates.append(_replicates(output, loaded, options, shown))
    differences = {
        name: _difference(name, scores, replicates, options.confidence)
        for name in replicates[0]
        if name in replicates[1] and all(name in score.metrics for score in scores)
    }
    only_first = only_second = p = None
    if one.rows is not None and two.rows is not None:
        hits, other_hits = one.rows.rank == 0, two.rows.rank == 0
        only_first = int((hits & ~other_hits).sum())
        only_second = int((other_hits & ~hits).sum())
        p = mcnemar(only_first, only_second)
    table = _class_table(scores)
    gap = table["difference"].dropna()
    return Comparison(
        split=split,
        num_rows=len(one.targets),
        differences=differences,
        only_first=only_first,
        only_second=only_second,
        mcnemar_p=p,
        classes=table,
        wins=int((gap > 0).sum()),
        losses=int((gap < 0).sum()),
        ties=int((gap == 0).sum()),
    )


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided p-value that rows on which just one head is right fall evenly on both."""
    total = only_first + only_second
    return float(binomtest(only_first, total).pvalue) if total else 1.0


def require_same_rows(cache: Cache, other: Cache, split: str) -> None:
    """Checks that two caches hold the same readable rows of a split, with the same labels.

    Raises:
        CacheMismatchError: naming the first difference.
    """
    if (cache.path, cache.fingerprint) == (other.path, other.fingerprint):
        return
    if cache.class_hash != other.class_hash:
        raise CacheMismatchError(
            f"{cache.path} and {other.path} have different classes; compare heads of one class list"
        )
    rows, other_rows = cache.rows(split), other.rows(split)
    ids = [cache.ids[row] for row in rows.tolist()]
    other_ids = [other.ids[row] for row in other_rows.tolist()]
    if ids != other_ids:
        known, other_known = set(ids), set(other_ids)
        only = next((i for i in ids if i not in other_known), None)
        only = only or next((i for i in other_ids if i not in known), "the order")
        raise CacheMismatchError(
            f"split {split!r} has {len(ids)} readable rows in {cache.path} and {len(other_ids)} in "
            f"{other.path}; they differ first in {only}; compare on caches of the same rows"
        )
    single = cache.task == other.task == "single_label"  # then one number a row says it
    labels, other_labels = (
        source.labels(own) if single else source.multi_hot(own)
        for source, own in ((cache, rows), (other, other_rows))
    )
    if (labels != other_labels).any():
        raise CacheMismatchError(
            f"rows of split {split!r} have other labels in {cache.path} than in {other.path}; "
            "update the older cache (python -m featcache.extract), then compare"
        )


def record(found: Comparison, config: CompareConfig) -> dict[str, Any]:
    """The comparison as plain JSON values."""
    return {
        "run": str(config.run),
        "other": str(config.other),
        "split": found.split,
        "num_rows": found.num_rows,
        "draws": config.metrics.bootstrap,
        "confidence": config.metrics.confidence,
        "only_first_right": found.only_first,
        "only_second_right": found.only_second,
        "mcnemar_p": found.mcnemar_p,
        "classes": {"wins": found.wins, "losses": found.losses, "ties": found.ties},
        "differences": {name: vars(one) for name, one in found.differences.items()},
    }


def text(found: Comparison, confidence: float) -> str:
    """The comparison in lines: metrics, tests, classes."""
    width = max(len(name) for name in found.differences)
    lines = [
        f"{found.split}: {found.num_rows:,} rows",
        f"  {'':<{width}}       run     other   run - other   {confidence:.0%} interval         p",
    ]
    for name, one in found.differences.items():
        lines.append(
            f"  {name:<{width}}  {one.first:8.2%}  {one.second:8.2%}   {one.difference:+10.2%}   "
            f"{one.low:+7.2%} ..{one.high:+8.2%}  {one.p:8.3g}"
        )
    if found.mcnemar_p is not None:
        lines.append(
            f"rows that only one has right: {found.only_first:,} and {found.only_second:,}; exact "
            f"McNemar p = {found.mcnemar_p:.3g}"
        )
    lines.append(
        f"classes: better in {found.wins:,}, worse in {found.losses:,}, equal in {found.ties:,}"
    )
    order = found.classes.sort_values("difference", kind="stable")
    gained, lost = order[order["difference"] > 0][::-1], order[order["difference"] < 0]
    for word, part in (("most gained", gained), ("most lost", lost)):
        shown = part[["name", "difference"]].head(_SHOWN_CLASSES).itertuples(index=False)
        if len(part):
            lines.append(f"  {word}: {', '.join(f'{name} {gap:+.1%}' for name, gap in shown)}")
    return "\n".join(lines)


def _other_cache(config: CompareConfig, other: LoadedRun, cache: Cache) -> Cache:
    if config.other_cache is not None:
        return open_known(other, config.other_cache, ())
    if config.cache is not None:
        try:
            other.require_fits(cache)
        except CacheMismatchError:
            return open_known(other, None, ())
        return cache
    return open_known(other, None, ())


def _on_common_classes(outputs: Sequence[Outputs]) -> list[Outputs]:
    """The same outputs, looked at in the classes that all heads have a score for.

    Raises:
        RunError: if there is none.
    """
    limited = [set(one.columns) for one in outputs if one.columns is not None]
    if not limited:
        return list(outputs)
    common = sorted(set.intersection(*limited))
    if not common:
        raise RunError("the heads score different classes; compare heads that have one in common")
    return [replace(one, columns=common) for one in outputs]


def _replicates(
    output: Outputs,
    loaded: LoadedRun,
    options: MetricsConfig,
    predicted: npt.NDArray[np.bool_] | None,
) -> bootstrap.Replicates:
    counts = loaded.classes["count"].to_numpy(np.int64)
    boundaries = options.shot_boundaries or BOUNDARIES
    groups = stated_groups(loaded.classes) if options.shot_boundaries is None else None
    draw = {"num": options.bootstrap, "seed": options.bootstrap_seed}
    if output.rows is not None:
        return bootstrap.single_label_replicates(
            output.rows, counts, boundaries, output.taxonomy, groups, **draw
        )
    scores, targets = output.scores, output.targets
    assert scores is not None, "neither rows nor scores"
    if output.columns is not None:
        own = list(output.columns)
        scores, targets, counts = scores[:, own], targets[:, own], counts[own]
        groups = None if groups is None else [groups[index] for index in own]
        predicted = None if predicted is None else predicted[:, own]
    return bootstrap.multi_label_replicates(
        scores, targets, counts, boundaries, groups, predicted, **draw
    )


def _difference(
    name: str,
    scores: Sequence[Scores],
    replicates: Sequence[bootstrap.Replicates],
    confidence: float,
) -> Difference:
    first, second = (score.metrics[name] for score in scores)
    gaps = replicates[0][name] - replicates[1][name]
    low, high = bootstrap.percentile_intervals({name: gaps}, confidence)[name]
    return Difference(first, second, first - second, low, high, bootstrap.two_sided_p(gaps))


def _class_table(scores: Sequence[Scores]) -> pd.DataFrame:
    first, second = (score.per_class for score in scores)
    metric = "accuracy" if "accuracy" in first.columns else "average_precision"
    table = first[["class", "name", "num_train", "num_rows"]].copy()
    table["first"], table["second"] = first[metric], second[metric]
    table["difference"] = first[metric] - second[metric]
    return table


if __name__ == "__main__":
    run_job(CompareConfig, run)
