"""Job: one caption for each image of a dataset, by a BLIP captioner.

    python -m featcache.caption --dataset.root photos --model large --out captions.txt

Writes the list `path caption` that datasets read. The same command goes on after an interruption,
and captions what a grown dataset has more.
"""

import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from pydantic import Field, PositiveInt, model_validator

from featcache.captioning.caption_list import CaptionList, open_list, record_of
from featcache.captioning.captioner import Captioner
from featcache.config import Config, run_job
from featcache.datasets import AnyDataset
from featcache.errors import ConfigError
from featcache.identity import Precision
from featcache.images import Views
from featcache.manifest import Manifest
from featcache.pipeline import Batch, BatchReader, ImageSource, Progress, Timings
from featcache.precision import PrecisionChoice, fastest_precision, resolve_device
from featcache.row_block import RowBlock

_BATCH = {"cpu": 8, "cuda": 64}
_BLOCK_ROWS = 4096
"""Images whose paths are handed to the readers at a time."""


class CaptionConfig(Config):
    """Write one caption for each image of a dataset. Resumes by itself."""

    dataset: AnyDataset = Field(discriminator="kind")
    """Images; kind folder unless said otherwise."""
    split: str | None = None
    """Caption this split only; unset = all."""
    model: str = "base"
    """Captioner: base or large (Salesforce/blip-image-captioning-…), ORG/NAME of another hub
    repository, or a folder, which is read without network."""
    out: Path
    """List to write or to go on with: a line `path caption` for each image."""
    prompt: str = "a picture of"
    """How every caption begins; it is not written. Empty = nothing."""
    num_beams: PositiveInt = 3
    """Width of the beam search, 1 or more; 1 = greedy, and about as many times faster."""
    max_tokens: PositiveInt = 30
    """Most tokens of a caption, 1 or more."""
    batch_size: PositiveInt | Literal["auto"] = "auto"
    """Images at a time; auto = 8 on a CPU, 64 on a GPU."""
    num_readers: PositiveInt | Literal["auto"] = "auto"
    """Threads that read and decode; auto = one per processor this job may use."""
    mode: Literal["fast", "scaled"] = "fast"
    """Decode and resize: fast (within 1/255 of the source library) or scaled (big JPEGs faster)."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: PrecisionChoice = "auto"
    """Arithmetic: fp32, bf16, fp16; auto = the device's fastest, or what the list began with."""

    @model_validator(mode="before")
    @classmethod
    def _folder_unless_said(cls, values: Any) -> Any:
        dataset = values.get("dataset") if isinstance(values, Mapping) else None
        if isinstance(dataset, Mapping) and "kind" not in dataset:
            return {**values, "dataset": {"kind": "folder", **dataset}}
        return values


@dataclass(frozen=True)
class Unreadable:
    """An image without a caption, and why."""

    id: str
    path: str
    reason: str


@dataclass(frozen=True)
class CaptionReport:
    """What was written.

    Attributes:
        out: the list.
        num_written: captions written now.
        num_done: captions that were there already.
        unreadable: images without a caption.
    """

    out: Path
    num_written: int
    num_done: int
    unreadable: list[Unreadable]


def run(config: CaptionConfig) -> CaptionReport:
    """Captions the images that have none yet; those it cannot go to `<out>.unreadable.csv`.

    Raises:
        DatasetError: if the dataset on disk is not what its options say.
        BackboneError: if the captioner cannot be opened.
        ConfigError: if a path has a blank, or the list was written with other options.
        CacheError: if another process writes the list, or the disk is full.
    """
    device = resolve_device(config.device)
    manifest = config.dataset.open()
    _check_paths(manifest, config.split)
    began_with = record_of(config.out)
    precision = _precision(config, device, began_with)
    captioner = Captioner(config.model, device, precision)
    record = {
        "weights": captioner.weights,
        "prompt": config.prompt,
        "num_beams": config.num_beams,
        "max_tokens": config.max_tokens,
        "mode": config.mode,
        "precision": precision,
    }
    with open_list(config.out, record) as captions:
        total, missing = _count(manifest, config.split, captions.done)
        if missing < total:
            print(f"{config.out}: {total - missing} of {total} captions are there", flush=True)
        report = _write(config, manifest, captioner, captions, total, missing)
    _write_failures(config.out, report.unreadable)
    print(f"{config.out}: {report.num_written} captions written, {report.num_done} kept")
    if report.unreadable:
        first = report.unreadable[0]
        print(
            f"{len(report.unreadable)} images have no caption, see {config.out}.unreadable.csv; "
            f"the first is {first.path}: {first.reason}"
        )
    return report


def _write(
    config: CaptionConfig,
    manifest: Manifest,
    captioner: Captioner,
    captions: CaptionList,
    total: int,
    missing: int,
) -> CaptionReport:
    """Captions what is missing, batch by batch."""
    kind = captioner.device.type
    batch_size = _BATCH[kind] if config.batch_size == "auto" else config.batch_size
    threads = len(os.sched_getaffinity(0)) if config.num_readers == "auto" else config.num_readers
    source = ImageSource(manifest.root, captioner.pixels, config.mode, Views(), None)
    reader = BatchReader(source, batch_size, threads, pinned=kind == "cuda")
    timings, progress = Timings(), Progress(total, total - missing, "captions")
    written, failed = 0, list[Unreadable]()
    try:
        for block in _missing(manifest, config.split, captions.done):
            for batch in reader.batches(block):
                began = time.perf_counter()
                paths, texts = _captioned(config, captioner, block, batch, failed)
                timings.encode_seconds += time.perf_counter() - began
                captions.append(paths, texts)
                written += len(paths)
                timings.rows += batch.stop - batch.start
                timings.read_seconds += batch.busy_seconds / threads
                progress.update(progress.done + batch.stop - batch.start, timings)
    finally:
        progress.close()
    return CaptionReport(config.out, written, total - missing, failed)


def _captioned(
    config: CaptionConfig,
    captioner: Captioner,
    block: RowBlock,
    batch: Batch,
    failed: list[Unreadable],
) -> tuple[list[str], list[str]]:
    """Paths and captions of a batch's readable images; the others are added to `failed`."""
    reasons = dict(batch.reasons)
    rows = [row for row in range(batch.start, batch.stop) if row not in reasons]
    texts: list[str] = []
    if rows:
        pixels = batch.pixels[[row - batch.start for row in rows], 0]
        texts = captioner.captions(
            pixels,
            prompt=config.prompt,
            num_beams=config.num_beams,
            max_tokens=config.max_tokens,
        )
    reasons |= {row: "empty caption" for row, text in zip(rows, texts, strict=True) if not text}
    failed += [
        Unreadable(block.ids[row], block.paths[row], reason)
        for row, reason in sorted(reasons.items())
    ]
    kept = [(row, text) for row, text in zip(rows, texts, strict=True) if text]
    return [block.paths[row] for row, _ in kept], [text for _, text in kept]


def _blocks(manifest: Manifest, split: str | None) -> Iterator[RowBlock]:
    """The rows of a split, or all.

    Raises:
        ConfigError: if there is no such split.
    """
    if split is not None and split not in manifest.split_ranges:
        raise ConfigError(f"split {split!r}: the dataset has {', '.join(manifest.split_ranges)}")
    start, stop = (0, len(manifest)) if split is None else manifest.split_ranges[split]
    for first in range(start, stop, _BLOCK_ROWS):
        yield manifest.block(first, min(first + _BLOCK_ROWS, stop))


def _check_paths(manifest: Manifest, split: str | None) -> None:
    """Checks that the list can be read back.

    Raises:
        ConfigError: naming the first path with a blank.
    """
    for block in _blocks(manifest, split):
        for path in block.paths:
            if path.split() != [path]:
                raise ConfigError(
                    f"{manifest.root}: {path!r} has a blank in it, and a caption list separates "
                    "path and caption by a blank; rename such files"
                )


def _count(manifest: Manifest, split: str | None, done: set[str]) -> tuple[int, int]:
    """Images, and those without a caption."""
    total = missing = 0
    for block in _blocks(manifest, split):
        total += len(block)
        missing += sum(path not in done for path in block.paths)
    return total, missing


def _missing(manifest: Manifest, split: str | None, done: set[str]) -> Iterator[RowBlock]:
    """Blocks of the rows without a caption; a path that occurs twice is captioned once."""
    for block in _blocks(manifest, split):
        rows: dict[str, str] = {}
        for path, row_id in zip(block.paths, block.ids, strict=True):
            if path not in done:
                rows.setdefault(path, row_id)
        if rows:
            yield RowBlock.of(list(rows.values()), list(rows))


def _precision(
    config: CaptionConfig, device: torch.device, began_with: dict[str, Any] | None
) -> Precision:
    if config.precision != "auto":
        return config.precision
    if began_with is not None and began_with.get("precision") in ("fp32", "bf16", "fp16"):
        recorded: Precision = began_with["precision"]
        return recorded
    return fastest_precision(device)


def _write_failures(out: Path, failed: list[Unreadable]) -> None:
    file = out.with_name(f"{out.name}.unreadable.csv")
    if failed:
        pd.DataFrame([vars(one) for one in failed]).to_csv(file, index=False)
    else:
        file.unlink(missing_ok=True)


if __name__ == "__main__":
    run_job(CaptionConfig, run)
