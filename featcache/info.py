"""Job: what a cache holds, for people or as JSON.

python -m featcache.info --cache cache/inat2021
"""

import json
from typing import Any

from pydantic import Field

from featcache.cache_plan import human_bytes
from featcache.config import Config, run_job
from featcache.quantize import SCALE, TokenError
from featcache.reader import Cache, open_cache
from featcache.storage import CachePath

SHOWN_REASONS = 5


class InfoConfig(Config):
    """Prints what a cache holds; unfinished ones too."""

    cache: CachePath
    """Folder of the cache, or s3://bucket/prefix."""
    as_json: bool = Field(default=False, alias="json")
    """Print JSON instead of text."""


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
        print(_text(found))
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
    splits = {
        name: {
            "rows": stop - start,
            "valid": int(cache.valid[start:stop].sum()),
            "invalid": int((done[start:stop] & ~cache.valid[start:stop]).sum()),
        }
        for name, (start, stop) in cache.attributes["splits"].items()
    }
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
        "splits": splits,
        "num_invalid": len(invalid),
        "invalid": invalid,
        "arrays": arrays,
        "token_error": cache.attributes.get("token_error"),
        "shards": {
            kind: {"done": len(reports[kind]), "total": len(cache.store.shards(kind))}
            for kind in ("image", "text")
        },
        "versions": cache.attributes["versions"],
    }


def _num_bytes(cache: Cache, name: str) -> int:
    """Bytes of an array's rows; 0 if there is none of that name."""
    if not cache.has(name):
        return 0
    files = cache.store.files(name)
    return files.row_bytes * files.shape[0]


def _text(found: dict[str, Any]) -> str:
    identity = found["identity"]
    backbone, dataset, pixels = identity["backbone"], identity["dataset"], identity["preprocess"]
    shards = found["shards"]
    state = "complete" if found["complete"] else "unfinished"
    height, width = pixels["size"]
    lines = [
        f"cache        {found['path']} ({state})",
        f"fingerprint  {found['fingerprint']}",
        f"dataset      {dataset['kind']}, {found['task']}, {found['num_rows']} rows, "
        f"{found['num_classes']} classes, {found['num_captions']} captions",
        f"backbone     {backbone['kind']} {backbone['name']}, {identity['precision']}, "
        f"weights {backbone['weights']}",
        f"pixels       {height}x{width}, {pixels['mode']} mode",
        f"shards       {shards['image']['done']} of {shards['image']['total']} image, "
        f"{shards['text']['done']} of {shards['text']['total']} text",
        "features",
    ]
    for name, array in found["arrays"].items():
        shape = " x ".join(map(str, array["shape"]))
        lines.append(f"  {name:<16} {shape} {array['dtype']}, {human_bytes(array['num_bytes'])}")
    if found["token_error"] is not None:
        lines.append(f"  {TokenError(**found['token_error'])}")
    lines.append("splits")
    for name, counts in found["splits"].items():
        lines.append(
            f"  {name:<16} {counts['rows']} rows, {counts['valid']} valid, "
            f"{counts['invalid']} unreadable"
        )
    invalid = found["invalid"]
    if invalid:
        lines.append("unreadable")
        lines += [f"  {item['path']}: {item['reason']}" for item in invalid[:SHOWN_REASONS]]
    if len(invalid) > SHOWN_REASONS:
        lines.append(f"  and {len(invalid) - SHOWN_REASONS} more; --json lists them all")
    return "\n".join(lines)


if __name__ == "__main__":
    run_job(InfoConfig, run)
