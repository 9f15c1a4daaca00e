"""Tiny caches with known features, written without any backbone."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from featcache.extract_config import ShardReport
from featcache.identity import BackboneIdentity
from featcache.manifest import Manifest, Task
from featcache.store import ArrayPlan, CachePlan, Shard, create
from heads.base import FeatureSpec
from heads.losses import default_loss
from heads.losses.base import ClassStatistics

from ..conftest import sample_identity


def write_cache(
    path: Path,
    features: np.ndarray,
    labels: Sequence[Sequence[int]],
    splits: Sequence[str],
    *,
    classes: pd.DataFrame,
    task: str = "single_label",
    invalid: Sequence[int] = (),
    weights: str = "w0",
    array: str = "image/projected",
    num_views: int = 1,
    attributes: Mapping[str, Any] | None = None,
    captions: Sequence[Sequence[str]] | None = None,
    more: Mapping[str, np.ndarray] | None = None,
    **identity_of_features: Any,
) -> Path:
    """A complete cache; rows have to come in split order.

    Args:
        path: where.
        features: of the one array called `array`; `more` are further ones by name, stored as they
            are (those called `text/...` with a row a caption).
        labels, splits, classes, task, captions: of the rows.
        invalid: rows without image features.
        weights: which backbone.
        array, num_views, attributes, more, identity_of_features: what the cache says and holds.
    """
    num_rows = len(features)
    stored = {array: features.copy()} | {name: one.copy() for name, one in (more or {}).items()}
    num_captions = sum(map(len, captions or ()))
    manifest = Manifest.build(
        kind="table",
        root=path.parent / "images",
        ids=[f"r{index}" for index in range(num_rows)],
        paths=[f"{index}.jpg" for index in range(num_rows)],
        splits=list(splits),
        labels=[list(row) for row in labels],
        classes=classes,
        task=task,
        captions=None if captions is None else [list(row) for row in captions],
    )
    assert manifest.splits == list(splits), "rows are not in split order"
    identity = sample_identity(
        manifest.identity,
        BackboneIdentity(kind="toy", name="toy", weights=weights, architecture="a"),
        storage_dtype="float16" if features.dtype == np.float16 else "float32",
        num_views=num_views,
        **identity_of_features,
    )
    shards = [Shard("image", 0, 0, num_rows)]
    if any(name.startswith("text/") for name in stored):
        shards.append(Shard("text", 0, 0, num_captions))
    plan = CachePlan(
        identity=identity,
        manifest=manifest,
        arrays=tuple(
            ArrayPlan(name, one.shape, str(one.dtype), len(one)) for name, one in stored.items()
        ),
        shards=tuple(shards),
        attributes={
            "backbone": {"kind": "toy"},
            "dataset": {"kind": "table"},
            "logit_scale": 100.0,
            **(attributes or {}),
        },
    )
    store = create(path, plan)
    valid = np.ones(num_rows, bool)
    valid[list(invalid)] = False
    for name, one in stored.items():
        if name.startswith("image/"):
            one[~valid] = False if one.dtype == bool else np.nan
        store.write_chunks(name, 0, one)
    store.write_chunks("rows/valid", 0, valid)
    store.write_chunks("rows/content", 0, np.arange(num_rows, dtype=np.uint64))
    store.write_chunks("rows/stamp", 0, np.zeros(num_rows, np.uint64))
    unreadable = [
        {"row": row, "id": f"r{row}", "path": f"{row}.jpg", "reason": "missing"}
        for row in sorted(invalid)
    ]
    report = ShardReport(rows=num_rows, invalid=unreadable, seconds=0.1, per_second={})
    for shard in shards:
        store.mark_done(shard, report.record())
    store.finish({})
    return path


def class_table(num_classes: int) -> pd.DataFrame:
    """Classes c0, c1, … in genera of two and one family."""
    index = np.arange(num_classes)
    return pd.DataFrame(
        {
            "name": [f"c{i}" for i in index],
            "genus": [f"g{i // 2}" for i in index],
            "family": [f"f{i // 4}" for i in index],
        }
    )


def toy_spec(
    widths: Mapping[str, int], num_classes: int = 3, task: Task = "single_label"
) -> FeatureSpec:
    """What a head is told about a balanced cache with arrays of these widths."""
    counts = np.full(num_classes, 10)
    classes = class_table(num_classes)
    classes["count"] = counts
    return FeatureSpec(
        feature_dim=next(iter(widths.values())),
        num_classes=num_classes,
        task=task,
        class_counts=counts,
        classes=classes,
        prompts=None,
        logit_scale=100.0,
        feature_dims=widths,
        num_rows=10 * num_classes,
        criterion=default_loss(task).build(ClassStatistics(counts, 10 * num_classes)),
    )


def single_label_cache(
    path: Path,
    *,
    splits: Mapping[str, int] | None = None,
    num_classes: int = 5,
    dim: int = 12,
    noise: float = 1.0,
    seed: int = 0,
    dtype: str = "float16",
    **options: Any,
) -> Path:
    """Rows around random class centres."""
    splits = {"train": 300, "val": 60, "test": 80} if splits is None else splits
    rng = np.random.default_rng(seed)
    total = sum(splits.values())
    labels = rng.integers(0, num_classes, total)
    labels[:num_classes] = np.arange(num_classes)
    centres = np.random.default_rng(7).normal(size=(num_classes, dim)) * 1.5 + 0.5
    features = centres[labels] + noise * rng.normal(size=(total, dim))
    return write_cache(
        path,
        features.astype(dtype),
        [[label] for label in labels],
        [name for name, count in splits.items() for _ in range(count)],
        classes=options.pop("classes", class_table(num_classes)),
        **options,
    )


def multi_label_cache(path: Path, *, seed: int = 0, **options: Any) -> Path:
    """Rows whose labels follow from random directions."""
    splits = {"train": 300, "test": 100}
    rng = np.random.default_rng(seed)
    total, num_classes, dim = 400, 6, 12
    features = rng.normal(size=(total, dim))
    directions = np.random.default_rng(8).normal(size=(num_classes, dim))
    hot = features @ directions.T + 0.5 * rng.normal(size=(total, num_classes)) > 3.0
    return write_cache(
        path,
        features.astype(np.float32),
        [np.flatnonzero(row).tolist() for row in hot],
        [name for name, count in splits.items() for _ in range(count)],
        classes=class_table(num_classes),
        task="multi_label",
        **options,
    )


@pytest.fixture
def make_cache(tmp_path: Path) -> Callable[..., Path]:
    """`make_cache(name, features, labels, splits, num_classes=C, ...)`."""

    def make(name: str, *arguments: Any, num_classes: int, **options: Any) -> Path:
        table = options.pop("classes", class_table(num_classes))
        return write_cache(tmp_path / "cache" / name, *arguments, classes=table, **options)

    return make


@pytest.fixture
def make_single(tmp_path: Path) -> Callable[..., Path]:
    """`make_single(name, splits=..., noise=..., ...)`: five classes, rows around their centres."""

    def make(name: str = "toy", **options: Any) -> Path:
        return single_label_cache(tmp_path / "cache" / name, **options)

    return make


@pytest.fixture
def make_multi(tmp_path: Path) -> Callable[..., Path]:
    """`make_multi(name, ...)`: six classes, splits train and test."""

    def make(name: str = "toy", **options: Any) -> Path:
        return multi_label_cache(tmp_path / "cache" / name, **options)

    return make


@pytest.fixture(autouse=True)
def no_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainings write no page, which takes a second each; tests of the page override this."""
    monkeypatch.setattr("heads.results.write_page", lambda *parts, **options: None)
