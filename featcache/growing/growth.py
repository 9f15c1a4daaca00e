"""A cache whose dataset changed, brought up to date.

The new state is built as `<cache>.next`, a cache like any other: its shards take over known rows
from the old one, and encode what is new. When it is whole it takes the old one's place. Killed at
any moment, the same command goes on; the old cache stays complete and readable until the end.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace as replaced
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from featcache.backbones.base import Backbone
from featcache.class_text import text_array_name
from featcache.errors import CacheError, CacheMismatchError, ConfigError
from featcache.extract_config import ExtractConfig, ExtractReport
from featcache.growing import swap
from featcache.growing.assembly import Assembly
from featcache.growing.changes import Changes, compare, num_lost_images
from featcache.growing.donors import Donor
from featcache.growing.row_keys import RowKeys
from featcache.growing.survey import Reuse, Survey, survey
from featcache.identity import FeatureIdentity, Identity, differences
from featcache.layout.cache_plan import CachePlan
from featcache.manifest import Manifest
from featcache.prompts import format_prompts
from featcache.reader import Cache
from featcache.storage import StoreUrl, locate
from featcache.store import Store, cache_exists, create

_MEASURED = ("precision_cosine", "token_error")
"""Attributes measured when a cache began, which hold for its later states too."""


class Growth(Assembly):
    """An update of a cache under way; `store` is `<cache>.next` until `finish` returns."""

    @property
    def settled(self) -> bool:
        """False: even a complete update has yet to take the old cache's place."""
        return False

    def finish(self) -> ExtractReport:
        """Declares the update complete and puts it in the old cache's place.

        Raises:
            CacheError: if a shard is not done, or the folder may not be changed.
            UnreadableImagesError: if more images than `max_invalid` cannot be read.
        """
        old = Store.open(self.path)
        _carry_class_text(old, self.store)
        report = super().finish()
        if report.num_extracted < self.batch_size:  # too few to tell a rate by
            before = old.attributes.get("summary", {}).get("images_per_second")
            if before is not None:
                summary = report.model_copy(update={"images_per_second": before})
                self.store.finish(summary.record())
        try:
            swap.replace(self.path)
        except OSError as error:
            raise CacheError(
                f"{self.path}: cannot be replaced by {self.store.path} ({error.strerror}); the "
                "same command tries again"
            ) from error
        self.store = Store.open(self.path, write=True)
        return report


def is_wanted(store: Store, identity: Identity, num_captions: int) -> bool:
    """Whether a cache differs from what a job wants in its dataset only, so that it can grow.

    Args:
        store: the cache.
        identity: what the job wants.
        num_captions: captions of the dataset; a dataset without any has no caption features,
            whatever the options say.
    """
    return store.identity != identity and _fits(store, identity, num_captions)


def _fits(store: Store, identity: Identity, num_captions: int) -> bool:
    """Whether rows of a cache are right for another of that identity; see `is_wanted`."""
    free: set[str] = set()
    if not num_captions or not store.attributes["num_captions"]:
        free = {"features.text", "features.text_policy"}
    found = differences(store.identity.record(), identity.record())
    return all(name.startswith("dataset.") or name in free for name, _, _ in found)


def begin(
    config: ExtractConfig,
    manifest: Manifest,
    backbone: Backbone,
    plan: CachePlan,
    batch_size: int,
    resources: ExitStack,
) -> Growth:
    """The update of `config.cache` to a dataset's present state: a new one, or one to go on with.

    Args:
        config: what was asked for.
        manifest: the dataset.
        backbone: the encoder.
        plan: the cache that is wanted.
        batch_size: images per forward pass.
        resources: holds the writer's lock; the update takes it over.

    Raises:
        CacheMismatchError: if more than `max_lost` of the cached images would be dropped.
        CacheError: if something else lies at `<cache>.next`, or the disk is too small.
    """
    path = config.cache
    old = Store.open(path)
    building = swap.next_path(path)
    begun = _begun(path, plan.identity)
    # They may be older than the cache: left by one that was deleted, and came from another encoder.
    others = [
        store
        for store in map(Store.open, swap.donor_paths(path))
        if _fits(store, plan.identity, manifest.num_captions)
    ]
    donors = [Donor(store) for store in (old, *([begun] if begun else []), *others)]
    keys = RowKeys.of_manifest(manifest)
    found = survey(
        manifest,
        keys,
        donors,
        num_threads=config.reader_threads,
        by_id=config.views.num_views > 1,
        by_caption=depends_on_caption(plan.identity.features),
        retry_invalid=config.retry_invalid,
    )
    changes = compare(donors[0], keys, found.content)
    _require_most(config, donors[0], found, changes)
    print(f"{path} is brought up to date: {changes}", flush=True)
    print(f"  {describe(found, plan.identity.features.text)}", flush=True)
    if begun is None:
        attributes = {
            **plan.attributes,
            **{name: old.attributes[name] for name in _MEASURED if name in old.attributes},
            swap.UPDATES: old.attributes["fingerprint"],
            swap.STATE: old.attributes.get(swap.STATE, 0) + 1,
            "history": history(old, changes, plan.identity.fingerprint()),
        }
        linked = _linked_bytes(plan, found.images, "image/", donors)
        linked += _linked_bytes(plan, found.texts, "text/", donors)
        begun = create(building, replaced(plan, attributes=attributes), linked)
    else:
        print(f"  goes on with {building}", flush=True)
    for donor in donors:
        donor.forget_keys()
    held = resources.pop_all()  # from here on the lock is the update's
    return Growth(config, manifest, backbone, begun, batch_size, held, donors=donors, survey=found)


def describe(found: Survey, text: bool) -> str:
    """How many images and captions are known, e.g. `200 images to encode, 19800 taken over`."""
    images, texts = found.images, found.texts
    parts = [f"{images.num_new} images to encode, {len(images.donor) - images.num_new} taken over"]
    if text:
        known = len(texts.donor) - texts.num_new
        parts.append(f"{texts.num_new} captions to encode, {known} taken over")
    return "; ".join(parts)


def history(old: Store, changes: Changes, fingerprint: str) -> list[dict[str, Any]]:
    """The states that an update of `old` has behind it, oldest first.

    Only those that were complete once count (a shard that was tried again and not finished takes
    that away, not what was trained on it), and only if the next one's identity is another.
    """
    entries: list[dict[str, Any]] = list(old.attributes.get("history", []))
    before = old.attributes["fingerprint"]
    if "summary" not in old.attributes or before == fingerprint:  # `finish` puts it there
        return entries
    entry = {
        "fingerprint": before,
        "num_rows": old.attributes["num_rows"],
        "changed": changes.record(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return [*entries, entry]


def depends_on_caption(features: FeatureIdentity) -> bool:
    """Whether a row's image features depend on its first caption too."""
    return features.multimodal != "none" or features.itm


def shard_rows_of(store: Store, batch_size: int) -> int | None:
    """Rows of a shard that an update keeps, so that whole chunks can be linked; None = any."""
    rows = int(store.attributes["shard_rows"])
    return rows if len(store.shards("image")) > 1 and rows % batch_size == 0 else None


def _begun(path: Path | StoreUrl, wanted: Identity) -> Store | None:
    """The update that a killed run left, if it is the one wanted; another one is set aside.

    Raises:
        CacheError: if `<cache>.next` is something else.
    """
    building = swap.next_path(path)
    if not cache_exists(building):
        return None
    if not swap.belongs(path):
        raise CacheError(
            f"{building}: in the way, and not an update of {path}; move or delete it, then run "
            "again"
        )
    store, old = Store.open(building, write=True), Store.open(path)
    same = store.identity == wanted
    same &= store.attributes.get(swap.UPDATES) == old.attributes["fingerprint"]
    # After a recheck both states have one fingerprint: what it replaced looks like an update too.
    if same and not (store.complete and store.identity == old.identity):
        return store
    swap.set_aside(path)
    return None


def _require_most(config: ExtractConfig, old: Donor, found: Survey, changes: Changes) -> None:
    lost, total = num_lost_images(old, found.content)
    if lost <= config.max_lost * total:
        return
    raise CacheMismatchError(
        f"{config.cache}: {lost} of its {total} images ({100 * lost / total:.3g} %) are not in "
        f"this dataset, more than max_lost {config.max_lost} allows ({changes}); check --dataset "
        "and --cache, use another cache path, or raise --max_lost to drop them"
    )


def _linked_bytes(plan: CachePlan, reuse: Reuse, prefix: str, donors: Sequence[Donor]) -> int:
    """Bytes of chunk files that need no room, since their rows lie in one chunk of a donor."""
    total = 0
    for array in plan.arrays:
        if not array.path.startswith(prefix):
            continue
        starts = np.arange(0, array.shape[0], array.chunk_rows)
        if not len(starts):
            continue
        here = np.arange(array.shape[0])
        aligned = (reuse.donor >= 0) & (reuse.source % array.chunk_rows == here % array.chunk_rows)
        steady = np.ones(len(here), np.bool_)
        steady[1:] = (np.diff(reuse.source) == 1) & (np.diff(reuse.donor) == 0)
        steady[starts] = True
        whole = np.logical_and.reduceat(aligned & steady, starts)
        same = [d.store.has(array.path) for d in donors]
        same = [
            there and donor.store.files(array.path).chunk_rows == array.chunk_rows
            for there, donor in zip(same, donors, strict=True)
        ]
        donor = np.maximum(reuse.donor[starts], 0)
        whole &= np.asarray(same)[donor]
        if array.shape[0] % array.chunk_rows and whole[-1]:
            # The last chunk is filled up: it can only be linked where it ends the same way.
            end = donors[donor[-1]].store.files(array.path).shape[0]
            whole[-1] = int(reuse.source[-1]) + 1 == end
        total += int(whole.sum()) * (array.num_bytes // len(starts))
    return total


def _carry_class_text(old: Store, new: Store) -> None:
    """Links class text features whose sentences are still the same."""
    now = Cache(new)
    source, target = locate(old.path), locate(new.path)
    keys = [entry.key for entry in source.list("class_text") if entry.key.count("/") == 2]
    # An array without metadata was never finished.
    for name in [key.removesuffix("/zarr.json") for key in keys if key.endswith("/zarr.json")]:
        if target.exists(f"{name}/zarr.json"):
            continue
        files = old.files(name)
        template = files.attributes.get("template")
        if template is None or name != _class_text_name(now, str(template)):
            continue
        # The metadata last: an array is there when they are.
        for key in [*map(files.key, range(files.num_chunks)), f"{name}/zarr.json"]:
            source.copy(key, target, key)


def _class_text_name(cache: Cache, template: str) -> str | None:
    """Where a template's features would be kept for the classes as they are now."""
    try:
        (texts,) = format_prompts(cache.classes, [template])
    except ConfigError:  # a column that is no longer there
        return None
    return text_array_name(cache, texts)
