"""An extraction under way: shards through reader, encoder and writer."""

import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from itertools import pairwise
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from featcache.backbones.base import Backbone, FeatureRequest
from featcache.errors import BackboneError, UnreadableImagesError
from featcache.extract_config import ExtractConfig, ExtractReport, ShardReport
from featcache.identity import FeatureIdentity
from featcache.images import Views
from featcache.layout.quantize import SCALE, quantize
from featcache.manifest import Manifest
from featcache.pipeline import Batch, BatchReader, ImageSource, Progress, ShardWriter, Timings
from featcache.row_block import RowBlock
from featcache.store import Shard, ShardKind, Store

JOINT = frozenset({"multimodal", "multimodal_mask", "multimodal_pooled", "itm"})
"""Image features that depend on the row's first caption, and are missing without one."""


class Extraction:
    """An extraction under way: the cache is open and locked, the backbone loaded.

    Use as a context manager. `extract` may be called from several threads.

    Attributes:
        config: what was asked for.
        manifest: the dataset.
        backbone: the encoder.
        store: the cache that is written.
        path: where it is to be found once it is complete.
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
        self.path = config.cache
        self.batch_size = batch_size
        self.identity = store.identity
        self._policy = config.text_policy
        self.timings = Timings()
        self._resources = resources
        self._lock = threading.Lock()
        self._progress: dict[str, Progress] = {}
        self._pending = self._find_pending()
        redone = {shard.index for shard in self._pending if shard.kind == "image"}
        # Their number by shard: a set longer than memory may have unreadable images beyond it too.
        self._num_invalid = {
            index: len(report["invalid"])
            for index, report in store.each_report("image")
            if report["invalid"] and index not in redone
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

    @property
    def settled(self) -> bool:
        """Whether the cache is complete where it is to be found."""
        return self.store.complete

    def pending(self) -> list[Shard]:
        """Shards still to be extracted."""
        return list(self._pending)

    def invalid(self) -> list[dict[str, Any]]:
        """Unreadable images of the shards that are done, in row order: row, id, path, reason."""
        return [item for index in sorted(self._num_invalid) for item in self._invalid_of(index)]

    def _invalid_of(self, index: int) -> list[dict[str, Any]]:
        return [
            item
            for _, report in self.store.each_report("image", index)
            for item in report["invalid"]
        ]

    def first_invalid(self) -> dict[str, Any]:
        """The first of them; there has to be one."""
        return self._invalid_of(min(index for index, n in self._num_invalid.items() if n))[0]

    @property
    def num_invalid(self) -> int:
        """Unreadable images of the shards that are done."""
        return sum(self._num_invalid.values())

    def extract(self, shard: Shard) -> ShardReport:
        """Extracts one shard and marks it done; its rows are on disk when this returns.

        Raises:
            CacheError: if the disk is full.
            BackboneError: if a feature is not finite, or too large for the storage type.
            UnreadableImagesError: if more images than `max_invalid` cannot be read; the shard is
                kept.
        """
        began = time.perf_counter()
        with self._lock:
            self.store.mark_pending(shard)
        run = self._extract_images if shard.kind == "image" else self._extract_text
        timings, invalid = run(shard)
        timings.seconds = time.perf_counter() - began
        num_rows = shard.stop - shard.start
        report = ShardReport(
            rows=num_rows,
            copied=num_rows - timings.rows,
            invalid=invalid,
            seconds=round(timings.seconds, 3),
            per_second=timings.rates(),
        )
        with self._lock:
            self.store.mark_done(shard, report.record())
            self._pending = [other for other in self._pending if other != shard]
            if shard.kind == "image":
                self.timings.add(timings)
                self._num_invalid[shard.index] = len(invalid)
        self.check_invalid()
        return report

    def check_invalid(self) -> None:
        """Compares the unreadable images found so far with `max_invalid`.

        Raises:
            UnreadableImagesError: naming their number, their share, the first one and its reason.
        """
        number, total = self.num_invalid, len(self.manifest)
        if number > self.config.max_invalid * total:
            first = self.first_invalid()
            raise UnreadableImagesError(
                f"{self.path}: {number} of {total} images "
                f"({100 * number / total:.3g} %) cannot be read, more than max_invalid "
                f"{self.config.max_invalid} allows; the first is {first['path']}: "
                f"{first['reason']}; what is done is kept: mend the files and run again with "
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
            cache=str(self.path),
            fingerprint=self.identity.fingerprint(),
            num_rows=len(self.manifest),
            num_captions=self._num_captions,
            num_invalid=self.num_invalid,
            num_extracted=self.timings.rows,
            num_copied=self._num_copied,
            precision=self.identity.precision,
            seconds=round(self.timings.seconds, 3),
            images_per_second=self.timings.rates(),
        )
        if not self.store.complete or self.timings.rows:
            self.store.finish(report.record())
        return report

    @property
    def _num_captions(self) -> int:
        return self.manifest.num_captions if self.identity.features.text else 0

    @property
    def _num_copied(self) -> int:
        return 0

    def _find_pending(self) -> list[Shard]:
        if self.config.repair:
            self._drop_damaged_reports()
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

    def _drop_damaged_reports(self) -> None:
        """Takes shards off the done-list whose entry cannot be read."""
        for shard in self.store.shards():
            files = self.store.files(f"shards/{shard.kind}")
            if files.present([shard.index]) and files.kept_problem(shard.index):
                print(f"damaged: the report of {shard.key}; extracted again")
                self.store.mark_pending(shard)

    def _is_damaged(self, shard: Shard) -> bool:
        for name in self.store.attributes["arrays"][shard.kind]:
            files = self.store.files(name)
            if any(files.kept_problem(chunk) for chunk in files.chunks_of(shard.start, shard.stop)):
                return True
        return False

    def _totals(self, kind: ShardKind) -> tuple[int, int]:
        """Rows to be encoded for the whole cache, and how many of them are done."""
        total = len(self.manifest) if kind == "image" else self._num_captions
        return total, total - sum(s.stop - s.start for s in self._pending if s.kind == kind)

    def _report_progress(self, kind: ShardKind, rows: int, timings: Timings) -> None:
        if kind not in self._progress:
            unit = "images" if kind == "image" else "captions"
            self._progress[kind] = Progress(*self._totals(kind), unit)
        shown = Timings()
        shown.add(self.timings if kind == "image" else timings)
        if kind == "image":
            shown.add(timings)
        progress = self._progress[kind]
        progress.update(progress.done + rows, shown)

    def _extract_images(self, shard: Shard) -> tuple[Timings, list[dict[str, Any]]]:
        timings = Timings()
        reasons: dict[int, str] = {}
        block = self.manifest.block(shard.start, shard.stop)
        with ShardWriter(self.store, shard) as writer:
            for batch in self._reader().batches(block):
                valid = batch.valid
                reasons |= {row - shard.start: reason for row, reason in batch.reasons.items()}
                timings.write_seconds = writer.seconds
                stored = self._encode_batch(batch, np.arange(batch.start, batch.stop), timings)
                # `valid` goes last, so that a killed retry never shows a row before its features.
                marks = {"rows/content": batch.content, "rows/stamp": batch.stamp}
                writer.put(batch.start, {**stored, **marks, "rows/valid": valid})
        timings.write_seconds = writer.seconds
        return timings, invalid_rows(block, reasons)

    def _encode_batch(
        self, batch: Batch, rows: npt.NDArray[np.int64], timings: Timings, padded: bool = True
    ) -> dict[str, npt.NDArray[Any]]:
        """A batch's rows of every feature array as they go to disk.

        Args:
            batch: pixels of n rows.
            rows: (n,) their row numbers in the cache.
            timings: takes the time.
            padded: whether a batch that is not full is encoded at full size, so that a row's
                neighbours do not change its rounding.
        """
        num_rows = batch.stop - batch.start
        pixels = batch.pixels if padded else batch.pixels[:num_rows]
        request = request_of(self.identity.features)
        texts, captioned = None, np.ones(num_rows, np.bool_)
        if request.joint:
            captions = first_captions(self.manifest, rows)
            captioned = np.asarray([caption is not None for caption in captions])
            texts = self._policy([caption or "" for caption in captions])
        with self._lock:
            began = time.perf_counter()
            arrays = encode_views(self.backbone, pixels, request, num_rows, texts)
            timings.encode_seconds += time.perf_counter() - began
            timings.rows += num_rows
            timings.read_seconds += batch.busy_seconds / self.config.reader_threads
            self._report_progress("image", num_rows, timings)
        stored: dict[str, npt.NDArray[Any]] = {}
        for name, values in arrays.items():
            valid = batch.valid & captioned if name in JOINT else batch.valid
            stored |= self._stored(f"image/{name}", values, valid, rows)
        return stored

    def _extract_text(self, shard: Shard) -> tuple[Timings, list[dict[str, Any]]]:
        timings = Timings()
        with ShardWriter(self.store, shard) as writer:
            for start in range(shard.start, shard.stop, self.batch_size):
                texts = self.manifest.captions(start, min(start + self.batch_size, shard.stop))
                rows = np.arange(start, start + len(texts))
                writer.put(start, self._encode_texts(texts, rows, timings))
        timings.write_seconds = writer.seconds
        return timings, []

    def _encode_texts(
        self, texts: list[str], rows: npt.NDArray[np.int64], timings: Timings
    ) -> dict[str, npt.NDArray[Any]]:
        """Features of n captions, `rows` among all, as they go to disk."""
        padded = self._policy(texts) + [""] * (self.batch_size - len(texts))
        with self._lock:
            began = time.perf_counter()
            values = self.backbone.encode_text(padded)[: len(texts)].cpu().numpy()
            timings.encode_seconds += time.perf_counter() - began
            timings.rows += len(texts)
            self._report_progress("text", len(texts), timings)
        return self._stored("text/projected", values, np.ones(len(texts), bool), rows)

    def _reader(self) -> BatchReader:
        source = image_source(self.config, self.manifest, self.backbone)
        pinned = self.backbone.device.type == "cuda"
        return BatchReader(source, self.batch_size, self.config.reader_threads, pinned)

    def _stored(
        self,
        name: str,
        values: npt.NDArray[Any],
        valid: npt.NDArray[np.bool_],
        rows: npt.NDArray[np.int64],
    ) -> dict[str, npt.NDArray[Any]]:
        """Rows as they go to disk, by array: those not `valid` NaN, others checked to be finite."""
        if values.dtype == np.bool_:
            values[~valid] = False
            return {name: values}
        kind, feature = name.split("/")
        dtype = self.identity.features.dtype_of(feature)
        limits = np.finfo(np.float32 if dtype == "int8" else dtype)
        flat = values.reshape(len(values), -1)
        largest = np.maximum(flat.max(axis=1), -flat.min(axis=1))  # NaN if there is one
        bad = np.flatnonzero(valid & ~(largest <= limits.max))
        if len(bad):
            row = int(rows[bad[0]])
            images = kind == "image"
            what = (
                f"image {self.manifest.block(row, row + 1).ids[0]}" if images else f"caption {row}"
            )
            found = float(largest[bad[0]])
            limit = float(limits.max)
            option = "token_dtype" if feature == "tokens" else "storage_dtype"
            advice = (
                f"set --features.{option} float32"
                if np.isfinite(found)
                else "set --precision fp32 (or bf16), and look at the weights if it stays"
            )
            raise BackboneError(
                f"{name} of {what} holds {found:.4g}, {limits.dtype} reaches {limit:.4g}; {advice}"
            )
        values[~valid] = np.nan
        if dtype == "int8":
            codes, scales = quantize(values)
            return {name: codes, name + SCALE: scales}
        # The same bytes as astype's, in a sixth of the time.
        return {name: torch.from_numpy(values).to(getattr(torch, dtype)).numpy()}


def first_captions(manifest: Manifest, rows: npt.NDArray[np.int64]) -> list[str | None]:
    """The first caption of each row, None where there is none.

    Args:
        manifest: the dataset.
        rows: (n,) row numbers; consecutive ones are read together.
    """
    captions: list[str | None] = []
    for run in np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1):
        if not len(run):
            continue
        block = manifest.block(int(run[0]), int(run[-1]) + 1)
        for start, stop in pairwise(block.caption_offsets.tolist()):
            captions.append(block.captions[start] if stop > start else None)
    return captions


def invalid_rows(block: RowBlock, reasons: Mapping[int, str]) -> list[dict[str, Any]]:
    """Row number, id, path and reason of unreadable images.

    Args:
        block: rows.
        reasons: by place in the block.
    """
    return [
        {
            "row": block.start + place,
            "id": block.ids[place],
            "path": block.paths[place],
            "reason": reason,
        }
        for place, reason in sorted(reasons.items())
    ]


def encode_views(
    backbone: Backbone,
    pixels: Tensor,
    request: FeatureRequest,
    rows: int,
    texts: Sequence[str] | None = None,
) -> dict[str, npt.NDArray[Any]]:
    """Features of a batch of V views, each view a batch of its own.

    Args:
        backbone: the encoder.
        pixels: (B, V, 3, H, W) as `encode_image` takes them.
        request: which features.
        rows: rows of the batch to return.
        texts: a text for each of them; needed by the joint encoder only.

    Returns:
        float32 (a mask: bool) arrays (rows, ...) by feature, with a view axis behind the rows if
        V > 1.
    """
    if texts is not None:
        texts = [*texts, *[""] * (len(pixels) - rows)]
    views = [
        {
            name: t[:rows].cpu().numpy()
            for name, t in backbone.encode_image(view, request, texts).items()
        }
        for view in pixels.unbind(1)
    ]
    wanted = {
        "projected": request.projected,
        "pooled": request.pooled,
        "tokens": request.tokens,
        "multimodal": request.multimodal == "states",
        "multimodal_mask": request.multimodal == "states",
        "multimodal_pooled": request.multimodal != "none",
        "itm": request.itm,
    }
    names = [name for name, asked in wanted.items() if asked]
    if len(views) == 1:
        return {name: views[0][name] for name in names}
    return {name: np.stack([view[name] for view in views], axis=1) for name in names}


def image_source(config: ExtractConfig, manifest: Manifest, backbone: Backbone) -> ImageSource:
    """Where an extraction's pixels come from."""
    mode = config.pixel_mode
    return ImageSource(
        root=manifest.root,
        spec=backbone.spec.pixels,
        mode=mode,
        views=Views(config.views.num_views, config.views.seed, config.views.scale),
        transform=backbone.reference_transform() if mode == "reference" else None,
    )


def request_of(features: FeatureIdentity) -> FeatureRequest:
    """What a backbone is asked for, to get the features of a cache."""
    return FeatureRequest(
        projected=features.projected,
        pooled=features.pooled,
        tokens=features.tokens != "none",
        token_pool=features.token_pool,
        token_layer=features.token_layer,
        before_last=features.before_last,
        multimodal=features.multimodal,
        itm=features.itm,
    )
