"""Job: a dataset's images through a frozen encoder into a cache.

    python -m featcache.extract --config featcache/configs/folder_vit_b32.yaml

The same command resumes after an interruption, and does nothing when all is done. Bytes written do
not depend on interruptions, on the shard size or on the number of readers; they do depend, within
rounding, on the batch size, the number of threads and the processor.
"""

import os
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator
from torch import Tensor

from featcache.backbones import AnyBackbone
from featcache.backbones.base import Backbone, BackboneSpec, FeatureRequest
from featcache.backbones.open_clip import OpenClipConfig
from featcache.config import Config, run_job
from featcache.datasets import AnyDataset
from featcache.errors import BackboneError, CacheCorruptError, ConfigError, UnreadableImagesError
from featcache.identity import (
    FeatureIdentity,
    Identity,
    Precision,
    PreprocessIdentity,
    StorageDtype,
    require_equal,
)
from featcache.images import PixelMode, Views
from featcache.manifest import Manifest
from featcache.pipeline import BatchReader, ImageSource, Progress, ShardWriter, Timings
from featcache.precision import PrecisionChoice, open_checked, resolve_device
from featcache.sharding import feature_arrays, shard_rows_for, shards_for
from featcache.store import CachePlan, Shard, Store, create, writer_lock

_SAMPLE_BATCHES = 8
"""Batches searched for readable images to check a fast arithmetic on."""


class FeatureOptions(Config):
    """Which features are kept, and how they are stored."""

    projected: bool = True
    """Keep image features after the projection, (N, P): what is compared with text."""
    pooled: bool = False
    """Keep pooled image features before the projection, (N, D)."""
    tokens: str = Field(default="none", pattern=r"^(none|all|grid:[1-9][0-9]*)$")
    """Keep patch tokens, (N, L, W), before the last norm: none, all, or grid:K = K x K averages."""
    token_layer: int = Field(default=-1, ge=-1)
    """Block whose output the tokens are, from 1; -1 = the last."""
    text: bool = True
    """Keep caption features, (M, P), if the dataset has captions."""
    storage_dtype: Literal["auto"] | StorageDtype = "auto"
    """Type on disk: float16 or float32; auto = float16, or float32 with `reference`."""

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not (self.projected or self.pooled or self.tokens != "none"):
            raise ValueError(
                "projected False, pooled False and tokens none keep nothing; set one of them"
            )
        if self.token_layer == 0:
            raise ValueError("token_layer 0 does not exist; layers count from 1, -1 = the last")
        return self


class ViewOptions(Config):
    """Augmented views: random resized crops, flipped half of the time, next to the plain view."""

    num_views: PositiveInt = 1
    """Views per image; 1 = the plain one only, and no view axis in the arrays."""
    seed: NonNegativeInt = 0
    """Seed of crops and flips."""
    scale: float = Field(default=0.5, gt=0, le=1)
    """Smallest share of the image's area that a crop keeps, in (0, 1]."""


class ExtractConfig(Config):
    """Extract features of a dataset's images (and captions) into a cache. Resumes by itself."""

    dataset: AnyDataset = Field(discriminator="kind")
    """Images, labels, classes and captions; kind folder unless said otherwise."""
    backbone: AnyBackbone = Field(default=OpenClipConfig(), discriminator="kind")
    """Frozen encoder and its weights."""
    cache: Path
    """Folder of the cache: created, resumed, or found complete."""
    features: FeatureOptions = FeatureOptions()
    """What is kept."""
    views: ViewOptions = ViewOptions()
    """Augmented views."""
    mode: PixelMode = "fast"
    """Decode and resize: fast (within 1/255 of the source library), scaled (big JPEGs faster) or
    reference (the source library's own transform)."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: PrecisionChoice = "auto"
    """Arithmetic of the towers: fp32, bf16, fp16; auto = bf16 where it is native and agrees with
    fp32 on real images, fp16 on older GPUs; a cache keeps the one it began with."""
    min_cosine: float = Field(default=0.999, gt=0, le=1)
    """Smallest cosine between features of a fast precision and of fp32, on the first images."""
    reference: bool = False
    """Bit-faithful to the source library: mode reference, fp32, stored as float32."""
    batch_size: PositiveInt | Literal["auto"] = "auto"
    """Images per forward pass; auto = 32 on a CPU, 256 on a GPU, or what the cache began with."""
    num_readers: PositiveInt | Literal["auto"] = "auto"
    """Threads that read and decode; auto = one per processor this job may use."""
    shard_rows: PositiveInt | Literal["auto"] = "auto"
    """Rows written and marked done together, a multiple of batch_size: what a crash can cost;
    auto = 2048 on a CPU, 65536 on a GPU, or what the cache began with."""
    max_invalid: float = Field(default=0.01, ge=0, le=1)
    """Largest share of unreadable images; past it the job fails, and keeps what is done."""
    retry_invalid: bool = False
    """Extract again the shards that hold unreadable images."""
    repair: bool = False
    """Verify every checksum first, and extract damaged shards again."""
    restart: bool = False
    """Delete the cache and start anew."""

    @model_validator(mode="before")
    @classmethod
    def _folder_unless_said(cls, values: Any) -> Any:
        dataset = values.get("dataset") if isinstance(values, Mapping) else None
        if isinstance(dataset, Mapping) and "kind" not in dataset:
            return {**values, "dataset": {"kind": "folder", **dataset}}
        return values

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.reference:
            for name, value, legal in (
                ("mode", self.mode, ("fast", "reference")),
                ("precision", self.precision, ("auto", "fp32")),
                ("features.storage_dtype", self.features.storage_dtype, ("auto", "float32")),
            ):
                if value not in legal:
                    raise ValueError(f"reference true contradicts {name} {value}; drop one of them")
        if isinstance(self.batch_size, int) and isinstance(self.shard_rows, int):
            _check_whole_batches(self.shard_rows, self.batch_size)
        return self


class ExtractReport(Config):
    """What an extraction did; kept in the cache as its summary."""

    cache: str
    """The cache's folder."""
    fingerprint: str
    """Fingerprint of what it holds."""
    num_rows: int
    """Images."""
    num_captions: int
    """Captions."""
    num_invalid: int
    """Images that cannot be read."""
    num_extracted: int
    """Images encoded by this run."""
    precision: Precision
    """Arithmetic of the towers."""
    seconds: float
    """Wall-clock time of this run's shards."""
    images_per_second: dict[str, float]
    """Rates of reader, encoder, writer, and of all together (total), over this run."""


class ShardReport(Config):
    """What became of one shard; kept in the cache's done-list."""

    rows: int
    """Images or captions."""
    invalid: list[dict[str, Any]]
    """Unreadable images: row, id, path, reason."""
    seconds: float
    """Wall-clock time."""
    per_second: dict[str, float]
    """Rates of reader, encoder, writer, and of all together (total)."""


class Extraction:
    """An extraction under way: the cache is open and locked, the backbone loaded.

    Use as a context manager. `extract` may be called from several threads.

    Attributes:
        config: what was asked for.
        manifest: the dataset.
        backbone: the encoder.
        store: the cache.
        batch_size: images per forward pass.
    """

    def __init__(
        self,
        config: ExtractConfig,
        manifest: Manifest,
        backbone: Backbone,
        store: Store,
        batch_size: int,
        resources: ExitStack,
    ) -> None:
        self.config = config
        self.manifest = manifest
        self.backbone = backbone
        self.store = store
        self.batch_size = batch_size
        self.identity = store.identity
        self.timings = Timings()
        self._resources = resources
        self._lock = threading.Lock()
        self._progress: dict[str, Progress] = {}
        self._pending = self._find_pending()
        redone = {shard.index for shard in self._pending if shard.kind == "image"}
        self._invalid = {
            index: report["invalid"]
            for index, report in store.reports("image").items()
            if index not in redone
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Gives the cache free for other writers."""
        for progress in self._progress.values():
            progress.close()
        self._resources.close()

    def pending(self) -> list[Shard]:
        """Shards still to be extracted."""
        return list(self._pending)

    def invalid(self) -> list[dict[str, Any]]:
        """Unreadable images of the shards that are done, in row order: row, id, path, reason."""
        return [item for _, items in sorted(self._invalid.items()) for item in items]

    def extract(self, shard: Shard) -> ShardReport:
        """Extracts one shard and marks it done; its rows are on disk when this returns.

        Raises:
            CacheError: if the disk is full.
            BackboneError: if a feature is not finite, or too large for the storage type.
            UnreadableImagesError: if more images than `max_invalid` cannot be read; the shard is
                kept.
        """
        began = time.perf_counter()
        run = self._extract_images if shard.kind == "image" else self._extract_text
        timings, invalid = run(shard)
        timings.seconds = time.perf_counter() - began
        report = ShardReport(
            rows=timings.rows,
            invalid=invalid,
            seconds=round(timings.seconds, 3),
            per_second=timings.rates(),
        )
        with self._lock:
            self.store.mark_done(shard, report.record())
            self._pending.remove(shard)
            if shard.kind == "image":
                self.timings.add(timings)
                self._invalid[shard.index] = invalid
        self.check_invalid()
        return report

    def check_invalid(self) -> None:
        """Compares the unreadable images found so far with `max_invalid`.

        Raises:
            UnreadableImagesError: naming their number, their share, the first one and its reason.
        """
        invalid = self.invalid()
        total = len(self.manifest)
        if len(invalid) > self.config.max_invalid * total:
            raise UnreadableImagesError(
                f"{self.store.path}: {len(invalid)} of {total} images "
                f"({100 * len(invalid) / total:.2g} %) cannot be read, more than max_invalid "
                f"{self.config.max_invalid} allows; the first is {invalid[0]['path']}: "
                f"{invalid[0]['reason']}; what is done is kept: mend the files and run again with "
                "--retry_invalid, or raise --max_invalid"
            )

    def finish(self) -> ExtractReport:
        """Declares the cache complete, and says what it holds.

        Raises:
            CacheError: if a shard is not done.
            UnreadableImagesError: see `check_invalid`.
        """
        self.check_invalid()
        report = ExtractReport(
            cache=str(self.store.path),
            fingerprint=self.identity.fingerprint(),
            num_rows=len(self.manifest),
            num_captions=self._num_captions,
            num_invalid=len(self.invalid()),
            num_extracted=self.timings.rows,
            precision=self.identity.precision,
            seconds=round(self.timings.seconds, 3),
            images_per_second=self.timings.rates(),
        )
        if not self.store.complete or self.timings.rows:
            self.store.finish(report.record())
        return report

    @property
    def _num_captions(self) -> int:
        return len(self.manifest.caption_values) if self.identity.features.text else 0

    def _find_pending(self) -> list[Shard]:
        pending = self.store.pending()
        if self.config.retry_invalid:
            reports = self.store.reports("image")
            pending += [
                shard
                for shard in self.store.shards("image")
                if shard.index in reports and reports[shard.index]["invalid"]
            ]
        if self.config.repair:
            damaged = [shard for shard in self.store.shards() if self._is_damaged(shard)]
            if damaged:
                print(f"damaged: {', '.join(shard.key for shard in damaged)}; extracted again")
            pending += damaged
        return sorted(set(pending), key=lambda shard: (shard.kind, shard.index))

    def _is_damaged(self, shard: Shard) -> bool:
        for name in self.store.attributes["arrays"][shard.kind]:
            files = self.store.files(name)
            if any(files.problem(chunk) for chunk in files.chunks_of(shard.start, shard.stop)):
                return True
        return False

    def _report_progress(self, kind: str, rows: int, timings: Timings) -> None:
        if kind not in self._progress:
            total = len(self.manifest) if kind == "image" else self._num_captions
            open_rows = sum(s.stop - s.start for s in self._pending if s.kind == kind)
            unit = "images" if kind == "image" else "captions"
            self._progress[kind] = Progress(total, total - open_rows, unit)
        shown = Timings()
        shown.add(self.timings if kind == "image" else timings)
        if kind == "image":
            shown.add(timings)
        progress = self._progress[kind]
        progress.update(progress.done + rows, shown)

    def _extract_images(self, shard: Shard) -> tuple[Timings, list[dict[str, Any]]]:
        features = self.identity.features
        timings = Timings()
        invalid: list[dict[str, Any]] = []
        pinned = self.backbone.device.type == "cuda"
        num_readers = _num_readers(self.config)
        reader = BatchReader(self._source(), self.batch_size, num_readers, pinned)
        with ShardWriter(self.store, shard) as writer:
            for batch in reader.batches(shard.start, shard.stop):
                rows = batch.stop - batch.start
                valid = np.ones(rows, bool)
                for row, reason in sorted(batch.reasons.items()):
                    valid[row - batch.start] = False
                    path = self.manifest.paths[row]
                    item = {"row": row, "id": self.manifest.ids[row], "path": path}
                    invalid.append({**item, "reason": reason})
                with self._lock:
                    began = time.perf_counter()
                    arrays = encode_views(self.backbone, batch.pixels, _request(features), rows)
                    timings.encode_seconds += time.perf_counter() - began
                    timings.rows += rows
                    timings.read_seconds += batch.busy_seconds / num_readers
                    timings.write_seconds = writer.seconds
                    self._report_progress("image", rows, timings)
                stored = {
                    f"image/{name}": self._stored(f"image/{name}", values, valid, batch.start)
                    for name, values in arrays.items()
                }
                # `valid` goes last, so that a killed retry never shows a row before its features.
                writer.put(
                    batch.start, {**stored, "rows/content": batch.content, "rows/valid": valid}
                )
        timings.write_seconds = writer.seconds
        return timings, invalid

    def _extract_text(self, shard: Shard) -> tuple[Timings, list[dict[str, Any]]]:
        timings = Timings()
        captions = self.manifest.caption_values
        with ShardWriter(self.store, shard) as writer:
            for start in range(shard.start, shard.stop, self.batch_size):
                texts = captions[start : min(start + self.batch_size, shard.stop)]
                padded = texts + [""] * (self.batch_size - len(texts))
                with self._lock:
                    began = time.perf_counter()
                    values = self.backbone.encode_text(padded)[: len(texts)].cpu().numpy()
                    timings.encode_seconds += time.perf_counter() - began
                    timings.rows += len(texts)
                    self._report_progress("text", len(texts), timings)
                valid = np.ones(len(texts), bool)
                stored = self._stored("text/projected", values, valid, start)
                writer.put(start, {"text/projected": stored})
        timings.write_seconds = writer.seconds
        return timings, []

    def _source(self) -> ImageSource:
        return image_source(self.config, self.manifest, self.backbone)

    def _stored(
        self,
        name: str,
        values: npt.NDArray[np.float32],
        valid: npt.NDArray[np.bool_],
        start: int,
    ) -> npt.NDArray[Any]:
        """Rows as they go to disk: unreadable ones NaN, all others checked to be finite."""
        dtype = np.dtype(self.identity.features.storage_dtype)
        flat = np.abs(values.reshape(len(values), -1))
        largest = flat.max(axis=1)  # NaN if there is one
        bad = np.flatnonzero(valid & ~(largest <= np.finfo(dtype).max))
        if len(bad):
            row = start + int(bad[0])
            images = name.startswith("image/")
            what = f"image {self.manifest.ids[row]}" if images else f"caption {row}"
            found = float(largest[bad[0]])
            limit = float(np.finfo(dtype).max)
            advice = (
                "set --features.storage_dtype float32"
                if np.isfinite(found)
                else "set --precision fp32 (or bf16), and look at the weights if it stays"
            )
            raise BackboneError(
                f"{name} of {what} holds {found:.4g}, {dtype} reaches {limit:.4g}; {advice}"
            )
        values[~valid] = np.nan
        return values.astype(dtype)


def plan(config: ExtractConfig) -> Extraction:
    """Opens dataset, backbone and cache; creates the cache if it is not there.

    Raises:
        DatasetError: if the dataset on disk is not what its options say.
        BackboneError: if the backbone cannot be opened, or lacks a feature asked for.
        CacheMismatchError: if the cache holds something else.
        CacheError: if the disk is too small, or another process writes the cache.
    """
    device = resolve_device(config.device)
    manifest = config.dataset.open()
    with ExitStack() as resources:
        resources.enter_context(writer_lock(config.cache))
        store = _existing(config)
        began_with = {} if store is None else store.attributes
        batch_size = _batch_size(config, device, began_with)
        backbone, log = _open_backbone(config, device, manifest, store, batch_size)
        identity = _identity(config, manifest, backbone)
        if store is None:
            planned = _cache_plan(config, manifest, backbone, identity, batch_size)
            planned.attributes["precision_cosine"] = log["cosine"]
            print(f"backbone {backbone.spec.identity.name}: {log['text']}")
            print(f"writes {config.cache}: {planned.describe()}", flush=True)
            store = create(config.cache, planned)
        else:
            require_equal(store.identity, identity, str(config.cache))
            _check_shards(config, store, batch_size)
        return Extraction(config, manifest, backbone, store, batch_size, resources.pop_all())


def run(config: ExtractConfig) -> ExtractReport:
    """Extracts what is missing, and declares the cache complete.

    Raises:
        UserError: see `plan`, `Extraction.extract` and `Extraction.finish`.
    """
    with plan(config) as session:
        shards = session.pending()
        path, total = session.store.path, len(session.store.shards())
        if not shards and session.store.complete:
            report = session.finish()
            print(f"{path} is complete: {report.num_rows} rows, nothing to do")
            return report
        if len(shards) < total:
            print(f"{path}: {total - len(shards)} of {total} shards are done, going on", flush=True)
        session.check_invalid()
        for shard in shards:
            session.extract(shard)
        report = session.finish()
    rates = report.images_per_second
    print(
        f"{path} is complete: {report.num_rows} rows, {report.num_extracted} extracted now in "
        f"{report.seconds:.1f} s, {rates['total']} images/s (read {rates['read']}, encode "
        f"{rates['encode']}, write {rates['write']})"
    )
    if report.num_invalid:
        first = session.invalid()[0]
        print(
            f"{report.num_invalid} images cannot be read and are marked invalid; the first is "
            f"{first['path']}: {first['reason']}"
        )
    return report


def encode_views(
    backbone: Backbone, pixels: Tensor, request: FeatureRequest, rows: int
) -> dict[str, npt.NDArray[np.float32]]:
    """Features of a batch of V views, each view a batch of its own.

    Args:
        backbone: the encoder.
        pixels: (B, V, 3, H, W) as `encode_image` takes them.
        request: which features.
        rows: rows of the batch to return.

    Returns:
        float32 arrays (rows, ...) by feature, with a view axis behind the rows if V > 1.
    """
    views = [
        {name: t[:rows].cpu().numpy() for name, t in backbone.encode_image(view, request).items()}
        for view in pixels.unbind(1)
    ]
    wanted = {
        "projected": request.projected,
        "pooled": request.pooled,
        "tokens": request.tokens,
    }
    names = [name for name, asked in wanted.items() if asked]
    if len(views) == 1:
        return {name: views[0][name] for name in names}
    return {name: np.stack([view[name] for view in views], axis=1) for name in names}


def image_source(config: ExtractConfig, manifest: Manifest, backbone: Backbone) -> ImageSource:
    """Where an extraction's pixels come from."""
    mode = _mode(config)
    return ImageSource(
        root=manifest.root,
        paths=manifest.paths,
        ids=manifest.ids,
        spec=backbone.spec.pixels,
        mode=mode,
        views=Views(config.views.num_views, config.views.seed, config.views.scale),
        transform=backbone.reference_transform() if mode == "reference" else None,
    )


def _mode(config: ExtractConfig) -> PixelMode:
    return "reference" if config.reference else config.mode


def _num_readers(config: ExtractConfig) -> int:
    return len(os.sched_getaffinity(0)) if config.num_readers == "auto" else config.num_readers


def _existing(config: ExtractConfig) -> Store | None:
    """The cache that is already there; None if there is none, or none any more."""
    if not config.cache.exists():
        return None
    if not config.restart:
        return Store.open(config.cache, write=True)
    try:
        Store.open(config.cache)  # deletes caches only, not whatever a path happens to name
    except CacheCorruptError as error:
        print(f"restart: deleting a damaged cache ({error})")
    doomed = config.cache.with_name(f"{config.cache.name}.partial-deleted")
    config.cache.rename(doomed)
    shutil.rmtree(doomed)
    return None


def _batch_size(config: ExtractConfig, device: torch.device, began_with: Mapping[str, Any]) -> int:
    if config.batch_size != "auto":
        return config.batch_size
    if began_with:
        return int(began_with["batch_size"])
    size = 32 if device.type == "cpu" else 256
    if config.shard_rows != "auto" and config.shard_rows < size:
        return config.shard_rows
    return size


def _check_whole_batches(shard_rows: int, batch_size: int) -> None:
    if shard_rows % batch_size:
        raise ConfigError(
            f"shard_rows {shard_rows} is not a multiple of batch_size {batch_size}; a shard holds "
            "whole batches"
        )


def _check_shards(config: ExtractConfig, store: Store, batch_size: int) -> None:
    began_with = int(store.attributes["shard_rows"])
    if config.shard_rows not in ("auto", began_with):
        raise ConfigError(
            f"shard_rows {config.shard_rows}: {store.path} began with {began_with}; leave "
            "shard_rows unset to resume, or set --restart"
        )
    _check_whole_batches(began_with, batch_size)


def _open_backbone(
    config: ExtractConfig,
    device: torch.device,
    manifest: Manifest,
    store: Store | None,
    batch_size: int,
) -> tuple[Backbone, dict[str, Any]]:
    """The backbone in its arithmetic, and how that was found."""
    choice: PrecisionChoice = "fp32" if config.reference else config.precision
    if store is not None:
        recorded = store.identity.precision
        choice = recorded if choice == "auto" else choice
        return config.backbone.open(str(device), choice), {}
    opened, cosine, text = open_checked(
        config.backbone,
        device,
        choice,
        _request(_features(config, manifest)),
        config.min_cosine,
        lambda backbone: _samples(config, manifest, backbone, batch_size),
    )
    return opened, {"cosine": cosine, "text": text}


def _samples(
    config: ExtractConfig, manifest: Manifest, backbone: Backbone, batch_size: int
) -> Iterator[tuple[Tensor, list[int]]]:
    """The first batches that hold readable images: their plain view, and where the images are."""
    reader = BatchReader(image_source(config, manifest, backbone), batch_size, _num_readers(config))
    stop = min(len(manifest), _SAMPLE_BATCHES * batch_size)
    for batch in reader.batches(0, stop):
        rows = range(batch.start, batch.stop)
        positions = [row - batch.start for row in rows if row not in batch.reasons]
        if positions:
            yield batch.pixels[:, 0], positions


def _features(config: ExtractConfig, manifest: Manifest) -> FeatureIdentity:
    features, views = config.features, config.views
    storage: StorageDtype = "float32" if config.reference else "float16"
    if features.storage_dtype != "auto":
        storage = features.storage_dtype
    augmented = views.num_views > 1
    return FeatureIdentity(
        projected=features.projected,
        pooled=features.pooled,
        tokens=features.tokens,
        token_layer=features.token_layer if features.tokens != "none" else -1,
        text=features.text and bool(manifest.caption_values),
        storage_dtype=storage,
        num_views=views.num_views,
        view_seed=views.seed if augmented else 0,
        view_scale=views.scale if augmented else 1.0,
    )


def _request(features: FeatureIdentity) -> FeatureRequest:
    grid = features.tokens.startswith("grid:")
    return FeatureRequest(
        projected=features.projected,
        pooled=features.pooled,
        tokens=features.tokens != "none",
        token_pool=int(features.tokens.removeprefix("grid:")) if grid else None,
        token_layer=features.token_layer,
    )


def _identity(config: ExtractConfig, manifest: Manifest, backbone: Backbone) -> Identity:
    spec = backbone.spec
    features = _features(config, manifest)
    spec.require(_request(features), text=features.text)
    pixels = spec.pixels
    return Identity(
        dataset=manifest.identity,
        backbone=spec.identity,
        preprocess=PreprocessIdentity(
            size=pixels.size,
            mean=pixels.mean,
            std=pixels.std,
            interpolation=pixels.interpolation,
            resize_mode=pixels.resize_mode,
            fill_color=pixels.fill_color,
            mode=_mode(config),
        ),
        precision=backbone.precision,
        features=features,
    )


def _cache_plan(
    config: ExtractConfig,
    manifest: Manifest,
    backbone: Backbone,
    identity: Identity,
    batch_size: int,
) -> CachePlan:
    wanted = None if config.shard_rows == "auto" else config.shard_rows
    if wanted is not None:
        _check_whole_batches(wanted, batch_size)
    features = identity.features
    num_rows = len(manifest)
    num_captions = len(manifest.caption_values) if features.text else 0
    device = backbone.device.type
    shard_rows = shard_rows_for(num_rows, batch_size, device, wanted)
    text_rows = shard_rows_for(max(1, num_captions), batch_size, device, wanted)
    spec = backbone.spec
    return CachePlan(
        identity=identity,
        manifest=manifest,
        arrays=feature_arrays(features, spec, num_rows, num_captions, shard_rows, text_rows),
        shards=shards_for("image", num_rows, shard_rows)
        + shards_for("text", num_captions, text_rows),
        attributes={
            "backbone": config.backbone.record(),
            "dataset": config.dataset.record(),
            "root": str(manifest.root.resolve()),
            "shard_rows": shard_rows if wanted is None else wanted,
            "batch_size": batch_size,
            "token_grid": _kept_grid(features, spec),
            "logit_scale": spec.logit_scale,
            "projected_dim": spec.projected_dim,
            "pixels": identity.preprocess.record(),
            "device": str(backbone.device),
        },
    )


def _kept_grid(features: FeatureIdentity, spec: BackboneSpec) -> list[int] | None:
    if features.tokens == "none" or spec.token_grid is None:
        return None
    if features.tokens == "all":
        return list(spec.token_grid)
    side = int(features.tokens.removeprefix("grid:"))
    return [side, side]


if __name__ == "__main__":
    run_job(ExtractConfig, run)
