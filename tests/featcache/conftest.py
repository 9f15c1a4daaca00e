"""A small cache written through the store, without a backbone, and what it was written from."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest

from featcache.identity import BackboneIdentity, FeatureIdentity, Identity, PreprocessIdentity
from featcache.manifest import Manifest
from featcache.store import ArrayPlan, CachePlan, Shard, Store, create

BACKBONE = BackboneIdentity(kind="open_clip", name="tiny", weights="w" * 32, architecture="a" * 32)


@dataclass
class Written:
    """What a cache was written from."""

    path: Path
    plan: CachePlan
    arrays: dict[str, npt.NDArray[Any]] = field(default_factory=dict)

    def write(self, store: Store, shard: Shard) -> None:
        """Writes a shard's chunks without marking it done."""
        for plan in self.plan.row_arrays:
            if plan.path.startswith("text/") == (shard.kind == "text"):
                rows = self.arrays[plan.path][shard.start : shard.stop]
                store.write_chunks(plan.path, shard.start, rows)


def ranges(kind: Any, num_rows: int, shard_rows: int) -> list[Shard]:
    starts = range(0, num_rows, shard_rows)
    return [Shard(kind, i, s, min(num_rows, s + shard_rows)) for i, s in enumerate(starts)]


def plan_cache(
    path: Path,
    num_rows: int = 20,
    dim: int = 6,
    chunk_rows: int = 4,
    shard_rows: int = 8,
    views: int = 1,
    task: Any = "single_label",
    dtype: Any = "float16",
    captions: int = 0,
) -> Written:
    random = np.random.default_rng(num_rows)
    num_train = max(1, num_rows * 3 // 4)
    if task == "multi_label":
        labels = [[c for c in range(3) if (row >> c) & 1] for row in range(num_rows)]
    elif task == "single_label":
        labels = [[row % 3] if row != 1 else [] for row in range(num_rows)]
    else:
        labels = [[] for _ in range(num_rows)]
    manifest = Manifest.build(
        kind="folder",
        root="/images",
        ids=[f"id{row}" for row in range(num_rows)],
        paths=[f"é/{row}.jpg" for row in range(num_rows)],
        splits=["train"] * num_train + ["val"] * (num_rows - num_train),
        labels=labels,
        classes=pd.DataFrame({"name": ["oak", "elm", "日本"], "genus": ["Quercus", "", "x"]}),
        task=task,
        captions=[[f"caption {row}-{i}" for i in range(captions)] for row in range(num_rows)],
    )
    identity = Identity(
        dataset=manifest.identity,
        backbone=BACKBONE,
        preprocess=PreprocessIdentity(
            size=(32, 32),
            mean=(0.5, 0.5, 0.5),
            std=(0.2, 0.2, 0.2),
            interpolation="bicubic",
            resize_mode="shortest",
            fill_color=0,
            mode="fast",
        ),
        precision="fp32",
        features=FeatureIdentity(
            projected=True,
            pooled=False,
            tokens="none",
            token_layer=-1,
            text=captions > 0,
            storage_dtype=dtype,
            num_views=views,
            view_seed=0,
            view_scale=1.0,
        ),
    )
    num_captions = num_rows * captions
    shape = (num_rows, dim) if views == 1 else (num_rows, views, dim)
    plans = [ArrayPlan("image/projected", shape, dtype, chunk_rows)]
    shards = ranges("image", num_rows, shard_rows)
    arrays: dict[str, npt.NDArray[Any]] = {
        "image/projected": random.standard_normal(shape).astype(dtype),
        "rows/valid": np.arange(num_rows) % 7 != 5,
        "rows/content": random.integers(0, 2**63, num_rows).astype(np.uint64),
        "rows/stamp": np.arange(1, num_rows + 1, dtype=np.uint64),
    }
    arrays["image/projected"][~arrays["rows/valid"]] = np.nan
    if captions:
        plans.append(ArrayPlan("text/projected", (num_captions, dim), dtype, chunk_rows))
        arrays["text/projected"] = random.standard_normal((num_captions, dim)).astype(dtype)
        shards += ranges("text", num_captions, shard_rows)
    attributes = {"shard_rows": shard_rows, "logit_scale": 100.0, "backbone": {"kind": "none"}}
    plan = CachePlan(identity, manifest, tuple(plans), tuple(shards), attributes)
    return Written(path, plan, arrays)


def write_cache(path: Path, **options: Any) -> Written:
    written = plan_cache(path, **options)
    store = create(path, written.plan)
    for shard in store.pending():
        written.write(store, shard)
        invalid = [
            {"row": row, "path": f"é/{row}.jpg", "reason": "truncated"}
            for row in range(shard.start, shard.stop)
            if shard.kind == "image" and not written.arrays["rows/valid"][row]
        ]
        store.mark_done(shard, {"invalid": invalid})
    store.finish({"num_invalid": 1})
    return written


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests survive no power cut, so they need not wait for one."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def planned(tmp_path: Path) -> Callable[..., Written]:
    """Plans a cache at `tmp_path/cache` without writing anything."""
    return lambda **options: plan_cache(tmp_path / "cache", **options)


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., Written]:
    """Writes a whole cache at `tmp_path/cache`."""
    return lambda **options: write_cache(tmp_path / "cache", **options)
