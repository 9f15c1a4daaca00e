r"""Job: features of an adapted backbone from what a cache holds of its base, without any image.

    python -m featcache.finish --cache cache/tokens --backbone adapted --backbone.model tuned/a \
        --out cache/tuned

A cache with `before_last` tokens is run through the last blocks; heads behind the projections are
applied to cached vectors. The result is the cache that extraction from the images would write, the
same identity included, within what the storage type rounds.
"""

import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field
from torch import Tensor

from featcache.adapter_folder import read_adapter
from featcache.adapters.last_blocks import LastBlocksConfig
from featcache.adapters.projection import ProjectedBackbone
from featcache.backbones import AnyBackbone
from featcache.backbones.adapted import AdaptedConfig
from featcache.backbones.base import Backbone, BackboneConfig
from featcache.class_text import recorded_backbone
from featcache.config import Config, run_job
from featcache.errors import BackboneError, CacheCorruptError, CacheError, CacheMismatchError
from featcache.extract import cache_plan, carry_out, identity_of
from featcache.extract_config import ExtractConfig, ExtractReport
from featcache.extraction import Extraction
from featcache.identity import differences, require_equal
from featcache.manifest import ROW_SCHEMA, Manifest
from featcache.pipeline import ShardWriter, Timings
from featcache.precision import resolve_device
from featcache.reader import Cache, open_cache
from featcache.storage import CachePath, place
from featcache.store import Shard, Store, cache_exists, create, writer_lock

Source = Literal["tokens", "vectors"]
"""What of a cache is read: the sequence before the last blocks, or vectors."""


class FinishConfig(Config):
    """Write the features of a backbone adapted at its end, from a cache of its base. Resumes."""

    cache: CachePath
    """Cache of the base: with `before_last` tokens for adapter last_blocks, with projected features
    for adapter projection."""
    backbone: AnyBackbone | None = Field(default=None, discriminator="kind")
    """The adapted backbone (kind adapted, its folder as model); unset = the one that wrote the
    cache, whose tokens then become features."""
    out: CachePath
    """Folder of the new cache, or s3://bucket/prefix: created, resumed, or found complete."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""


def run(config: FinishConfig) -> ExtractReport:
    """Writes what is missing of the new cache, and declares it complete.

    Raises:
        CacheError: the cache lacks what the backbone continues from, was written by a backbone that
            is not installed, or the disk is too small.
        CacheMismatchError: the cache was written by another base.
        BackboneError: the backbone cannot be opened, or is adapted below what the cache holds.
    """
    source = open_cache(config.cache)
    device = resolve_device(config.device)
    options = config.backbone or recorded_backbone(source)
    backbone = options.open(str(device), source.identity.precision)
    start = start_of(source, options, backbone)
    with ExitStack() as resources:
        resources.enter_context(writer_lock(config.out))
        return carry_out(_planned(config, source, options, backbone, start, resources))


def start_of(source: Cache, options: BackboneConfig, backbone: Backbone) -> Source:
    """What a backbone continues from in a cache.

    Args:
        source: the cache.
        options: that opened `backbone`.
        backbone: whose features are wanted.

    Raises:
        CacheError: if the cache does not hold it.
        CacheMismatchError: if the cache was written by another base.
        BackboneError: if the backbone is adapted below what any cache holds.
    """
    identity, trains_on, num_blocks = backbone.spec.identity, "tokens", 1
    if isinstance(options, AdaptedConfig) and identity != source.identity.backbone:
        held = read_adapter(Path(options.model))
        identity, trains_on = held.base_identity, held.adapter.trains_on
        if isinstance(held.adapter, LastBlocksConfig):
            num_blocks = held.adapter.num_blocks
        if trains_on == "pixels":
            raise BackboneError(
                f"{options.model}: adapter {held.adapter.kind} changes the backbone from its first "
                "block on, no cache of its base helps; extract from the images"
            )
    found = source.identity.backbone.record()
    for name, have, want in differences(found, identity.record()):
        raise CacheMismatchError(
            f"{source.path}: backbone.{name} differs: the cache was written with {have!r}, this "
            f"backbone goes on from {want!r}; give a cache of that base"
        )
    if trains_on == "features":
        if not source.has("image/projected"):
            raise CacheError(
                f"{source.path}: no image/projected, which adapter projection reads; extract with "
                "--features.projected"
            )
        return "vectors"
    last = source.identity.features.before_last
    if last < num_blocks:
        raise CacheError(
            f"{source.path}: features.tokens is {source.identity.features.tokens}, going on from "
            f"it needs before_last:{num_blocks}; extract with that"
        )
    return "tokens"


def manifest_of(cache: Cache) -> Manifest:
    """The dataset that a cache was made from, out of the cache's own tables.

    Raises:
        CacheCorruptError: if they are not what the cache's identity says.
    """
    (label_offsets, labels), (caption_offsets, captions) = cache.label_lists, cache.captions
    columns = [
        *(pa.array(list(c), pa.large_string()) for c in (cache.ids, cache.paths, cache.splits)),
        pa.LargeListArray.from_arrays(label_offsets, pa.array(labels, pa.int32())),
        pa.LargeListArray.from_arrays(caption_offsets, pa.array(list(captions), pa.large_string())),
    ]
    manifest = Manifest(
        cache.identity.dataset.kind,
        place(cache.attributes["root"]),
        pa.table(columns, schema=ROW_SCHEMA),
        cache.classes,
        cache.task,
    )
    for name, have, want in differences(
        manifest.identity.record(), cache.identity.dataset.record()
    ):
        raise CacheCorruptError(
            f"{cache.path}: dataset.{name} of its tables is {have!r}, of its identity {want!r}; "
            "look with python -m featcache.verify"
        )
    return manifest


def _planned(
    config: FinishConfig,
    source: Cache,
    options: BackboneConfig,
    backbone: Backbone,
    start: Source,
    resources: ExitStack,
) -> "Finishing":
    """The new cache opened for writing, as extraction from the images would have begun it."""
    held, projected = source.identity.features, backbone.spec.projected_dim > 0
    wanted = ExtractConfig.from_values(
        {
            "dataset": source.attributes["dataset"],
            "backbone": options.record(),
            "cache": str(config.out),
            "features": {
                "projected": projected,
                "pooled": not projected,
                "text": held.text,
                "text_policy": held.text_policy if held.text else "raw",
                "storage_dtype": held.storage_dtype,
            },
            "views": {
                "num_views": held.num_views,
                "seed": held.view_seed,
                "scale": held.view_scale,
            },
            "mode": source.identity.preprocess.mode,
            "device": config.device,
            "precision": source.identity.precision,
            "batch_size": source.attributes["batch_size"],
            "shard_rows": source.attributes["shard_rows"],
            "max_invalid": 1.0,  # the cache was accepted with those it has
        }
    )
    manifest = manifest_of(source)
    identity = identity_of(wanted, manifest, backbone)
    if cache_exists(config.out):
        store = Store.open(config.out, write=True)
        require_equal(store.identity, identity, str(config.out))
    else:
        batch_size = int(source.attributes["batch_size"])
        planned = cache_plan(wanted, manifest, backbone, identity, batch_size)
        print(f"writes {config.out}: {planned.describe()}", flush=True)
        store = create(config.out, planned)
    return Finishing(wanted, manifest, backbone, store, resources.pop_all(), source, start)


class Finishing(Extraction):
    """An extraction whose encoder goes on from what another cache holds."""

    def __init__(
        self,
        config: ExtractConfig,
        manifest: Manifest,
        backbone: Backbone,
        store: Store,
        resources: ExitStack,
        source: Cache,
        start: Source,
    ) -> None:
        """Reads nothing yet.

        Args:
            config: the extraction that would give the same cache.
            manifest: the dataset.
            backbone: whose features are written.
            store: the new cache.
            resources: holds the writer's lock.
            source: cache of the base.
            start: what of it is read.
        """
        batch_size = int(source.attributes["batch_size"])
        super().__init__(config, manifest, backbone, store, batch_size, resources)
        self._source, self._start = source, start
        self._image = source.row_array("image/tokens" if start == "tokens" else "image/projected")
        self._text = source.array("text/projected") if self.identity.features.text else None

    def _extract_images(self, shard: Shard) -> tuple[Timings, list[dict[str, Any]]]:
        source, timings = self._source, Timings()
        feature = "image/projected" if self.identity.features.projected else "image/pooled"
        whole = slice(shard.start, shard.stop)
        all_valid = source.array("rows/valid").read(whole)
        marks = {"rows/content": source.array("rows/content").read(whole)}
        marks["rows/stamp"] = (
            source.array("rows/stamp").read(whole)
            if source.has("rows/stamp")
            else np.zeros_like(marks["rows/content"])  # caches of before it was kept
        )
        with ShardWriter(self.store, shard) as writer:
            for start in range(shard.start, shard.stop, self.batch_size):
                stop = min(start + self.batch_size, shard.stop)
                began = time.perf_counter()
                held = torch.from_numpy(self._image.read(slice(start, stop)))
                read = time.perf_counter()
                values = self._encode(held).cpu().numpy()
                timings.read_seconds += read - began
                timings.encode_seconds += time.perf_counter() - read
                timings.rows += stop - start
                timings.write_seconds = writer.seconds
                here = slice(start - shard.start, stop - shard.start)
                valid = all_valid[here]
                stored = self._stored(feature, values, valid, np.arange(start, stop))
                rows = {name: mark[here] for name, mark in marks.items()}
                writer.put(start, {**stored, **rows, "rows/valid": valid})
                self._report_progress("image", stop - start, timings)
        timings.write_seconds = writer.seconds
        return timings, self._invalid_between(shard.start, shard.stop)

    def _encode(self, held: Tensor) -> Tensor:
        """(n, …) float32 features of rows, each view a batch of its own, always of full size."""
        missing = self.batch_size - len(held)
        padded = torch.cat([held, held.new_zeros(missing, *held.shape[1:])]) if missing else held
        views = padded.unbind(1) if self.identity.features.num_views > 1 else (padded,)
        made = [self._continue(view)[: len(held)] for view in views]
        return torch.stack(made, 1) if len(made) > 1 else made[0]

    def _continue(self, rows: Tensor) -> Tensor:
        if self._start == "tokens":
            last = self._source.identity.features.before_last
            return self.backbone.finish_from(rows, last)
        assert isinstance(self.backbone, ProjectedBackbone)
        return self.backbone.project_image(rows)

    def _extract_text(self, shard: Shard) -> tuple[Timings, list[dict[str, Any]]]:
        timings = Timings()
        assert self._text is not None
        with ShardWriter(self.store, shard) as writer:
            for start in range(shard.start, shard.stop, self.batch_size):
                rows = np.arange(start, min(start + self.batch_size, shard.stop))
                values = self._text.read(slice(start, start + len(rows)))
                if isinstance(self.backbone, ProjectedBackbone):
                    values = self.backbone.project_text(torch.from_numpy(values)).cpu().numpy()
                timings.rows += len(rows)
                valid = np.ones(len(rows), np.bool_)
                writer.put(start, self._stored("text/projected", values, valid, rows))
        timings.write_seconds = writer.seconds
        return timings, []

    def _invalid_between(self, start: int, stop: int) -> list[dict[str, Any]]:
        """Unreadable images of rows, as the source reported them."""
        return [
            item
            for _, report in self._source.store.each_report("image")
            for item in report["invalid"]
            if start <= item["row"] < stop
        ]


if __name__ == "__main__":
    run_job(FinishConfig, run)
