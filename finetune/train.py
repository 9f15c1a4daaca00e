"""Job: adapt a backbone to a labelled dataset, together with a linear head.

    python -m finetune.train --dataset garden --dataset.domain night \
        --backbone.model local-dir:backbones/garden --adapter full --out adapted/night

The result is an adapted backbone that every job opens by its path (`--backbone adapted
--backbone.model adapted/night`), and in `head/` the head as a run folder of heads. It is written in
one piece: a folder that exists is complete; an interrupted training goes on where it stopped.
"""

import json
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, NonNegativeInt, model_validator
from torch import Tensor

from featcache.adapter_folder import TENSORS, read_adapter, write_adapter
from featcache.adapters import AnyAdapter
from featcache.adapters.lora import LoraConfig
from featcache.backbones import BACKBONES, AnyBackbone
from featcache.backbones.base import Backbone
from featcache.config import Config, run_job
from featcache.datasets import DATASETS, AnyDataset
from featcache.errors import ConfigError
from featcache.reader import Cache, open_cache
from featcache.storage import CachePath
from finetune.checkpoint import LAST
from finetune.images.augmentation import AugmentationConfig
from finetune.images.loading import LoadingConfig
from finetune.output import is_finished, resumable
from finetune.recompute import recompute_tower_blocks
from finetune.tuning import building, frozen, head_folder
from finetune.tuning.examples import Material
from finetune.tuning.fitted_head import FILE as FITTED
from finetune.tuning.fitted_head import fitted_head
from finetune.tuning.frozen import Frozen
from finetune.tuning.head_folder import EncodedDataset
from finetune.tuning.initial_head import carving_seed
from finetune.tuning.loop import Measured, fit, measure
from finetune.tuning.objective import Objective, ObjectiveName
from finetune.tuning.options import ClassifierConfig, StopConfig, TextConfig, TuningConfig
from finetune.tuning.results import result_values, shown, summary, write_head
from finetune.tuning.sources import PixelSource, Source
from finetune.tuning.token_source import TokenSource, require_tokens
from finetune.tuning.tuned import Tuned
from heads import run_folder
from heads.distributed import Group, ending_at_once, group_for
from heads.evaluate import main_metric
from heads.fitting import mixed_precision
from heads.losses import AnyLoss
from heads.models.linear import Linear
from heads.parts import Part, Parts
from heads.run_folder import read_json, write_json
from heads.scoring import MetricsConfig

RECORD = "train.json"
"""What a finished folder was made from."""

_FREE = ("out", "restart", "device", "quiet", "loading", "report")
"""Options that do not change what is computed, but `loading.decode`."""


class TrainConfig(Config):
    """Adapt a backbone to a labelled dataset, together with a linear head."""

    dataset: AnyDataset | None = Field(default=None, discriminator="kind")
    """Images with labels; unset = the dataset of `cache`."""
    backbone: AnyBackbone | None = Field(default=None, discriminator="kind")
    """Encoder to adapt, and its weights, of kind open_clip unless said otherwise; unset = the one
    that wrote `cache`."""
    cache: CachePath | None = None
    """Features of the same dataset by the same backbone: a linear head is trained on them too, and
    the report shows both side by side. If it holds tokens `before_last:n`, adapter last_blocks
    trains on these in place of images."""
    compare: bool = True
    """Train a linear head on the features of `cache`, if it holds any, to compare with."""
    inputs: Literal["auto", "pixels", "tokens"] = "auto"
    """What is trained on: pixels of the dataset, or tokens of the cache; auto = tokens if the
    adapter can and the cache holds them."""
    adapter: AnyAdapter = Field(default=LoraConfig(), discriminator="kind")
    """What of the backbone is trained."""
    out: Path
    """Folder for the result: an adapted backbone, its head, metrics and report."""
    restart: bool = False
    """Train anew and replace a finished or interrupted result in `out`."""
    objective: ObjectiveName = "classification"
    """classification = a linear head, and class names as text beside it; image_text = class names
    as text alone, without a head, as few-shot CLIP-LoRA trains."""
    head: ClassifierConfig = ClassifierConfig()
    """The linear head."""
    init_head: Path | None = None
    """Run folder of a linear head that heads.train fitted to frozen features of this backbone: the
    head begins with its weights and scaling, and rows are held out by that run's seed; unset = as
    `head.fit_first` says."""
    loss: AnyLoss | None = Field(default=None, discriminator="kind")
    """Loss on the head's logits, by kind; unset = softmax cross-entropy (single label) or sigmoid
    cross-entropy (multi label)."""
    text: TextConfig = TextConfig()
    """Class names as text."""
    optim: TuningConfig = TuningConfig()
    """Optimiser, schedule, batches and arithmetic."""
    stop: StopConfig = StopConfig()
    """When to stop before the last epoch."""
    augmentation: AugmentationConfig = AugmentationConfig()
    """How training images are varied."""
    loading: LoadingConfig = LoadingConfig()
    """How images are read and decoded."""
    train_split: str = "train"
    """Split to train on."""
    val_split: str | None = None
    """Split that picks the epoch and stops the training; `carve` = hold rows of the training split
    out; unset = val if the dataset has one, otherwise carve; `none` = train all epochs on all rows
    and keep the last."""
    val_fraction: float = Field(default=0.1, gt=0, lt=1)
    """Share of each class's training rows that `carve` holds out, 0..1: the rows that heads.train
    holds out with the same seed."""
    test_split: str | None = None
    """Split that is only reported, never decided on; unset = test if the dataset has one."""
    metrics: MetricsConfig = MetricsConfig()
    """How metrics are counted."""
    device: str = "auto"
    """auto (the GPU if there is one), cpu or cuda:N."""
    report: bool = True
    """Write `report.html`: frozen and adapted side by side, costs, metrics, curves, classes."""
    seed: NonNegativeInt = 42
    """Fixes initial values, order, augmentation and held-out rows."""
    quiet: bool = False
    """Print nothing but warnings and errors."""

    @model_validator(mode="before")
    @classmethod
    def _open_clip_unless_said(cls, values: Any) -> Any:
        backbone = values.get("backbone") if isinstance(values, Mapping) else None
        if isinstance(backbone, Mapping) and "kind" not in backbone:
            return {**values, "backbone": {"kind": "open_clip", **backbone}}
        return values

    @model_validator(mode="after")
    def _something_to_train(self) -> "TrainConfig":
        if self.cache is None:
            for name in ("dataset", "backbone"):
                if getattr(self, name) is None:
                    raise ValueError(f"{name} is unset, and there is no cache to take it from")
            if self.inputs == "tokens":
                raise ValueError("inputs tokens needs a cache that holds them; give cache")
        if self.adapter.trains_on == "features":
            raise ValueError(
                f"adapter {self.adapter.kind} trains on features of pairs of images and texts; "
                "python -m finetune.project does"
            )
        if self.inputs == "tokens" and self.adapter.trains_on != "tokens":
            raise ValueError(
                f"inputs tokens is for adapter last_blocks; {self.adapter.kind} changes blocks "
                "below them, set inputs pixels"
            )
        if self.objective == "image_text":
            if self.adapter.kind == "linear":
                raise ValueError(
                    "objective image_text with adapter linear leaves nothing to train; choose "
                    "another adapter"
                )
            for name in ("init_head", "loss"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"objective image_text has no head, but {name} is given; leave it out"
                    )
        if self.loss is not None and self.loss.needs_cosines:
            raise ValueError(
                f"loss {self.loss.kind} takes cosines, and the head that is trained here gives "
                "logits; choose another loss"
            )
        return self


@dataclass(frozen=True)
class Report:
    """What a run left behind.

    Attributes:
        folder: the result; `--backbone adapted --backbone.model FOLDER` opens it.
        metrics: content of metrics.json.
        reused: whether the folder was already finished.
    """

    folder: Path
    metrics: dict[str, Any]
    reused: bool = False


def run(config: TrainConfig) -> Report:
    """Trains adapter and head and writes them, or finds them finished.

    Raises:
        UserError: one line with what was found, what was expected and what to do.
    """
    with group_for(config.device) as group:
        cache = None if config.cache is None else open_cache(config.cache)
        config = _completed(config, cache)
        material = _material(config, cache) if group.leads else None
        group.follow(None)  # the others wait: opening a dataset may write it
        material = material or _material(config, cache)
        material.require_labels()
        record = _record(config, material, cache)
        finished = group.follow(
            is_finished(config.out, record, config.restart, RECORD) if group.leads else False
        )
        if finished:
            metrics = read_json(config.out / "metrics.json")
            if group.leads and not config.quiet:
                print(f"{config.out}: trained already with this configuration (--restart redoes)")
                print(summary(metrics))
            return Report(config.out, metrics, reused=True)
        place = resumable(config.out, record, config.restart, RECORD)
        with place if group.leads else nullcontext(config.out) as folder:
            metrics = _train(config, material, cache, group.follow(folder), group)
            if group.leads:
                (folder / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
                write_json(folder / "metrics.json", metrics)
                write_json(folder / RECORD, {**record, "versions": run_folder.versions()})
                (folder / LAST).unlink()
                (folder / FITTED).unlink(missing_ok=True)
        metrics = group.follow(metrics)
    if group.leads and not config.quiet:
        print(summary(metrics))
        print(f"written to {config.out}: --backbone adapted --backbone.model {config.out}")
    return Report(config.out, metrics)


def _train(
    config: TrainConfig, material: Material, cache: Cache | None, folder: Path, group: Group
) -> dict[str, Any]:
    """Trains, and fills the folder; returns the metrics (those of the leading process count)."""
    started, device = time.perf_counter(), group.device
    quiet = config.quiet or not group.leads
    chosen = config.backbone
    assert chosen is not None, "not completed"
    parts, decides = building.choose(
        material,
        train_split=config.train_split,
        val_split=config.val_split,
        val_fraction=config.val_fraction,
        test_split=config.test_split,
        seed=_carving_seed(config),
    )
    backbone = chosen.open(str(device), "fp32")
    if cache is not None:
        frozen.require_fits(cache, material, backbone)
    towers = backbone.trainable()
    towers.model.eval()
    torch.manual_seed(config.seed)
    adapter = config.adapter.attach(towers).to(device).eval()
    if config.optim.checkpoint_blocks:
        recompute_tower_blocks(towers)
    source: Source
    if material.manifest is None:
        assert cache is not None, "no images and no cache"
        source = TokenSource(towers, cache, parts.train, device)
    else:
        source = PixelSource(
            towers,
            backbone.spec.pixels,
            material.manifest,
            parts.train,
            config.augmentation,
            config.loading,
            device,
        )
    metric = main_metric(material.task)
    try:
        head: Linear | None
        fits = config.objective == "classification" and config.head.fit_first
        if fits and config.init_head is None:
            head, head_config = fitted_head(
                config.head,
                config.loss,
                material,
                source,
                parts,
                backbone,
                group,
                folder=folder,
                batch_size=max(config.optim.batch_size, 32),
                mixed=mixed_precision(config.optim.precision, device)[0],
                seed=config.seed,
                quiet=quiet,
            )
        else:
            head, head_config = building.build_head(
                config.head, config.init_head, config.objective, material, backbone, device
            )
        objective = building.build_objective(
            config.objective,
            head,
            config.loss,
            config.text,
            material,
            backbone,
            adapter,
            config.adapter,
            parts,
            config.optim.accumulate * group.size,
        ).to(device)
        tuned = Tuned(adapter, objective)
        if not quiet:
            print(_opening(config, tuned, parts, towers.name, device))
        building.start_offset(objective, source, parts)
        fitted = fit(
            tuned,
            source,
            parts.train,
            parts.val if decides else None,
            config.optim,
            config.stop,
            build=lambda: tuned.build_optimizer(config.optim, config.head),
            group=group,
            seed=config.seed,
            metric=metric,
            folder=folder,
            quiet=quiet,
            measure_first=fits or config.init_head is not None,
        )
        if not group.leads:
            return {}
        write_adapter(folder, chosen, backbone, config.adapter, adapter.state())
        adapter.fold()
        adapter.requires_grad_(False)
        finished = adapter.finish(backbone)
        finished.spec = replace(finished.spec, identity=read_adapter(folder).identity())
        roles = {"train": parts.train, "val": parts.val if decides else None, "test": parts.test}
        measured = {
            role: _measure(objective, source, finished, part, config, device)
            for role, part in roles.items()
            if part is not None
        }
    finally:
        source.close()
    num_bytes = (folder / TENSORS).stat().st_size
    values = result_values(tuned, fitted, measured, metric, num_bytes, device)
    values["inputs"] = "pixels" if cache is None or material.manifest is not None else "tokens"
    run_folder.write_history(folder / "history.jsonl", fitted.history)
    dataset = EncodedDataset(config.out, material, finished)
    head = write_head(
        folder / head_folder.FOLDER,
        dataset,
        material,
        objective,
        head_config,
        measured,
        values,
        config.metrics,
        config.seed,
    )
    rival = _frozen(config, cache, folder, backbone)
    if rival is not None:
        values["frozen"] = rival.record()
    values["unreadable"] = source.problems
    values["seconds_total"] = time.perf_counter() - started
    if config.report:
        from finetune.tuning.report import write_report  # matplotlib takes a second to import

        name = f"image/{dataset.feature}"
        write_report(
            folder,
            config.out.name,
            head,
            [(one.part, head_folder.tables(name, one.features, device)) for one in shown(measured)],
            material,
            values,
            fitted.history,
            rival,
            config.record(),
            config.metrics,
        )
    return values


def _measure(
    objective: Objective,
    source: Source,
    finished: Backbone,
    part: Part,
    config: TrainConfig,
    device: torch.device,
) -> Measured:
    """Rows as the adapted backbone sees them, in float32."""

    def encode(inputs: Tensor) -> Tensor:
        return source.encode_finished(finished, inputs)

    size = max(config.optim.batch_size, 32)
    return measure(objective, source, encode, part, size, nullcontext(), device)


def _frozen(
    config: TrainConfig, cache: Cache | None, folder: Path, backbone: Backbone
) -> Frozen | None:
    """The other way: a head on frozen features, trained on the cache or what `init_head` is."""
    if cache is None or not config.compare or not frozen.holds_features(cache, backbone):
        return None if config.init_head is None else frozen.read_frozen(config.init_head)
    return frozen.train_frozen(
        cache,
        folder / frozen.FOLDER,
        str(config.out / frozen.FOLDER),
        train_split=config.train_split,
        val_split=None if config.val_split == building.NO_SPLIT else config.val_split,
        val_fraction=config.val_fraction,
        test_split=config.test_split,
        seed=_carving_seed(config),
        device=config.device,
    )


def _carving_seed(config: TrainConfig) -> int:
    """What rows are held out by: those that the first head was not trained on either."""
    return config.seed if config.init_head is None else carving_seed(config.init_head, config.seed)


def _completed(config: TrainConfig, cache: Cache | None) -> TrainConfig:
    """The configuration with what is unset filled in: dataset and backbone of the cache, steps.

    Raises:
        ConfigError: if the cache cannot say, or steps are to follow from shots and there are none.
    """
    filled: dict[str, Any] = {}
    per_shot = config.optim.steps_per_shot
    if per_shot is not None:
        shots = None if config.dataset is None else config.dataset.shots
        if shots is None:
            raise ConfigError(
                f"optim.steps_per_shot={per_shot} needs dataset.shots, which is unset; set "
                "optim.steps or optim.epochs instead"
            )
        steps = {"steps": per_shot * shots, "steps_per_shot": None}
        filled["optim"] = config.optim.model_copy(update=steps)
    if cache is None:
        return config.model_copy(update=filled)
    for name, members in (("dataset", DATASETS), ("backbone", BACKBONES)):
        record = cache.attributes[name]
        if getattr(config, name) is not None:
            continue
        if record.get("kind") not in members:
            raise ConfigError(
                f"{name}: {cache.path} was written with {name} kind {record.get('kind')!r}, this "
                f"installation has {', '.join(members)}; install the extra that brings it"
            )
        filled[name] = members[record["kind"]].model_validate(record)
    return config.model_copy(update=filled)


def _material(config: TrainConfig, cache: Cache | None) -> Material:
    """Rows of the cache where tokens are trained on, otherwise the dataset's images.

    Raises:
        CacheError: if tokens are asked for by name and the cache does not hold them.
    """
    possible = config.adapter.trains_on == "tokens" and config.inputs != "pixels"
    if possible and cache is not None:
        held = cache.identity.features.before_last > 0
        if held or config.inputs == "tokens":
            require_tokens(cache, getattr(config.adapter, "num_blocks", 1))
            return Material.of_cache(cache)
    assert config.dataset is not None, "not completed"
    return Material.of_manifest(config.dataset.open(), config.dataset.record())


def _record(config: TrainConfig, material: Material, cache: Cache | None) -> dict[str, Any]:
    """Everything that changes the result, as plain JSON values."""
    record = {name: value for name, value in config.record().items() if name not in _FREE}
    record["decode"] = config.loading.decode
    values: dict[str, Any] = {"config": record, "dataset": material.identity.record()}
    if cache is not None:
        values["cache"] = cache.fingerprint
    if config.init_head is not None:
        values["init_head"] = read_json(config.init_head / "metrics.json")
    plain: dict[str, Any] = json.loads(json.dumps(values))
    return plain


def _opening(
    config: TrainConfig, tuned: Tuned, parts: Parts, name: str, device: torch.device
) -> str:
    """What is trained, in one line."""
    adapter = sum(p.numel() for p in tuned.adapter_parameters)
    head = sum(p.numel() for p in tuned.objective.parameters())
    test = 0 if parts.test is None else len(parts.test)
    deciding = f"{len(parts.val):,} ({parts.val.name}) to decide"
    if config.val_split == building.NO_SPLIT:
        deciding = "none to decide"
    return (
        f"{name} with adapter {config.adapter.kind}: {adapter:,} + {head:,} parameters of adapter "
        f"and head on {device}; {len(parts.train):,} images to train, {deciding}, {test:,} to "
        "report"
    )


if __name__ == "__main__":
    with ending_at_once():
        run_job(TrainConfig, run)
