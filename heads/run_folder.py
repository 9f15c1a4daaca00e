"""A run folder: what a training leaves behind, written atomically, readable without pickle.

config.yaml       the resolved configuration; `--config` reads it back
head.json         kind, options, class table, cache, backbone, versions: all that predicting needs
head.safetensors  the trained tensors, of the epoch that validated best
head_last.safetensors  the same of the last epoch
prompts.safetensors  class text features, for heads that start from them
metrics.json      metrics of the validation and test rows, sizes, seconds
history.jsonl     one line an epoch
curves.png        the same as a picture
calibration.json  temperature and thresholds fitted to the validation rows; see heads.calibration
report.html       all of it on one page
tensorboard/      the same as TensorBoard event files, if asked for
last.safetensors  state of an unfinished training; gone when it is complete
"""

import importlib.metadata
import json
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import pandas as pd
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from featcache.errors import CacheMismatchError, UserError
from featcache.growing.changes import since
from featcache.identity import Identity, differences
from featcache.joined_cache import JoinedCache
from featcache.manifest import Task, class_hash
from featcache.reader import Cache
from featcache.storage import Where
from heads.base import FeatureSpec, Head, HeadConfig
from heads.models import HEADS

FORMAT = 1
Weights = Literal["best", "last"]
"""Which epoch's trained tensors: the one that validated best, or the last."""
WEIGHTS: dict[Weights, str] = {"best": "head.safetensors", "last": "head_last.safetensors"}
"""File of each."""
_MEANING = {
    "text/": ("text_policy",),
    "multimodal": ("text_policy",),
    "tokens": ("tokens", "token_layer"),
}
"""Fields of the kept features that decide what an array's numbers mean, by a part of its name."""
_REPORTED = ("torch", "numpy", "safetensors", "open_clip_torch", "featcache")


class FeatureSource(Protocol):
    """What a head was trained on: a cache, or images that were encoded while it was trained."""

    @property
    def path(self) -> Where:
        """Where it lies."""

    @property
    def fingerprint(self) -> str:
        """Hash over `identity`."""

    @property
    def identity(self) -> Identity:
        """What the features are."""

    @property
    def attributes(self) -> Mapping[str, Any]:
        """Options of backbone and dataset, logit_scale, pixels, root."""

    @property
    def task(self) -> Task:
        """How the labels are to be read."""

    @property
    def class_hash(self) -> str:
        """Hash over the class names."""

    @property
    def classes(self) -> pd.DataFrame:
        """Class table, C rows in index order."""


class RunError(UserError, RuntimeError):
    """A run folder is missing, unfinished, in use, or holds something else than what is asked."""


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by name, and plain JSON values beside them, in one file."""

    tensors: dict[str, Tensor]
    record: dict[str, Any]


@dataclass(frozen=True)
class Member:
    """A cache that a head was trained on.

    Attributes:
        alias: name in a join; "" = alone.
        path: where it was.
        fingerprint: of what it held then.
        identity: what it held.
        backbone: options that open its encoder, as recorded in it.
    """

    alias: str
    path: str
    fingerprint: str
    identity: Identity
    backbone: dict[str, Any]


@dataclass(frozen=True)
class LoadedRun:
    """A trained head with everything needed to use it.

    Attributes:
        path: the run folder.
        head: in evaluation mode.
        config: options of the head (of the chosen candidate, if several were trained).
        classes: class table (name, count, metadata), C rows in index order.
        record: `head.json`.
        weights: which of the kept weights the head has.
    """

    path: Path
    head: Head
    config: HeadConfig
    classes: pd.DataFrame
    record: dict[str, Any]
    weights: Weights = "best"

    @property
    def class_names(self) -> list[str]:
        """C names in index order."""
        return [str(name) for name in self.classes["name"]]

    @property
    def task(self) -> str:
        """single_label or multi_label."""
        return str(self.record["task"])

    def require_fits(self, cache: Cache) -> None:
        """Checks that a cache holds what the head was trained on: classes, backbone, pixels.

        Raises:
            CacheMismatchError: naming the first differing field with both values.
        """
        if cache.class_hash != self.record["class_hash"]:
            raise CacheMismatchError(f"{cache.path}: {self._class_difference(cache)}")
        trained = self.members
        if len(cache.parts) != len(trained):
            raise CacheMismatchError(
                f"{cache.path}: {len(cache.parts)} cache(s) given, the head in {self.path} was "
                f"trained on {len(trained)} ({', '.join(one.path for one in trained)}); give as "
                "many in that order, the first with --cache, the others with --join"
            )
        for part, member in zip(cache.parts, trained, strict=True):
            found, expected = (_meaning(one.identity, self.features) for one in (part, member))
            for field, have, want in differences(found, expected):
                raise CacheMismatchError(
                    f"{part.path}: {field} differs: the cache holds {have!r}, the head in "
                    f"{self.path} was trained on {want!r}; extract with that, or train a new head"
                )

    @property
    def features(self) -> dict[str, int]:
        """The arrays that the head reads, by name in its order, with the length of a vector."""
        return features_of(self.record)

    @property
    def members(self) -> list[Member]:
        """The caches whose features the head reads side by side; mostly one."""
        return members_of(self.record)

    def growth_since(self, cache: Cache) -> str | None:
        """How a cache changed since the head was trained on an earlier state of it, as a line each.

        None if it has not changed, or if the head was trained on another cache.
        """
        found = steps_since(self.members, cache.parts)
        lines = [f"{path}: trained on an earlier state of it; {steps}" for path, steps in found]
        return "\n".join(lines) or None

    def _class_difference(self, cache: Cache) -> str:
        found, expected = [str(name) for name in cache.classes["name"]], self.class_names
        advice = f"the head in {self.path} cannot score them; train a head on this cache"
        if len(found) != len(expected):
            return f"classes differ: the cache has {len(found)}, the head {len(expected)}; {advice}"
        for index, (have, want) in enumerate(zip(found, expected, strict=True)):
            if have != want:
                return (
                    f"classes differ: class {index} is {have!r} in the cache, {want!r} in the "
                    f"head; {advice}"
                )
        return f"class_hash differs: {cache.class_hash!r} in the cache; {advice}"


def features_of(record: Mapping[str, Any], key: str = "features") -> dict[str, int]:
    """The arrays that a `head.json` names, with the length of a vector.

    Args:
        record: its content.
        key: "features", or "training_features" for those that only the loss read.
    """
    if "features" not in record:  # written when a head read one array
        return {record["feature"]: record["feature_dim"]} if key == "features" else {}
    return {one["array"]: one["width"] for one in record[key]}


def members_of(record: Mapping[str, Any]) -> list[Member]:
    """The caches that a `head.json` names; mostly one."""
    alone = {
        "alias": "",
        "identity": record["identity"],
        "backbone": record["attributes"]["backbone"],
        **record["cache"],
    }
    return [
        Member(
            alias=one["alias"],
            path=one["path"],
            fingerprint=one["fingerprint"],
            identity=Identity.model_validate(one["identity"]),
            backbone=one["backbone"],
        )
        for one in record.get("joined", [alone])
    ]


def steps_since(trained: Sequence[Member], caches: Sequence[Cache]) -> list[tuple[str, str]]:
    """Path and history of each cache that changed since a head was trained on it.

    Empty if none has, or if one of them never was what the head was trained on.

    Args:
        trained: what the head was trained on.
        caches: as they are now, in that order.
    """
    if len(caches) != len(trained):
        return []
    found = []
    for cache, member in zip(caches, trained, strict=True):
        if cache.fingerprint == member.fingerprint:
            continue
        steps = since(cache.history, member.fingerprint)
        if steps is None:
            return []
        found.append((str(cache.path), steps))
    return found


def _meaning(identity: Identity, features: Iterable[str]) -> dict[str, Any]:
    """The parts of an identity that decide what some arrays' numbers mean.

    Args:
        identity: of a cache.
        features: names of the arrays.
    """
    record = identity.record()
    fields = [
        field
        for feature in features
        for name in _MEANING
        if name in feature
        for field in _MEANING[name]
    ]
    kept = {field: record["features"][field] for field in fields}
    return {"backbone": record["backbone"], "preprocess": record["preprocess"], "features": kept}


def write_atomic(path: Path, content: bytes) -> None:
    """Writes a file so that it holds the old content or the new one, whatever happens."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.rename(path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Writes plain values as indented JSON, atomically."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    write_atomic(path, text.encode() + b"\n")


def write_history(path: Path, history: Sequence[Mapping[str, Any]]) -> None:
    """Writes one JSON line an epoch, atomically."""
    write_atomic(path, "".join(json.dumps(line) + "\n" for line in history).encode())


def read_history(folder: Path) -> list[dict[str, Any]]:
    """One record an epoch of a run folder; empty for heads that are not trained.

    Raises:
        RunError: if the file is damaged.
    """
    file = folder / "history.jsonl"
    if not file.is_file():
        return []
    try:
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    except ValueError:
        raise RunError(f"{file}: damaged; train again with --restart") from None


def write_tensors(path: Path, tensors: Mapping[str, Tensor], record: Any = None) -> None:
    """Writes tensors and plain JSON values into one safetensors file, atomically."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = None if record is None else {"record": json.dumps(record)}
    write_atomic(path, save(plain, metadata))


def read_tensors(path: Path) -> Checkpoint:
    """What `write_tensors` wrote.

    Raises:
        RunError: if the file is damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise RunError(f"{path}: damaged ({error}); train again with --restart") from None
    return Checkpoint(tensors, json.loads(metadata.get("record", "{}")))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of a run folder.

    Raises:
        RunError: if it is missing or damaged.
    """
    if not path.is_file():
        raise RunError(
            f"{path}: no such file; train with python -m heads.train --run {path.parent}"
        )
    try:
        value: dict[str, Any] = json.loads(path.read_bytes())
    except ValueError:
        raise RunError(f"{path}: damaged; train again with --restart") from None
    return value


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Exclusive right to write a run folder.

    Raises:
        RunError: if another process has it, or the folder holds something else than a run.
    """
    if folder.is_dir() and not any((folder / name).exists() for name in (".lock", "head.json")):
        other = next(folder.iterdir(), None)
        if other is not None:  # --restart would delete by names that others use as well
            raise RunError(
                f"{folder}: holds {other.name} and no run; choose a new or an empty folder as --run"
            )
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", thread_local=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RunError(
            f"{folder}: another process is training there; wait for it, or choose another --run"
        ) from None
    try:
        yield
    finally:
        lock.release()


def versions() -> dict[str, str]:
    """Versions of the packages that matter for the numbers."""
    return {name: importlib.metadata.version(name) for name in _REPORTED}


def describe_head(cache: FeatureSource, config: HeadConfig, spec: FeatureSpec) -> dict[str, Any]:
    """`head.json`: all that is needed to use the head when the cache is gone."""
    attributes = cache.attributes

    def widths(names: Iterable[str]) -> list[dict[str, Any]]:
        return [{"array": name, "width": spec.width(name)} for name in names]

    return {
        "format": FORMAT,
        "kind": config.kind,
        "config": config.record(),
        "task": cache.task,
        "features": widths(config.arrays()),
        "training_features": widths(config.training_arrays()),
        "class_counts": spec.class_counts.tolist(),
        "num_rows": spec.num_rows,
        "class_hash": cache.class_hash,
        "classes": {str(name): column.tolist() for name, column in cache.classes.items()},
        "templates": template_list(cache, config),
        "logit_scale": attributes["logit_scale"],
        "cache": {"path": str(cache.path), "fingerprint": cache.fingerprint},
        **({"joined": cache.records()} if isinstance(cache, JoinedCache) else {}),
        "identity": cache.identity.record(),
        "attributes": {
            name: attributes[name]
            for name in ("backbone", "dataset", "pixels", "root")
            if name in attributes
        },
        "versions": versions(),
    }


def template_list(cache: FeatureSource, config: HeadConfig) -> list[str]:
    """The prompt templates that a head starts from, for this cache's classes."""
    if not config.wants_prompts():
        return []
    return config.template_names(cache.classes, cache.identity.dataset.kind)


def load_run(
    path: str | Path, device: str | torch.device = "cpu", weights: Weights = "best"
) -> LoadedRun:
    """A trained head with its class names, from its run folder alone.

    Args:
        path: run folder.
        device: where the head goes.
        weights: of the epoch that validated best, or of the last one.

    Raises:
        RunError: if the folder is missing, unfinished or damaged.
    """
    path = Path(path)
    if not path.is_dir():
        raise RunError(f"{path}: no such run folder; python -m heads.train writes one")
    record = read_json(path / "head.json")
    if not (path / "metrics.json").is_file():
        raise RunError(
            f"{path}: its training is not complete; run the same python -m heads.train again"
        )
    classes = pd.DataFrame(record["classes"])
    if class_hash([str(name) for name in classes["name"]]) != record["class_hash"]:
        raise RunError(f"{path / 'head.json'}: class list and hash differ; train again")
    if record["kind"] not in HEADS:
        raise RunError(f"{path}: unknown head kind {record['kind']!r}; known: {', '.join(HEADS)}")
    config = HEADS[record["kind"]].model_validate(record["config"])
    prompts = None
    if config.wants_prompts():
        prompts = read_tensors(path / "prompts.safetensors").tensors["prompts"]
    features = features_of(record)
    spec = FeatureSpec(
        feature_dim=next(iter(features.values())),
        feature_dims=features | features_of(record, "training_features"),
        num_rows=record.get("num_rows", 0),
        num_classes=len(classes),
        task=record["task"],
        class_counts=np.asarray(record["class_counts"], np.int64),
        classes=classes,
        prompts=prompts,
        logit_scale=record["logit_scale"],
        templates=record["templates"],
    )
    with torch.random.fork_rng(devices=[]):  # initial values are overwritten at once
        head = config.build(spec)
    tensors = path / WEIGHTS[weights]
    if not tensors.is_file():
        raise RunError(f"{tensors}: no such file; train again with --restart")
    try:
        head.load_trained_state(read_tensors(tensors).tensors)
    except ValueError as error:
        raise RunError(f"{tensors}: {error}; train again") from None
    return LoadedRun(path, head.to(device).eval(), config, classes, record, weights)
