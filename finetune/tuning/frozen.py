"""The other way: a linear head on the frozen backbone's cached features, and what it cost."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from featcache.backbones.base import Backbone
from featcache.errors import CacheError, CacheMismatchError
from featcache.identity import differences
from featcache.reader import Cache, open_cache
from featcache.storage import place
from finetune.tuning.examples import Material
from heads.models.linear import LinearConfig
from heads.run_folder import load_run, read_json
from heads.train import TrainConfig as HeadTrainConfig
from heads.train import run as train_head

FOLDER = "frozen"
"""Name in the result folder."""


@dataclass(frozen=True)
class Frozen:
    """A linear head on cached features of the backbone before it was adapted.

    Attributes:
        run: where the head is, or was.
        cache: what it was trained on.
        accuracy: top-1 or mAP of "val" and "test", those there are.
        metrics: all of them, by part.
        seconds: of training.
        extraction_seconds: what the last extraction of the cache took; None = not known.
        extraction_images: images that it encoded.
        num_parameters: trained.
        rows_seen: training rows times epochs.
    """

    run: str
    cache: str
    accuracy: dict[str, float]
    metrics: dict[str, dict[str, float]]
    seconds: float
    extraction_seconds: float | None
    extraction_images: int | None
    num_parameters: int
    rows_seen: int

    def record(self) -> dict[str, Any]:
        """Plain values for metrics.json."""
        kept = asdict(self)
        del kept["metrics"]
        return kept


def train_frozen(
    cache: Cache,
    folder: Path,
    name: str,
    *,
    train_split: str,
    val_split: str | None,
    val_fraction: float,
    test_split: str | None,
    seed: int,
    device: str,
) -> Frozen:
    """Trains a linear head on a cache, with the rows that fine-tuning trains and decides on.

    Args:
        cache: of the backbone before it is adapted.
        folder: run folder to write.
        name: where it will be in the end, for records.
        train_split: split to train on.
        val_split: that decides; see `heads.train.TrainConfig`.
        val_fraction: held out where it is carved.
        test_split: only reported.
        seed: of the training and of what is held out.
        device: to train on.
    """
    feature = "projected" if cache.has("image/projected") else "pooled"
    report = train_head(
        HeadTrainConfig(
            cache=cache.path,
            head=LinearConfig(feature=feature),
            run=folder,
            train_split=train_split,
            val_split=val_split,
            val_fraction=val_fraction,
            test_split=test_split,
            seed=seed,
            device=device,
            quiet=True,
            report=False,
        )
    )
    return _of_metrics(name, str(cache.path), report.metrics, cache)


def read_frozen(run: Path) -> Frozen:
    """The head that fine-tuning began with, as its own training reported it."""
    loaded = load_run(run)
    where = loaded.record["cache"]["path"]
    try:
        cache = open_cache(place(where))
    except CacheError:  # gone by now: only the cost of its extraction is not known
        cache = None
    return _of_metrics(str(run), where, read_json(run / "metrics.json"), cache)


def _of_metrics(run: str, where: str, values: dict[str, Any], cache: Cache | None) -> Frozen:
    metric = values["metric"]
    metrics: dict[str, dict[str, float]] = {
        role: values[role] for role in ("val", "test") if role in values
    }
    summary = {} if cache is None else cache.attributes.get("summary", {})
    return Frozen(
        run=run,
        cache=where,
        accuracy={role: found[metric] for role, found in metrics.items()},
        metrics=metrics,
        seconds=values["seconds"],
        extraction_seconds=summary.get("seconds"),
        extraction_images=summary.get("num_extracted"),
        num_parameters=values["num_parameters"],
        rows_seen=values["num_train_rows"] * values["epochs"],
    )


def require_fits(cache: Cache, material: Material, backbone: Backbone) -> None:
    """Checks that a cache is of this dataset by this backbone.

    Raises:
        CacheMismatchError: naming the first differing field.
    """
    for what, found, expected in (
        ("backbone", cache.identity.backbone, backbone.spec.identity),
        ("dataset", cache.identity.dataset, material.identity),
    ):
        for name, have, want in differences(found.record(), expected.record()):
            raise CacheMismatchError(
                f"cache: {cache.path}: {what}.{name} is {have!r}, what is trained has {want!r}; "
                "give the cache of this dataset by the backbone before it is adapted"
            )


def holds_features(cache: Cache, backbone: Backbone) -> bool:
    """Whether a cache holds what a linear head on the frozen backbone reads."""
    return cache.has("image/projected" if backbone.spec.projected_dim else "image/pooled")
