"""Plain arithmetic of a cache's layout: shards, chunks and the shapes of the feature arrays."""

import numpy as np

from featcache.backbones.base import BackboneSpec
from featcache.identity import FeatureIdentity
from featcache.layout.quantize import SCALE
from featcache.store import ArrayPlan, Shard, ShardKind

MAX_CHUNK_BYTES = 64 << 20
"""Largest chunk file. A chunk is what a reader maps and what one checksum covers."""

_GOOD_CHUNK_ROWS = 2048
"""Multiples of it make a float16 chunk a whole number of 4096-byte pages for any even width."""

_SHARD_ROWS = {"cpu": 2048, "cuda": 65_536}


def shard_rows_for(num_rows: int, batch_size: int, device: str, wanted: int | None) -> int:
    """Rows of a shard: whole batches, and about a minute's work of a base-size tower.

    Args:
        num_rows: rows to cut into shards.
        batch_size: rows of a batch.
        device: "cpu" or "cuda".
        wanted: the user's choice, a multiple of `batch_size`; None = by device.
    """
    rows = _SHARD_ROWS[device] if wanted is None else wanted
    return min(_round_up(rows, batch_size), _round_up(num_rows, batch_size))


def shards_for(kind: ShardKind, num_rows: int, shard_rows: int) -> tuple[Shard, ...]:
    """Consecutive shards over rows 0..`num_rows`; the last one may be shorter."""
    starts = range(0, num_rows, shard_rows)
    return tuple(
        Shard(kind, index, start, min(start + shard_rows, num_rows))
        for index, start in enumerate(starts)
    )


def chunk_rows_for(shard_rows: int, row_bytes: int) -> int:
    """Rows of a chunk: the largest divisor of a shard within `MAX_CHUNK_BYTES`.

    Among the divisors, multiples of 2048 are preferred. A row above the limit is its own chunk.
    """
    most = max(1, MAX_CHUNK_BYTES // row_bytes)
    divisors = [rows for rows in range(1, min(shard_rows, most) + 1) if shard_rows % rows == 0]
    good = [rows for rows in divisors if rows % _GOOD_CHUNK_ROWS == 0]
    return max(good or divisors)


def num_tokens(features: FeatureIdentity, spec: BackboneSpec) -> int:
    """L, tokens kept of an image; 0 if none."""
    grid = kept_grid(features, spec)
    if grid is None:
        return 0
    return grid[0] * grid[1] + (spec.num_prefix_tokens if features.before_last else 0)


def kept_grid(features: FeatureIdentity, spec: BackboneSpec) -> tuple[int, int] | None:
    """Rows and columns of the patch tokens kept of an image; None if there are none."""
    if features.tokens == "none":
        return None
    side = features.token_pool
    return spec.token_grid if side is None else (side, side)


def feature_arrays(
    features: FeatureIdentity,
    spec: BackboneSpec,
    num_rows: int,
    num_captions: int,
    shard_rows: int,
    text_shard_rows: int,
) -> tuple[ArrayPlan, ...]:
    """The feature arrays that a cache holds.

    Args:
        features: what is kept.
        spec: the backbone's sizes.
        num_rows: N.
        num_captions: M.
        shard_rows: rows of an image shard.
        text_shard_rows: captions of a text shard.
    """
    views = (features.num_views,) if features.num_views > 1 else ()
    shapes: dict[str, tuple[int, ...]] = {}
    if features.projected:
        shapes["image/projected"] = (num_rows, *views, spec.projected_dim)
    if features.pooled:
        shapes["image/pooled"] = (num_rows, *views, spec.pooled_dim)
    if features.tokens != "none":
        assert spec.token_dim is not None
        shapes["image/tokens"] = (num_rows, *views, num_tokens(features, spec), spec.token_dim)
    if features.multimodal != "none" or features.itm:
        assert spec.joint is not None
        length, width = spec.joint
        if features.multimodal == "states":
            shapes["image/multimodal"] = (num_rows, *views, length, width)
            shapes["image/multimodal_mask"] = (num_rows, *views, length)
        if features.multimodal != "none":
            shapes["image/multimodal_pooled"] = (num_rows, *views, width)
        if features.itm:
            shapes["image/itm"] = (num_rows, *views, 2)
    if features.text:
        shapes["text/projected"] = (num_captions, spec.projected_dim)
    dtypes: dict[str, str] = {path: features.dtype_of(path.partition("/")[2]) for path in shapes}
    if dtypes.get("image/tokens") == "int8":
        path = "image/tokens" + SCALE
        shapes[path], dtypes[path] = shapes["image/tokens"][:-1], "float32"
    if "image/multimodal_mask" in dtypes:
        dtypes["image/multimodal_mask"] = "bool"
    plans = []
    for path, shape in shapes.items():
        row_bytes = np.dtype(dtypes[path]).itemsize
        for size in shape[1:]:
            row_bytes *= size
        rows = text_shard_rows if path.startswith("text/") else shard_rows
        chunk_rows = chunk_rows_for(rows, row_bytes)
        plans.append(ArrayPlan(path, shape, dtypes[path], chunk_rows))
    return tuple(plans)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
