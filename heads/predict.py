"""Job: the classes that a trained head sees in cached rows or in new images with their captions.

python -m heads.predict --run runs/inat2021-linear-1a2b3c --images photos --out photos.csv
python -m heads.predict --run runs/inat2021-linear-1a2b3c --images bee.jpg
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import pandas as pd
import torch
from pydantic import PositiveInt, model_validator

from featcache.config import Config, run_job
from featcache.datasets.caption_files import captions_of
from featcache.errors import ConfigError, DatasetError
from featcache.formats.image_names import IMAGE_SUFFIXES
from featcache.precision import resolve_device
from featcache.prediction_table import SUFFIXES
from featcache.reader import Cache
from featcache.storage import CachePath
from featcache.submission import labels_of, read_order, submission, summary, write_submission
from heads.base import Features
from heads.data import FeatureTables, open_arrays, reads_captions
from heads.encoding import NO_CAPTION, Captions, encode_files
from heads.evaluate import open_known
from heads.predictions import (
    Rule,
    Unreadable,
    describe_row,
    probabilities,
    rule_of,
    tabulate,
    write_table,
    write_unreadable,
)
from heads.progress import ProgressLine
from heads.run_folder import LoadedRun, Weights, load_run


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
    captions: Path | None = None
    """Captions of the images, for heads that read them: a .csv, .tsv or .parquet with columns path
    and caption, or a list with `path caption` on each line; paths as below `images`."""
    out: Path | None = None
    """Table to write: .csv, .parquet or .json (a list of records); unset = none, for a single image
    whose classes are printed anyway."""
    submission: Path | None = None
    """Write `ImageID,Labels` there too, with the original label ids of a kaggle_csv dataset."""
    submission_order: Path | None = None
    """test.csv or a sample submission, whose images and order the submission takes; unset = those
    of the rows predicted."""
    top_k: PositiveInt = 5
    """Classes listed for each row, best first, 1 or more."""
    threshold: float | Literal["searched"] | None = None
    """Probability from which on a class counts as present in a multi-label set, 0..1; searched =
    one for each class, as the training searched them; unset = 0.5, and no statement about it for
    heads that only rank (zero_shot without cosine_threshold)."""
    calibrated: bool = True
    """Probabilities at the temperature that the training fitted to its validation rows; otherwise
    plain softmax or sigmoid."""
    num_readers: PositiveInt = 2
    """Threads that decode images, 1 or more."""
    device: str = "auto"
    """auto (the GPU if there is one), cpu or cuda:N."""
    quiet: bool = False
    """Print nothing but errors."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if isinstance(self.threshold, float) and not 0 < self.threshold < 1:
            raise ValueError(f"threshold is {self.threshold:g}; it has to be between 0 and 1")
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
        if self.captions is not None and self.images is None:
            raise ValueError(f"captions={self.captions} needs images; a cache has its own")
        if self.out is not None and self.out.suffix not in SUFFIXES:
            raise ValueError(f"out={self.out} has to end with {', '.join(SUFFIXES)}")
        if self.out is None and (self.images is None or self.images.is_dir()):
            raise ValueError(
                "out is unset; name a table to write, such as predictions.csv (a single image does "
                "without)"
            )
        return self


@dataclass(frozen=True)
class PredictReport:
    """What was predicted.

    Attributes:
        out: where the table was written; None = nowhere.
        table: one line a row; see `heads.predictions.tabulate`.
        unreadable: rows that are not in the table, and why.
    """

    out: Path | None
    table: pd.DataFrame
    unreadable: list[Unreadable]


def run(config: PredictConfig) -> PredictReport:
    """Predicts and writes the table; unreadable rows go to `<out>.unreadable.csv`, with reasons."""
    device = resolve_device(config.device)
    loaded = load_run(config.run, device, config.weights)
    rule = rule_of(loaded, config.top_k, config.threshold, config.calibrated)
    order = None if config.submission_order is None else read_order(config.submission_order)
    if config.images is None:
        cache = open_known(loaded, config.cache, config.join, config.quiet)
        rows = _cache_rows(cache, config.split)
        order = [cache.ids[row] for row in rows] if order is None else order
        frame, unreadable = predict_cache(loaded, cache, rows, rule)
    else:
        files = find_images(config.images)
        order = files if order is None else order
        frame, unreadable = predict_images(
            loaded,
            config.images if config.images.is_dir() else config.images.parent,
            files,
            rule,
            captions=_captions(loaded, config, files),
            device=device,
            num_readers=config.num_readers,
            progress=ProgressLine(config.quiet),
        )
    if config.out is not None:
        write_table(config.out, frame, loaded.class_names)
        failures = config.out.with_name(config.out.name + ".unreadable.csv")
        write_unreadable(failures, unreadable)
    if not config.quiet:
        _show(config, loaded, rule, frame, unreadable)
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
    rule: Rule | None = None,
) -> tuple[pd.DataFrame, list[Unreadable]]:
    """Predictions for rows of a cache; see `PredictReport.table`.

    Args:
        run: trained head.
        cache: where the rows are.
        rows: their numbers.
        rule: how scores become statements; default as `rule_of` without a stated threshold.

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
    rule = rule or rule_of(run, Rule.top_k, None)
    batches = (table.slice(*span) for span in table.spans(len(run.classes)))
    frame = tabulate(
        run,
        [cache.ids[row] for row in good],
        [cache.paths[row] for row in good],
        probabilities(run, batches, rule.temperature),
        rule,
    )
    unread = "unreadable when the cache was extracted"
    bad = [
        Unreadable(cache.ids[row], cache.paths[row], NO_CAPTION if cache.valid[row] else unread)
        for row in rows[~readable]
    ]
    return frame, bad


def predict_images(
    run: LoadedRun,
    root: Path,
    files: Sequence[str],
    rule: Rule | None = None,
    *,
    captions: Captions | None = None,
    device: torch.device | None = None,
    num_readers: int = 2,
    progress: ProgressLine | None = None,
) -> tuple[pd.DataFrame, list[Unreadable]]:
    """Predictions for image files, encoded as the training cache was; see `PredictReport.table`.

    Args:
        run: trained head, on `device`.
        root: folder that `files` start from.
        files: relative paths; they are the ids too.
        rule: see `predict_cache`.
        captions: of the files, for heads that read captions; a file without any is scored by what
            the head reads besides, and is unreadable if there is nothing.
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
        for batch in encode_files(run, root, files, device, num_readers, captions):
            bad.extend(
                Unreadable(files[row], files[row], reason)
                for row, reason in sorted(batch.reasons.items())
            )
            good.extend(files[row] for row in batch.rows)
            progress.show(f"{batch.stop:,} of {len(files):,} images")
            yield batch.features

    # `good` fills up while the scores are drawn.
    rule = rule or rule_of(run, Rule.top_k, None)
    frame = tabulate(run, good, good, probabilities(run, features(), rule.temperature), rule)
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


def _captions(run: LoadedRun, config: PredictConfig, files: Sequence[str]) -> Captions | None:
    """The captions of the files.

    Raises:
        ConfigError: if the head reads none, or nothing else and there are none.
        DatasetError: if the file has none of them.
    """
    reading = [name for name in run.features if reads_captions(name)]
    if config.captions is None:
        if len(reading) == len(run.features):
            raise ConfigError(
                f"images: the head in {run.path} reads captions ({', '.join(reading)}), and image "
                "files have none; give --captions, a table with columns path and caption"
            )
        if reading and not config.quiet:
            print("no --captions: the head reads them too, and scores the images alone")
        return None
    if not reading:
        raise ConfigError(
            f"captions={config.captions}: the head in {run.path} reads {', '.join(run.features)}, "
            "no captions; leave it out"
        )
    return captions_of(config.captions, set(files))


def _show(
    config: PredictConfig,
    run: LoadedRun,
    rule: Rule,
    frame: pd.DataFrame,
    unreadable: Sequence[Unreadable],
) -> None:
    """Prints what was predicted."""
    if config.images is not None and config.images.is_file() and len(frame):
        print(describe_row(frame.iloc[0]))
    if config.out is not None:
        print(f"{len(frame):,} rows predicted: {config.out}")
    if run.task == "multi_label" and rule.thresholds is None:
        print(
            "no column classes: the head's scores rank, and do not say from where on a class is "
            "present; --threshold states that, or train with --head.cosine_threshold"
        )
    if unreadable:
        first = unreadable[0]
        where = "" if config.out is None else f": {config.out}.unreadable.csv"
        print(f"{len(unreadable):,} unreadable, not predicted{where}")
        print(f"  the first: {first.path} ({first.reason})")


def _cache_rows(cache: Cache, split: str | None) -> np.ndarray[Any, np.dtype[np.int64]]:
    """All rows of a split, readable or not."""
    if split is None:
        return np.arange(cache.num_rows, dtype=np.int64)
    cache.rows(split)  # raises for an unknown split
    start, stop = cache.attributes["splits"][split]
    return np.arange(start, stop, dtype=np.int64)


if __name__ == "__main__":
    run_job(PredictConfig, run)
