"""Job: the classes that a trained head sees in cached rows or in new image files.

python -m heads.predict --run runs/inat2021-linear-1a2b3c --images photos --out photos.csv
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor

from featcache.config import Config, run_job
from featcache.errors import ConfigError, DatasetError
from featcache.formats.image_names import IMAGE_SUFFIXES
from featcache.precision import resolve_device
from featcache.reader import Cache
from featcache.storage import CachePath
from featcache.submission import (
    SEPARATOR,
    labels_of,
    read_order,
    submission,
    summary,
    write_submission,
)
from heads.base import Features
from heads.data import FeatureTables, open_arrays
from heads.encoding import encode_files
from heads.evaluate import open_known
from heads.progress import ProgressLine
from heads.run_folder import LoadedRun, RunError, Weights, load_run, write_atomic


class PredictConfig(Config):
    """Classes that a trained head sees in cached rows or in new image files."""

    run: Path
    """Run folder that heads.train wrote."""
    weights: Weights = "best"
    """best = of the epoch that validated best; last = of the last one."""
    cache: CachePath | None = None
    """Cache with the rows to predict; unset = `images`, or with `split` the caches it was trained
    on."""
    join: tuple[CachePath, ...] = ()
    """Further caches, joined by id, for a head that was trained on several; needs cache."""
    split: str | None = None
    """Split of the cache; unset = all rows of `cache`."""
    images: Path | None = None
    """Image file, or folder that is searched with its sub-folders; or give `cache` or `split`."""
    out: Path
    """Table to write: .csv or .parquet."""
    submission: Path | None = None
    """Write `ImageID,Labels` there too, with the original label ids of a kaggle_csv dataset."""
    submission_order: Path | None = None
    """test.csv or a sample submission, whose images and order the submission takes; unset = those
    of the rows predicted."""
    top_k: PositiveInt = 5
    """Classes listed for each row, best first, 1 or more."""
    threshold: float = Field(default=0.5, gt=0, lt=1)
    """Probability from which on a class counts as present in a multi-label set, 0..1."""
    num_readers: PositiveInt = 2
    """Threads that decode images, 1 or more."""
    device: str = "auto"
    """auto (the GPU if there is one), cpu or cuda:N."""
    quiet: bool = False
    """Print nothing but errors."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        both = self.cache is not None and self.images is not None
        if both or (self.cache is None and self.images is None and self.split is None):
            raise ValueError(
                "give either cache or images (--cache of rows, --images of files); a split alone "
                "is of the cache that the head was trained on"
            )
        if self.split is not None and self.images is not None:
            raise ValueError(f"split={self.split} is of a cache; leave it out with images")
        if self.join and self.cache is None:
            raise ValueError(f"join={[str(one) for one in self.join]} needs cache")
        if self.submission_order is not None and self.submission is None:
            raise ValueError(f"submission_order={self.submission_order} needs submission")
        if self.out.suffix not in (".csv", ".parquet"):
            raise ValueError(f"out={self.out} has to end with .csv or .parquet")
        return self


@dataclass(frozen=True)
class Unreadable:
    """A row that could not be predicted, and why."""

    id: str
    path: str
    reason: str


@dataclass(frozen=True)
class PredictReport:
    """What was predicted.

    Attributes:
        out: the table.
        table: one line a row: id, path, class_1, probability_1, class_2, …; in a multi-label set
            also `classes`, all above the threshold.
        unreadable: rows that are not in the table, and why.
    """

    out: Path
    table: pd.DataFrame
    unreadable: list[Unreadable]


def run(config: PredictConfig) -> PredictReport:
    """Predicts and writes the table; unreadable rows go to `<out>.unreadable.csv`, with reasons."""
    device = resolve_device(config.device)
    loaded = load_run(config.run, device, config.weights)
    order = None if config.submission_order is None else read_order(config.submission_order)
    if config.images is None:
        cache = open_known(loaded, config.cache, config.join, config.quiet)
        rows = _cache_rows(cache, config.split)
        order = [cache.ids[row] for row in rows] if order is None else order
        frame, unreadable = predict_cache(loaded, cache, rows, config.top_k, config.threshold)
    else:
        files = find_images(config.images)
        root = config.images if config.images.is_dir() else config.images.parent
        order = files if order is None else order
        frame, unreadable = predict_images(
            loaded,
            root,
            files,
            top_k=config.top_k,
            threshold=config.threshold,
            device=device,
            num_readers=config.num_readers,
            progress=ProgressLine(config.quiet),
        )
    config.out.parent.mkdir(parents=True, exist_ok=True)
    _write_table(config.out, frame)
    failures = config.out.with_name(config.out.name + ".unreadable.csv")
    failures.unlink(missing_ok=True)
    if unreadable:
        lines = pd.DataFrame([vars(one) for one in unreadable])
        write_atomic(failures, lines.to_csv(index=False).encode())
    if not config.quiet:
        print(f"{len(frame):,} rows predicted: {config.out}")
        if unreadable:
            first = unreadable[0]
            print(f"{len(unreadable):,} unreadable, not predicted: {failures}")
            print(f"  the first: {first.path} ({first.reason})")
    if unreadable and frame.empty:
        raise DatasetError(
            f"none of {len(unreadable)} images could be read, nothing was predicted; the first is "
            f"{unreadable[0].path} ({unreadable[0].reason})"
        )
    if config.submission is not None:
        labels = labels_of(frame, loaded.classes)
        answers = submission(order, labels)
        write_submission(config.submission, answers)
        if not config.quiet:
            print(summary(config.submission, answers))
    return PredictReport(config.out, frame, unreadable)


def predict_cache(
    run: LoadedRun,
    cache: Cache,
    rows: np.ndarray[Any, np.dtype[np.int64]],
    top_k: int = 5,
    threshold: float = 0.5,
) -> tuple[pd.DataFrame, list[Unreadable]]:
    """Predictions for rows of a cache; see `PredictReport.table`.

    Raises:
        CacheMismatchError: if the cache's classes, backbone or preprocessing are others than those
            that the head was trained on.
    """
    run.require_fits(cache)
    device = next(iter(run.head.state_dict().values())).device
    arrays = open_arrays(cache, run.config)
    valid = cache.valid[rows]
    readable = valid if arrays.readable is None else valid & arrays.readable[rows]
    good = rows[readable]
    table = FeatureTables(arrays, good, device)
    frame = _frame(
        run,
        [cache.ids[row] for row in good],
        [cache.paths[row] for row in good],
        _scores(run, (table.slice(*span) for span in table.spans(len(run.classes)))),
        top_k,
        threshold,
    )
    bad = [
        Unreadable(
            cache.ids[row],
            cache.paths[row],
            "no caption, and the head reads nothing else"
            if cache.valid[row]
            else "unreadable when the cache was extracted",
        )
        for row in rows[~readable]
    ]
    return frame, bad


def predict_images(
    run: LoadedRun,
    root: Path,
    files: Sequence[str],
    *,
    top_k: int = 5,
    threshold: float = 0.5,
    device: torch.device | None = None,
    num_readers: int = 2,
    progress: ProgressLine | None = None,
) -> tuple[pd.DataFrame, list[Unreadable]]:
    """Predictions for image files, encoded as the training cache was; see `PredictReport.table`.

    Args:
        run: trained head, on `device`.
        root: folder that `files` start from.
        files: relative paths; they are the ids too.
        top_k: classes listed.
        threshold: see `PredictConfig.threshold`.
        device: where to encode; default the CPU.
        num_readers: decoding threads.
        progress: shows how far it is; default nothing.

    Raises:
        BackboneError: if the backbone's weights cannot be opened.
        CacheMismatchError: if they are not those that the head was trained with.
    """
    device = device or torch.device("cpu")
    progress = progress or ProgressLine(quiet=True)
    bad: list[Unreadable] = []
    good: list[str] = []

    def features() -> Iterator[Features]:
        for batch in encode_files(run, root, files, device, num_readers):
            bad.extend(
                Unreadable(files[row], files[row], reason)
                for row, reason in sorted(batch.reasons.items())
            )
            good.extend(files[row] for row in batch.rows)
            progress.show(f"{batch.stop:,} of {len(files):,} images")
            yield (batch.features,)

    # `good` fills up while the scores are drawn.
    frame = _frame(run, good, good, _scores(run, features()), top_k, threshold)
    progress.close()
    return frame, bad


def find_images(path: Path) -> list[str]:
    """Image files of a folder and its sub-folders, relative and sorted; or the one file's name.

    Raises:
        ConfigError: if there is nothing.
    """
    if path.is_file():
        return [path.name]
    if not path.is_dir():
        raise ConfigError(f"images: no such file or folder: {path}")
    found = [
        file.relative_to(path).as_posix()
        for file in path.rglob("*")
        if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file()
    ]
    if not found:
        known = ", ".join(sorted(IMAGE_SUFFIXES))
        raise ConfigError(f"images: no image in {path}; looked for files that end with {known}")
    return sorted(found)


@torch.inference_mode()
def _scores(run: LoadedRun, batches: Iterator[Features]) -> Iterator[Tensor]:
    """Probabilities of each batch, on the CPU."""
    for features in batches:
        if not len(features[0]):
            continue
        logits = run.head(*features)
        if not torch.isfinite(logits).all():
            raise RunError(f"{run.path}: the head gives NaN or infinite scores; train it again")
        probabilities = logits.sigmoid() if run.task == "multi_label" else logits.softmax(1)
        yield probabilities.cpu()


def _frame(
    run: LoadedRun,
    ids: list[str],
    paths: list[str],
    probabilities: Iterator[Tensor],
    top_k: int,
    threshold: float,
) -> pd.DataFrame:
    names = np.asarray(run.class_names, dtype=object)
    top_k = min(top_k, len(names))
    order, best, present = [], [], []
    for batch in probabilities:
        # Stable, so that equal probabilities come in class order.
        ranked = batch.sort(stable=True, dim=1, descending=True)
        order.append(ranked.indices[:, :top_k].numpy())
        best.append(ranked.values[:, :top_k].numpy())
        if run.task == "multi_label":
            present += [SEPARATOR.join(names[row]) for row in (batch >= threshold).numpy()]
    index = np.concatenate(order) if order else np.zeros((0, top_k), np.int64)
    values = np.concatenate(best) if best else np.zeros((0, top_k), np.float32)
    columns: dict[str, Any] = {"id": ids, "path": paths}
    if run.task == "multi_label":
        columns["classes"] = present
    for rank in range(top_k):
        columns[f"class_{rank + 1}"] = names[index[:, rank]]
        columns[f"probability_{rank + 1}"] = values[:, rank]
    return pd.DataFrame(columns)


def _cache_rows(cache: Cache, split: str | None) -> np.ndarray[Any, np.dtype[np.int64]]:
    """All rows of a split, readable or not."""
    if split is None:
        return np.arange(cache.num_rows, dtype=np.int64)
    cache.rows(split)  # raises for an unknown split
    start, stop = cache.attributes["splits"][split]
    return np.arange(start, stop, dtype=np.int64)


def _write_table(path: Path, frame: pd.DataFrame) -> None:
    if path.suffix == ".csv":
        write_atomic(path, frame.to_csv(index=False, float_format="%.6g").encode())
    else:
        write_atomic(path, frame.to_parquet(index=False))


if __name__ == "__main__":
    run_job(PredictConfig, run)
