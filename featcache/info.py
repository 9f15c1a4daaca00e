"""Job: what a cache holds, for people or as JSON.

python -m featcache.info --cache cache/inat2021
"""

import json
from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import Field, NonNegativeInt

from featcache.config import Config, run_job
from featcache.growing.changes import describe as changes
from featcache.layout.cache_plan import human_bytes
from featcache.layout.quantize import SCALE, TokenError
from featcache.reader import Cache, open_cache
from featcache.shot_groups import BOUNDARIES, GROUPS, group_names, stated_groups
from featcache.storage import CachePath

SHOWN_REASONS = 5


class InfoConfig(Config):
    """Prints what a cache holds; unfinished ones too."""

    cache: CachePath
    """Folder of the cache, or s3://bucket/prefix."""
    as_json: bool = Field(default=False, alias="json")
    """Print JSON instead of text; it lists every class and every unreadable image."""
    classes: NonNegativeInt = 12
    """Classes listed in the text, half of them those with most training images, half those with
    fewest; 0 or more."""


def run(config: InfoConfig) -> dict[str, Any]:
    """Prints and returns what a cache holds.

    Raises:
        CacheError: if there is no cache.
        CacheCorruptError: if its metadata are damaged.
    """
    found = describe(open_cache(config.cache, verify=False, allow_incomplete=True))
    if config.as_json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        print(_text(found, config.classes))
    return found


def describe(cache: Cache) -> dict[str, Any]:
    """What a cache holds as plain JSON values."""
    reports = {kind: cache.store.reports(kind) for kind in ("image", "text")}
    arrays = {}
    for kind in ("image", "text"):
        for name in cache.feature_names(f"{kind}/"):
            files = cache.store.files(name)
            arrays[name] = {
                "shape": list(files.shape),
                "dtype": str(files.dtype),
                "num_bytes": sum(_num_bytes(cache, part) for part in (name, name + SCALE)),
            }
    done = cache.done
    invalid = [item for report in reports["image"].values() for item in report["invalid"]]
    return {
        "path": str(cache.path),
        "complete": cache.complete,
        "fingerprint": cache.fingerprint,
        "identity": cache.identity.record(),
        "task": cache.task,
        "num_rows": cache.num_rows,
        "num_classes": cache.num_classes,
        "num_captions": cache.attributes["num_captions"],
        "class_columns": cache.attributes["class_columns"],
        "splits": _splits(cache, done),
        **_classes(cache),
        "num_invalid": len(invalid),
        "invalid_reasons": dict(Counter(item["reason"] for item in invalid).most_common()),
        "invalid": invalid,
        "arrays": arrays,
        "token_error": cache.attributes.get("token_error"),
        "shards": {
            kind: {"done": len(reports[kind]), "total": len(cache.store.shards(kind))}
            for kind in ("image", "text")
        },
        "history": cache.history,
        "versions": cache.attributes["versions"],
    }


def _num_bytes(cache: Cache, name: str) -> int:
    """Bytes of an array's rows; 0 if there is none of that name."""
    if not cache.has(name):
        return 0
    files = cache.store.files(name)
    return files.row_bytes * files.shape[0]


def _splits(cache: Cache, done: npt.NDArray[np.bool_]) -> dict[str, dict[str, int]]:
    """Rows, labels and captions by split."""
    labels, values = cache.label_lists
    captions = cache.array("text/offsets").read()
    return {
        name: {
            "rows": stop - start,
            "valid": int(cache.valid[start:stop].sum()),
            "invalid": int((done[start:stop] & ~cache.valid[start:stop]).sum()),
            "labels": int(labels[stop] - labels[start]),
            "classes": len(np.unique(values[labels[start] : labels[stop]])),
            "captions": int(captions[stop] - captions[start]),
        }
        for name, (start, stop) in cache.attributes["splits"].items()
    }


def _classes(cache: Cache) -> dict[str, Any]:
    """Classes with their counts and groups, and how large the groups are."""
    counts = cache.classes["count"].to_numpy(np.int64)
    stated = stated_groups(cache.classes)
    groups = group_names(counts) if stated is None else stated
    names = [str(name) for name in cache.classes["name"]]
    return {
        "groups": {group: groups.count(group) for group in GROUPS},
        "groups_from": "training images" if stated is None else "dataset",
        "classes": [
            {"name": name, "train_images": int(count), "group": group}
            for name, count, group in zip(names, counts, groups, strict=True)
        ],
    }


def _text(found: dict[str, Any], num_classes: int) -> str:
    identity = found["identity"]
    backbone, dataset, pixels = identity["backbone"], identity["dataset"], identity["preprocess"]
    shards = found["shards"]
    state = "complete" if found["complete"] else "unfinished"
    height, columns = pixels["size"]
    lines = [
        f"cache        {found['path']} ({state})",
        f"fingerprint  {found['fingerprint']}",
        f"dataset      {dataset['kind']}, {found['task']}, {found['num_rows']} rows, "
        f"{found['num_classes']} classes, {found['num_captions']} captions",
        f"backbone     {backbone['kind']} {backbone['name']}, {identity['precision']}, "
        f"weights {backbone['weights']}",
        f"pixels       {height}x{columns}, {pixels['mode']} mode",
        *_how_text_enters(identity),
        f"shards       {shards['image']['done']} of {shards['image']['total']} image, "
        f"{shards['text']['done']} of {shards['text']['total']} text",
    ]
    lines += [
        f"earlier      {entry['num_rows']} rows until {entry['date']}: {changes(entry['changed'])}"
        for entry in found["history"]
    ]
    lines.append("features")
    width = max(16, *map(len, found["arrays"]))
    for name, array in found["arrays"].items():
        shape = " x ".join(map(str, array["shape"]))
        lines.append(
            f"  {name:<{width}} {shape} {array['dtype']}, {human_bytes(array['num_bytes'])}"
        )
    if found["token_error"] is not None:
        lines.append(f"  {TokenError(**found['token_error'])}")
    lines.append("splits")
    for name, counts in found["splits"].items():
        lines.append(
            f"  {name:<16} {counts['rows']} rows, {counts['valid']} valid, "
            f"{counts['invalid']} unreadable{_labels_and_captions(counts)}"
        )
    if found["num_classes"]:
        lines += _class_lines(found, num_classes)
    invalid = found["invalid"]
    if invalid:
        reasons = ", ".join(f"{n} {reason}" for reason, n in found["invalid_reasons"].items())
        lines.append(f"unreadable   {reasons}")
        lines += [f"  {item['path']}: {item['reason']}" for item in invalid[:SHOWN_REASONS]]
    if len(invalid) > SHOWN_REASONS:
        lines.append(f"  and {len(invalid) - SHOWN_REASONS} more; --json lists them all")
    return "\n".join(lines)


def _labels_and_captions(counts: dict[str, int]) -> str:
    parts = [
        f"{counts[kind]} {kind} ({counts[kind] / max(counts['rows'], 1):.2f} a row)"
        for kind in ("labels", "captions")
        if counts[kind]
    ]
    return "".join(f", {part}" for part in parts)


def _how_text_enters(identity: dict[str, Any]) -> list[str]:
    """The line about captions, if they do not enter as they are."""
    policy = identity["features"]["text_policy"]
    options = [f"{name} {value}" for name, value in identity["backbone"]["options"].items()]
    if policy == "raw" and not options:
        return []
    return [f"text         {', '.join([policy, *options])}"]


def _class_lines(found: dict[str, Any], num: int) -> list[str]:
    """The groups, then the classes with most and with fewest training images."""
    low, high = BOUNDARIES
    source = "as the dataset states them"
    if found["groups_from"] != "dataset":
        source = f">={high} / {low}..{high - 1} / <{low} training images"
    sizes = ", ".join(f"{count} {group}" for group, count in found["groups"].items())
    lines = [f"classes      {found['num_classes']}: {sizes} ({source})"]
    ranked = sorted(found["classes"], key=lambda each: -each["train_images"])
    left_out = len(ranked) - num
    for place, each in enumerate(ranked):
        if left_out > 0 and num // 2 <= place < len(ranked) - (num + 1) // 2:
            if place == num // 2:
                lines.append(f"  ... {left_out} more; --json lists them all")
            continue
        lines.append(f"  {each['name']:<32} {each['train_images']:>8} {each['group']}")
    return lines


if __name__ == "__main__":
    run_job(InfoConfig, run)
