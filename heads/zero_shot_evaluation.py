"""Zero-shot accuracy on a cache, in seconds, or on the images of any dataset."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor

from featcache.class_lists import class_list
from featcache.class_text import class_text_features, ensemble, open_cache_backbone
from featcache.errors import ConfigError, DatasetError, UnreadableImagesError
from featcache.manifest import Manifest
from featcache.precision import resolve_device
from featcache.prompts import format_prompts
from featcache.reader import Cache, open_cache
from featcache.row_block import RowBlock
from heads.data import FeatureTables, open_arrays
from heads.evaluate import choose_split
from heads.image_text import ImageEncoder, open_image_text
from heads.models.zero_shot import ZeroShot, ZeroShotConfig
from heads.parts import has_labels, labelled_part, require_labels
from heads.predictions import Unreadable, write_unreadable
from heads.progress import ProgressLine
from heads.run_folder import RunError
from heads.scoring import Outputs, collect, finite, gather, metrics_table, summarise
from heads.zero_shot import ZeroShotJobConfig
from heads.zero_shot_demo import classifier
from heads.zero_shot_scores import TableFiles, class_accuracies, write_tables

EVALUATION_SCALE = 100.0
"""Multiplier of the cosines where nothing else is asked for."""
OUT = Path("zero_shot_eval_output")


@dataclass(frozen=True)
class Evaluation:
    """What was measured.

    Attributes:
        metrics: by name, shares in 0..1 or counts (`num_…`); see `heads.scoring.Scores`.
        per_class: C rows in index order; see `zero_shot_scores.class_accuracies`.
        files: where both were written.
        unreadable: images that were not counted, and why.
    """

    metrics: dict[str, float]
    per_class: pd.DataFrame
    files: TableFiles
    unreadable: list[Unreadable] = field(default_factory=list)


@dataclass(frozen=True)
class _Scored:
    """A split's scores, and what they were made of."""

    name: str
    outputs: Outputs
    classes: pd.DataFrame
    record: dict[str, Any]
    unreadable: list[Unreadable]


def evaluate(config: ZeroShotJobConfig) -> Evaluation:
    """Measures, prints, and writes `<name>.txt`, `.csv` and `.json`.

    Raises:
        ConfigError: no such split; or as many class names as there are classes are not given.
        CacheError, DatasetError: nothing with a label, or no projected features.
        UnreadableImagesError: more unreadable images than `max_unreadable`.
    """
    device = resolve_device(config.device)
    scored = _of_cache(config, device) if config.cache is not None else _of_dataset(config, device)
    scores = summarise(scored.outputs, scored.classes, config.metrics)
    per_class = scores.per_class
    if scored.outputs.rows is not None:
        per_class = class_accuracies(scored.outputs, per_class)
    files = TableFiles.of(config.out or OUT, config.name or scored.name)
    write_tables(files, scores.metrics, per_class, scored.record)
    failures = files.text.with_suffix(".unreadable.csv")
    write_unreadable(failures, scored.unreadable)
    if not config.quiet:
        print(f"{scored.record['source']}: {scored.record['split']}, zero-shot")
        print(metrics_table(scores.metrics, scores.intervals))
        print(f"per class: {files.text}")
        if scored.unreadable:
            print(f"{len(scored.unreadable):,} unreadable, not counted: {failures}")
    return Evaluation(scores.metrics, per_class, files, scored.unreadable)


def _of_cache(config: ZeroShotJobConfig, device: torch.device) -> _Scored:
    assert config.cache is not None
    cache = open_cache(config.cache)
    require_labels(cache)
    split = config.split or choose_split(cache)
    arrays = open_arrays(cache, ZeroShotConfig())
    part = labelled_part(cache, split)
    if not has_labels(part):
        raise RunError(f"{cache.path}: split {split!r} has no valid labelled row to evaluate on")
    classes = _renamed(config, cache.classes)
    templates = config.template_list(cache.identity.dataset.kind, classes)
    head = _cache_classifier(config, cache, classes, templates, device)
    table = FeatureTables(arrays, part.rows, device)
    outputs = collect(head, table, part, classes, config.metrics)
    record = {
        "source": str(cache.path),
        "fingerprint": cache.fingerprint,
        "backbone": cache.identity.backbone.record(),
        "split": split,
        "templates": templates,
        "scale": head.scale,
    }
    return _Scored(f"{Path(str(cache.path)).name}-{split}", outputs, classes, record, [])


def _cache_classifier(
    config: ZeroShotJobConfig,
    cache: Cache,
    classes: pd.DataFrame,
    templates: list[str],
    device: torch.device,
) -> ZeroShot:
    scale = config.scale or EVALUATION_SCALE
    if config.classes is not None:  # other sentences than those that the cache keeps
        sentences = format_prompts(classes, templates)
        head = classifier(open_cache_backbone(cache, str(device)), sentences, scale)
    else:
        prompts = class_text_features(
            cache, templates, lambda: open_cache_backbone(cache, str(device))
        )
        head = ZeroShot(ensemble(torch.from_numpy(prompts)), scale=scale).to(device)
    return _only_ranking(head, cache.task)


def _of_dataset(config: ZeroShotJobConfig, device: torch.device) -> _Scored:
    assert config.dataset is not None
    manifest = config.dataset.open()
    split, block, rows, targets = labelled_rows(manifest, config.split)
    classes = _renamed(config, manifest.classes)
    templates = config.template_list(manifest.kind, classes)
    prompts = format_prompts(classes, templates)
    paths = [block.paths[row] for row in rows]
    backbone, line = open_image_text(
        config.backbone, device, config.precision, manifest.root, paths, config.mode
    )
    scale = config.scale or EVALUATION_SCALE
    head = _only_ranking(classifier(backbone, prompts, scale), manifest.task)
    encoder = ImageEncoder(
        backbone,
        mode=config.mode,
        batch_size=config.batch_size,
        num_readers=config.num_readers,
    )
    progress = ProgressLine(config.quiet)
    progress.show(line)
    started = time.perf_counter()
    reasons: dict[int, str] = {}

    def batches() -> Iterator[tuple[Tensor, npt.NDArray[Any]]]:
        for batch in encoder.batches(manifest.root, paths):
            reasons.update(batch.reasons)
            _limit(reasons, paths, config.max_unreadable)
            if len(batch.rows):
                logits: Tensor = head(batch.features)
                yield finite(logits, (int(batch.rows[0]), batch.stop)), targets[batch.rows]
            rate = batch.stop / (time.perf_counter() - started)
            progress.show(f"{batch.stop:,} of {len(paths):,} images, {rate:,.0f}/s")

    only_rank = not head.has_probabilities
    with torch.inference_mode():
        outputs = gather(batches(), classes, config.metrics, only_rank=only_rank)
    progress.close()
    record = {
        "source": f"{manifest.kind} in {manifest.root}",
        "backbone": backbone.spec.identity.record(),
        "split": split,
        "templates": templates,
        "scale": head.scale,
    }
    unreadable = [
        Unreadable(block.ids[rows[place]], paths[place], why)
        for place, why in sorted(reasons.items())
    ]
    folder = Path(str(manifest.root)).name
    name = "-".join(dict.fromkeys([manifest.kind, folder, split]))
    return _Scored(name, outputs, classes, record, unreadable)


def labelled_rows(
    manifest: Manifest, split: str | None = None
) -> tuple[str, RowBlock, npt.NDArray[np.int64], npt.NDArray[Any]]:
    """The split that is evaluated, its labelled rows, and their targets.

    Other splits are not looked at, so that a set longer than memory needs only that one's rows.

    Args:
        manifest: the dataset.
        split: its name; None = test if it has labels, otherwise val, otherwise the first that has.

    Returns:
        Name; its block; (n,) positions of rows in it; (n,) int64 classes, or (n, C) uint8
        multi-hot.

    Raises:
        ConfigError: if there is no such split.
        DatasetError: if nothing in it has a label.
    """
    ranges = manifest.split_ranges
    if split is not None and split not in ranges:
        raise ConfigError(f"split: no split {split!r} in the dataset; it has {', '.join(ranges)}")
    order = sorted(ranges, key=lambda name: ("test", "val", name).index(name))
    for name in order if split is None else [split]:
        block = manifest.block(*ranges[name])
        counts = np.diff(block.label_offsets)
        if manifest.task == "unlabelled" or not counts.any():
            continue
        if manifest.task == "single_label":
            rows = np.flatnonzero(counts).astype(np.int64)
            return name, block, rows, block.label_values.astype(np.int64)
        rows = np.arange(len(block), dtype=np.int64)
        hot = np.zeros((len(block), manifest.num_classes), np.uint8)
        hot[np.repeat(rows, counts), block.label_values] = 1
        return name, block, rows, hot
    where = manifest.root if split is None else f"{manifest.root}: split {split!r}"
    raise DatasetError(
        f"{where}: no image has a label, and accuracy needs some; to see classes alone give "
        "--images"
    )


def _limit(reasons: dict[int, str], paths: list[str], share: float) -> None:
    """Ends the job once more than `share` of all images cannot be read."""
    if len(reasons) > share * len(paths):
        first = min(reasons)
        raise UnreadableImagesError(
            f"{len(reasons)} of {len(paths)} images cannot be read, the first is {paths[first]} "
            f"({reasons[first]}); mend them, or raise max_unreadable above {share:g}"
        )


def _renamed(config: ZeroShotJobConfig, classes: pd.DataFrame) -> pd.DataFrame:
    """The class table, with the names that the options give instead.

    Raises:
        ConfigError: if they are not as many.
    """
    if config.classes is None:
        return classes
    names = class_list(config.classes)
    if len(names) != len(classes):
        raise ConfigError(
            f"classes: {config.classes} has {len(names)} names, the dataset has {len(classes)} "
            "classes; give one for each, in index order"
        )
    return names.assign(count=classes["count"].to_numpy())


def _only_ranking(head: ZeroShot, task: str) -> ZeroShot:
    """In a multi-label set cosines rank images, and say of none that the class is there."""
    head.has_probabilities = task != "multi_label"
    return head
