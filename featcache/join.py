"""Job: several caches of one dataset as one, joined by id; shows what a join would hold.

python -m featcache.join --caches cache/birds-b16 --caches cache/birds-dino

Heads take the same caches: `python -m heads.train --cache cache/birds-b16 --join cache/birds-dino`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from featcache.config import Config, run_job
from featcache.errors import CacheError, CacheMismatchError, ConfigError
from featcache.joined_cache import JoinedCache, ragged
from featcache.reader import Cache, open_cache
from featcache.storage import CachePath, StoreUrl, Where, place


class JoinConfig(Config):
    """Shows what several caches of one dataset hold together."""

    caches: list[CachePath] = Field(min_length=2)
    """Folders of the caches, or s3://bucket/prefix, two or more; the first one's order is kept."""


def open_joined(paths: Sequence[Where] | Mapping[str, Where], verify: bool = True) -> JoinedCache:
    """Several caches of one dataset as one, rows joined by id.

    Args:
        paths: two or more caches, or caches by alias; otherwise a cache's alias is its folder's
            name, with a number behind it if that is taken. The first one leads.
        verify: see `open_cache`.

    Raises:
        CacheError: a cache is missing or unfinished, or no id is in all of them.
        ConfigError: fewer than two, or one of them twice.
        CacheMismatchError: task, classes, splits or labels differ, naming the first difference.
    """
    if not isinstance(paths, Mapping):
        paths = _aliases(paths)
    if len(paths) < 2:
        raise ConfigError(f"a join needs two caches or more, found {len(paths)}")
    _require_different(list(paths.values()))
    members = {alias: open_cache(path, verify=verify) for alias, path in paths.items()}
    (first, lead), *others = members.items()
    for alias, one in others:
        _require_same_classes(first, lead, alias, one)
    ids = pa.array(lead.ids, pa.large_string())
    places = {first: np.arange(lead.num_rows)}
    common = np.ones(lead.num_rows, np.bool_)
    for alias, one in others:
        found = pc.index_in(ids, pa.array(one.ids, pa.large_string()))
        places[alias] = found.fill_null(-1).to_numpy().astype(np.int64)
        common &= places[alias] >= 0
    if not common.any():
        raise CacheError(
            f"{' + '.join(members)}: no id is in all of them (the first is {lead.ids[0]!r} in "
            f"{first}, {others[0][1].ids[0]!r} in {others[0][0]}); join caches of one dataset"
        )
    kept = np.flatnonzero(common)
    rows = {alias: place[kept] for alias, place in places.items()}
    joined = JoinedCache(members, rows, verify)
    for alias, one in others:
        _require_same_rows(joined, first, alias, one)
    return joined


def open_one_or_joined(path: Where, join: Sequence[Where], verify: bool = True) -> Cache:
    """The cache at `path`, joined with others if there are any."""
    return open_joined([path, *join], verify) if join else open_cache(path, verify=verify)


def run(config: JoinConfig) -> JoinedCache:
    """Prints and returns the join.

    Raises:
        CacheError, CacheMismatchError: see `open_joined`.
    """
    joined = open_joined(config.caches)
    print(joined.describe())
    for name in joined.split_names:
        start, stop = joined.attributes["splits"][name]
        print(f"  {name:<32} {stop - start:,} rows, {len(joined.rows(name)):,} valid in all")
    for name in joined.feature_names():
        array = joined.array(name)
        print(f"  {name:<32} {' x '.join(map(str, array.shape))} {array.dtype}")
    other = _other_content(joined)
    if other:
        print(f"  {other:,} rows were extracted from files with different bytes")
    return joined


def _aliases(paths: Sequence[Where]) -> dict[str, Where]:
    found: dict[str, Where] = {}
    for path in paths:
        name = alias = place(path).name or "cache"
        number = 1
        while alias in found:
            number += 1
            alias = f"{name}-{number}"
        found[alias] = path
    return found


def _require_different(paths: Sequence[Where]) -> None:
    seen: set[Path | StoreUrl] = set()
    for path in paths:
        found = place(path)
        found = found.resolve() if isinstance(found, Path) else found
        if found in seen:
            raise ConfigError(f"{path}: given twice; a join needs different caches of one dataset")
        seen.add(found)


def _require_same_classes(first: str, lead: Cache, alias: str, one: Cache) -> None:
    advice = "join caches of one dataset"
    if one.task != lead.task:
        raise CacheMismatchError(
            f"task differs: {lead.task} in {first}, {one.task} in {alias}; {advice}"
        )
    if one.class_hash == lead.class_hash:
        return
    have, other = ([str(name) for name in cache.classes["name"]] for cache in (lead, one))
    if len(have) != len(other):
        raise CacheMismatchError(
            f"classes differ: {len(have)} in {first}, {len(other)} in {alias}; {advice}"
        )
    index = next(i for i, pair in enumerate(zip(have, other, strict=True)) if pair[0] != pair[1])
    raise CacheMismatchError(
        f"classes differ: class {index} is {have[index]!r} in {first}, {other[index]!r} in "
        f"{alias}; {advice}"
    )


def _require_same_rows(joined: JoinedCache, first: str, alias: str, one: Cache) -> None:
    """Checks splits and labels of the common rows."""
    rows = joined.member_rows[alias]
    splits = np.asarray(one.splits, dtype=object)[rows]
    differ = np.flatnonzero(splits != np.asarray(joined.splits, dtype=object))
    if len(differ):
        row = int(differ[0])
        raise CacheMismatchError(
            f"splits differ in {len(differ):,} of {joined.num_rows:,} common rows: "
            f"{joined.ids[row]!r} is {joined.splits[row]} in {first}, {splits[row]} in {alias}; "
            "extract both from one list"
        )
    offsets, values = joined.label_lists
    other_offsets, other_values = ragged(*one.label_lists, rows)
    counts, other_counts = np.diff(offsets), np.diff(other_offsets)
    differ = counts != other_counts
    equal = np.flatnonzero(~differ)
    owner = np.repeat(equal, counts[equal])
    mine = ragged(offsets, values, equal)[1]
    theirs = ragged(other_offsets, other_values, equal)[1]
    mine, theirs = mine[np.lexsort((mine, owner))], theirs[np.lexsort((theirs, owner))]
    differ[owner[mine != theirs]] = True
    if differ.any():
        row = int(np.flatnonzero(differ)[0])
        names = joined.classes["name"]
        shown = [
            "/".join(str(names[c]) for c in values[offsets[row] : offsets[row + 1]]) or "no label"
            for offsets, values in ((offsets, values), (other_offsets, other_values))
        ]
        raise CacheMismatchError(
            f"labels differ in {int(differ.sum()):,} of {joined.num_rows:,} common rows: "
            f"{joined.ids[row]!r} is {shown[0]} in {first}, {shown[1]} in {alias}; run the "
            "extraction of the older one again, it updates labels"
        )


def _other_content(joined: JoinedCache) -> int:
    """Valid rows whose image files differ between members."""
    contents = [
        one.array("rows/content").read()[joined.member_rows[alias]]
        for alias, one in joined.members.items()
    ]
    differ = np.logical_or.reduce([content != contents[0] for content in contents])
    return int((differ & joined.valid).sum())


if __name__ == "__main__":
    run_job(JoinConfig, run)
