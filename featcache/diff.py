"""Job: how a dataset differs from a cache, and what bringing the cache up to date would take.

    python -m featcache.diff --cache cache/inat2021
    python -m featcache.diff --cache cache/inat2021 --dataset.root data/inat2021-new --json

Nothing is written and no encoder is opened. Only files that may be new are read.
"""

import json
import os
from collections.abc import Mapping
from typing import Any

from pydantic import Field, PositiveInt, model_validator

from featcache.config import Config, merge, run_job
from featcache.datasets import DATASETS, AnyDataset
from featcache.errors import CacheError
from featcache.growing.changes import compare, num_lost_images
from featcache.growing.donors import Donor
from featcache.growing.growth import depends_on_caption
from featcache.growing.row_keys import RowKeys
from featcache.growing.survey import ENCODE, Survey, survey
from featcache.layout.cache_plan import human_bytes
from featcache.manifest import Manifest
from featcache.storage import CachePath, place
from featcache.store import Store

_SHOWN = 5


class DiffConfig(Config):
    """Prints how a dataset differs from a cache, and what an update would encode."""

    cache: CachePath
    """Cache to compare with: a folder, or `s3://bucket/prefix`."""
    dataset: AnyDataset | None = Field(default=None, discriminator="kind")
    """Dataset as it is now; unset = the options that the cache was extracted with. Without a kind,
    single options take the place of those."""
    num_readers: PositiveInt | None = None
    """Threads that look at files, 1 or more; unset = one per processor this job may use."""
    as_json: bool = Field(default=False, alias="json")
    """Print JSON instead of text."""

    @model_validator(mode="before")
    @classmethod
    def _as_recorded_unless_said(cls, values: Any) -> Any:
        dataset = values.get("dataset") if isinstance(values, Mapping) else None
        if not isinstance(dataset, Mapping) or "kind" in dataset:
            return values
        if values.get("cache") is None:  # the one thing to complain of
            return {**values, "dataset": None}
        recorded = _recorded(Store.open(place(values["cache"])))
        return {**values, "dataset": merge(recorded, dataset)}


def run(config: DiffConfig) -> dict[str, Any]:
    """Prints and returns the differences.

    Raises:
        CacheError: if there is no cache, or its dataset's kind is not known here.
        DatasetError: if the dataset on disk is not what its options say.
    """
    store = Store.open(config.cache)
    manifest = _dataset(config, store)
    found = describe(store, manifest, config.num_readers or len(os.sched_getaffinity(0)))
    if config.as_json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        print(_text(found))
    return found


def describe(store: Store, manifest: Manifest, num_threads: int) -> dict[str, Any]:
    """The differences between a cache and a dataset as plain JSON values.

    Args:
        store: the cache, complete or not.
        manifest: the dataset.
        num_threads: threads that look at files.
    """
    donor, keys = Donor(store), RowKeys.of_manifest(manifest)
    features = store.identity.features
    seen = survey(
        manifest,
        keys,
        [donor],
        num_threads=num_threads,
        by_id=features.num_views > 1,
        by_caption=depends_on_caption(features),
    )
    changes = compare(donor, keys, seen.content)
    lost, held = num_lost_images(donor, seen.content)
    rate = _rate(store)
    same_rows = store.identity.dataset == manifest.identity
    num_texts = seen.texts.num_new if features.text else 0
    return {
        "cache": str(store.path),
        "fingerprint": store.attributes["fingerprint"],
        "same": same_rows and not changes.changed,
        "same_rows": same_rows,
        "num_rows": {"cache": len(donor.keys), "dataset": len(manifest)},
        **changes.record(),
        "lost_images": lost,
        "lost_share": lost / held if held else 0.0,
        "images_to_encode": seen.images.num_new,
        "captions_to_encode": num_texts,
        "files_read": seen.num_read,
        "bytes": _row_bytes(store, "image") * seen.images.num_new
        + _row_bytes(store, "text") * num_texts,
        "images_per_second": rate,
        "seconds": seen.images.num_new / rate if rate else None,
        "images_by_split": _by_split(seen, manifest),
    }


def _dataset(config: DiffConfig, store: Store) -> Manifest:
    if config.dataset is not None:
        return config.dataset.open()
    record = _recorded(store)
    return DATASETS[record["kind"]].model_validate(record).open()


def _recorded(store: Store) -> dict[str, Any]:
    """The dataset options that a cache was extracted with."""
    record: dict[str, Any] = store.attributes.get("dataset", {})
    if record.get("kind") not in DATASETS:
        raise CacheError(
            f"{store.path}: made from dataset kind {record.get('kind')!r}, this installation has "
            f"{', '.join(DATASETS)}; name the dataset with --dataset"
        )
    return record


def _by_split(seen: Survey, manifest: Manifest) -> dict[str, int]:
    """Images to encode in each split, where there are any."""
    new = seen.images.donor == ENCODE
    counts = {
        name: int(new[start:stop].sum()) for name, (start, stop) in manifest.split_ranges.items()
    }
    return {name: count for name, count in counts.items() if count}


def _rate(store: Store) -> float | None:
    """Images per second that the cache was encoded at, as far as that is known."""
    rates = store.attributes.get("summary", {}).get("images_per_second", {})
    known = [float(rates[part]) for part in ("read", "encode", "write") if rates.get(part)]
    return min(known) if known else None  # they overlap, so the slowest decides


def _row_bytes(store: Store, kind: str) -> int:
    """Bytes of a row of all feature arrays of a kind."""
    names = store.attributes["arrays"][kind]
    return sum(store.files(name).row_bytes for name in names if not name.startswith("rows/"))


def _text(found: Mapping[str, Any]) -> str:
    rows = found["num_rows"]
    lines = [f"cache    {found['cache']}, {rows['cache']} rows"]
    lines.append(f"dataset  {rows['dataset']} rows")
    if found["same"]:
        return "\n".join([*lines, "no difference"])
    names = {
        "gained": "images and ids that the cache does not hold",
        "lost": "rows of the cache that the dataset does not hold",
        "moved": "same image, other path, split or id",
        "relabelled": "same id, other classes",
        "recaptioned": "same id, other captions",
        "changed": "same id, other image",
    }
    lines += [f"  {name:<12} {found[name]:>9}  {what}" for name, what in names.items()]
    for name, title in (("new_classes", "new classes"), ("removed_classes", "classes gone")):
        if found[name]:
            shown = ", ".join(found[name][:_SHOWN]) + (", …" if len(found[name]) > _SHOWN else "")
            lines.append(f"  {title:<12} {len(found[name]):>9}  {shown}")
    time = "" if found["seconds"] is None else f", about {_duration(found['seconds'])}"
    parts = [f"{number} {name}" for name, number in found["images_by_split"].items()]
    lines.append(
        f"to encode: {found['images_to_encode']} images"
        + (f" ({', '.join(parts)})" if parts else "")
        + (f", {found['captions_to_encode']} captions" if found["captions_to_encode"] else "")
        + f", {human_bytes(found['bytes'])}{time}"
    )
    if found["same_rows"] and found["changed"]:
        lines.append("no path, label or caption changed: update with featcache.extract --recheck")
    if found["lost_images"]:
        lines.append(
            f"an update drops {found['lost_images']} images, {found['lost_share']:.1%} of the "
            "cache's (see --max_lost of featcache.extract)"
        )
    return "\n".join(lines)


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


if __name__ == "__main__":
    run_job(DiffConfig, run)
