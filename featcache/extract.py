"""Job: a dataset's images through a frozen encoder into a cache.

    python -m featcache.extract --config featcache/configs/folder_vit_b32.yaml

The same command resumes after an interruption, and does nothing when all is done. Bytes written do
not depend on interruptions, on the shard size or on the number of readers; they do depend, within
rounding, on the batch size, the number of threads and the processor.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch

from featcache.backbones.base import Backbone
from featcache.config import run_job
from featcache.errors import CacheCorruptError, CacheFormatError, ConfigError
from featcache.extract_config import (
    ExtractConfig,
    ExtractReport,
    FeatureOptions,
    ShardReport,
    ViewOptions,
    check_whole_batches,
)
from featcache.extraction import Extraction, first_captions, image_source, request_of
from featcache.growing import growth, swap
from featcache.identity import (
    FeatureIdentity,
    Identity,
    StorageDtype,
    TokenDtype,
    require_equal,
)
from featcache.layout.sharding import feature_arrays, kept_grid, shard_rows_for, shards_for
from featcache.layout.token_check import token_error
from featcache.manifest import Manifest
from featcache.pipeline import BatchReader
from featcache.precision import PrecisionChoice, Sample, open_checked, resolve_device
from featcache.store import (
    CachePlan,
    Shard,
    Store,
    cache_exists,
    create,
    delete_cache,
    writer_lock,
)

__all__ = [
    "ExtractConfig",
    "ExtractReport",
    "Extraction",
    "FeatureOptions",
    "Shard",
    "ShardReport",
    "ViewOptions",
    "cache_plan",
    "carry_out",
    "identity_of",
    "plan",
    "run",
]

_SAMPLE_BATCHES = 8
"""Batches searched for readable images to check a fast arithmetic on."""


def plan(config: ExtractConfig) -> Extraction:
    """Opens dataset, backbone and cache; creates the cache if it is not there.

    Raises:
        DatasetError: if the dataset on disk is not what its options say.
        BackboneError: if the backbone cannot be opened, or lacks a feature asked for.
        CacheMismatchError: if the cache holds something else.
        CacheError: if the disk is too small, or another process writes the cache.
    """
    if config.dry_run:
        raise ConfigError("dry_run true writes nothing; use python -m featcache.extract for it")
    device = resolve_device(config.device)
    _ = config.text_policy  # a function that is not there is found before anything is written
    manifest = config.dataset.open()
    with ExitStack() as resources:
        resources.enter_context(writer_lock(config.cache))
        swap.recover(config.cache)
        store = _existing(config)
        began_with = {} if store is None else store.attributes
        batch_size = _batch_size(config, device, began_with)
        backbone, log = _open_backbone(config, device, manifest, store, batch_size)
        identity = identity_of(config, manifest, backbone)
        if store is not None and (
            growth.is_wanted(store, identity, manifest.num_captions)
            or (config.recheck and store.identity == identity)
        ):
            rows = growth.shard_rows_of(store, batch_size)
            planned = cache_plan(config, manifest, backbone, identity, batch_size, rows)
            return growth.begin(config, manifest, backbone, planned, batch_size, resources)
        if store is None:
            planned = _announced(config, manifest, backbone, log, identity, batch_size)
            store = create(config.cache, planned)
        else:
            require_equal(store.identity, identity, str(config.cache))
            _check_shards(config, store, batch_size)
            swap.clear(config.cache)
        return Extraction(config, manifest, backbone, store, batch_size, resources.pop_all())


def run(config: ExtractConfig) -> ExtractReport:
    """Extracts what is missing, and declares the cache complete.

    Raises:
        UserError: see `plan`, `Extraction.extract` and `Extraction.finish`.
    """
    if config.dry_run:
        return preview(config)
    return carry_out(plan(config))


def carry_out(extraction: Extraction) -> ExtractReport:
    """Extracts what is pending and declares the cache complete, with lines that say so.

    Args:
        extraction: planned, not yet entered; it is closed at the end.

    Raises:
        UserError: see `Extraction.extract` and `Extraction.finish`.
    """
    with extraction as session:
        shards = session.pending()
        path, total = session.path, len(session.store.shards())
        if not shards and session.settled:
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
    copied = f"{report.num_copied} taken over, " if report.num_copied else ""
    done = f"{path} is complete: {report.num_rows} rows, {copied}"
    if report.num_extracted:
        print(
            f"{done}{report.num_extracted} extracted now in {report.seconds:.1f} s, "
            f"{rates['total']} images/s (read {rates['read']}, encode {rates['encode']}, "
            f"write {rates['write']})"
        )
    else:
        print(f"{done}no image was encoded")
    if report.num_invalid:
        first = session.first_invalid()
        print(
            f"{report.num_invalid} images cannot be read and are marked invalid; the first is "
            f"{first['path']}: {first['reason']}"
        )
    return report


def preview(config: ExtractConfig) -> ExtractReport:
    """Prints what `run` would write, and writes nothing.

    Returns:
        A report of nothing done, with the fingerprint that the cache would have.

    Raises:
        UserError: what `plan` would raise, the lock and the disk's room aside.
    """
    device = resolve_device(config.device)
    manifest = config.dataset.open()
    store = Store.open(config.cache) if cache_exists(config.cache) and not config.restart else None
    batch_size = _batch_size(config, device, {} if store is None else store.attributes)
    backbone, log = _open_backbone(config, device, manifest, store, batch_size)
    identity = identity_of(config, manifest, backbone)
    if store is None:
        _announced(config, manifest, backbone, log, identity, batch_size)
    elif growth.is_wanted(store, identity, manifest.num_captions):
        print(f"{config.cache}: its dataset changed; python -m featcache.diff says how")
    else:
        require_equal(store.identity, identity, str(config.cache))
        print(f"{config.cache}: {len(store.pending())} of {len(store.shards())} shards are missing")
    print("dry run: nothing was written")
    return ExtractReport(
        cache=str(config.cache),
        fingerprint=identity.fingerprint(),
        num_rows=len(manifest),
        num_captions=manifest.num_captions if identity.features.text else 0,
        num_invalid=0,
        num_extracted=0,
        precision=identity.precision,
        seconds=0.0,
        images_per_second={},
    )


def _announced(
    config: ExtractConfig,
    manifest: Manifest,
    backbone: Backbone,
    log: Mapping[str, Any],
    identity: Identity,
    batch_size: int,
) -> CachePlan:
    """The plan of a new cache; prints its sizes, and what was measured on the first images."""
    planned = cache_plan(config, manifest, backbone, identity, batch_size)
    planned.attributes["precision_cosine"] = log["cosine"]
    print(f"backbone {backbone.spec.identity.name}: {log['text']}")
    print(f"writes {config.cache}: {planned.describe()}", flush=True)
    error = token_error(
        backbone, identity.features, _samples(config, manifest, backbone, batch_size)
    )
    if error is not None:
        planned.attributes["token_error"] = error.record()
        print(f"  {error}", flush=True)
    return planned


def _existing(config: ExtractConfig) -> Store | None:
    """The cache that is already there; None if there is none, or none any more."""
    if not cache_exists(config.cache):
        return None
    if not config.restart:
        return Store.open(config.cache, write=True)
    try:
        Store.open(config.cache)  # deletes caches only, not whatever a path happens to name
    except CacheCorruptError as error:
        print(f"restart: deleting a damaged cache ({error})")
    except CacheFormatError as error:
        print(f"restart: deleting a cache of another version ({error})")
    swap.clear(config.cache)
    delete_cache(config.cache)
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


def _check_shards(config: ExtractConfig, store: Store, batch_size: int) -> None:
    began_with = int(store.attributes["shard_rows"])
    if config.shard_rows not in ("auto", began_with):
        raise ConfigError(
            f"shard_rows {config.shard_rows}: {store.path} began with {began_with}; leave "
            "shard_rows unset to resume, or set --restart"
        )
    check_whole_batches(began_with, batch_size)


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
        request_of(_features(config, manifest)),
        config.min_cosine,
        lambda backbone: _samples(config, manifest, backbone, batch_size),
    )
    return opened, {"cosine": cosine, "text": text}


def _samples(
    config: ExtractConfig, manifest: Manifest, backbone: Backbone, batch_size: int
) -> Iterator[Sample]:
    """The first batches that hold readable images, in their plain view."""
    joint = config.features.multimodal != "none" or config.features.itm
    reader = BatchReader(
        image_source(config, manifest, backbone), batch_size, config.reader_threads
    )
    stop = min(len(manifest), _SAMPLE_BATCHES * batch_size)
    for batch in reader.batches(manifest.block(0, stop)):
        rows = range(batch.start, batch.stop)
        positions = [row - batch.start for row in rows if row not in batch.reasons]
        if not positions:
            continue
        texts, captioned = None, list[int]()
        if joint:
            captions = first_captions(manifest, np.asarray(rows))
            texts = config.text_policy([caption or "" for caption in captions])
            texts = [*texts, *[""] * (batch_size - len(texts))]
            captioned = [place for place in positions if captions[place] is not None]
        yield Sample(batch.pixels[:, 0], positions, texts, captioned)


def _features(config: ExtractConfig, manifest: Manifest) -> FeatureIdentity:
    features, views = config.features, config.views
    storage: StorageDtype = "float32" if config.reference else "float16"
    if features.storage_dtype != "auto":
        storage = features.storage_dtype
    augmented = views.num_views > 1
    image_only = config.backbone.image_only
    tokens: TokenDtype | None = None
    if features.tokens != "none":
        tokens = storage if features.token_dtype == "auto" else features.token_dtype
    reads_text = (not image_only if features.text is None else features.text) and (
        manifest.num_captions > 0
    )
    joint = features.multimodal != "none" or features.itm
    if joint and not manifest.num_captions:
        itm_alone = features.multimodal == "none"
        option = "features.itm true" if itm_alone else f"features.multimodal {features.multimodal}"
        raise ConfigError(
            f"{option} needs captions, and the {manifest.kind} dataset has none; python -m "
            "featcache.caption writes some"
        )
    return FeatureIdentity(
        projected=not image_only if features.projected is None else features.projected,
        pooled=image_only if features.pooled is None else features.pooled,
        tokens=features.tokens,
        token_layer=features.token_layer if features.tokens != "none" else -1,
        text=reads_text,
        storage_dtype=storage,
        num_views=views.num_views,
        view_seed=views.seed if augmented else 0,
        view_scale=views.scale if augmented else 1.0,
        token_dtype=tokens,
        multimodal=features.multimodal,
        itm=features.itm,
        text_policy=config.text_policy.name if reads_text or joint else "raw",
    )


def identity_of(config: ExtractConfig, manifest: Manifest, backbone: Backbone) -> Identity:
    """What the cache of an extraction holds.

    Raises:
        BackboneError: if the backbone lacks a feature asked for.
    """
    spec = backbone.spec
    features = _features(config, manifest)
    spec.require(request_of(features), text=features.text)
    return Identity(
        dataset=manifest.identity,
        backbone=spec.identity,
        preprocess=spec.pixels.record(config.pixel_mode),
        precision=backbone.precision,
        features=features,
    )


def cache_plan(
    config: ExtractConfig,
    manifest: Manifest,
    backbone: Backbone,
    identity: Identity,
    batch_size: int,
    shard_rows: int | None = None,
) -> CachePlan:
    """What is to be created; `shard_rows` beats the usual size unless the options say one."""
    wanted = shard_rows if config.shard_rows == "auto" else config.shard_rows
    if wanted is not None:
        check_whole_batches(wanted, batch_size)
    features = identity.features
    num_rows = len(manifest)
    num_captions = manifest.num_captions if features.text else 0
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
            "token_grid": kept_grid(features, spec),
            "num_prefix_tokens": spec.num_prefix_tokens if features.before_last else 0,
            "logit_scale": spec.logit_scale,
            "logit_bias": spec.logit_bias,
            "projected_dim": spec.projected_dim,
            "pixels": identity.preprocess.record(),
            "device": str(backbone.device),
        },
    )


if __name__ == "__main__":
    run_job(ExtractConfig, run)
