"""Job: adapt a backbone to a labelled dataset, together with a linear head.

    python -m finetune.train --dataset garden --dataset.domain night \
        --backbone.model local-dir:backbones/garden --adapter full --out adapted/night

The result is an adapted backbone that every job opens by its path (`--backbone adapted
--backbone.model adapted/night`), and in `head/` the head as a run folder of heads. It is written in
one piece: a folder that exists is complete; an interrupted training goes on where it stopped.
"""

import json
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, NonNegativeInt, model_validator
from torch import Tensor

from featcache.adapter_folder import read_adapter, write_adapter
from featcache.adapters import AnyAdapter
from featcache.adapters.base import Adapter
from featcache.adapters.linear import LinearConfig as FrozenConfig
from featcache.backbones import AnyBackbone
from featcache.backbones.base import Backbone
from featcache.backbones.open_clip import OpenClipConfig
from featcache.config import Config, run_job
from featcache.datasets import AnyDataset
from featcache.datasets.garden import GardenConfig
from featcache.errors import ConfigError
from featcache.manifest import Manifest
from featcache.prompts import choose_zero_shot, expand, format_prompts
from finetune import head_folder
from finetune.checkpoint import LAST
from finetune.data import ImagesConfig
from finetune.examples import ManifestRows
from finetune.head_folder import EncodedDataset
from finetune.initial_head import initial_head
from finetune.objective import ClassText, Objective, ObjectiveName
from finetune.output import is_finished, read_json, resumable, write_json
from finetune.sources import PixelSource, Source
from finetune.tuned import Tuned
from finetune.tuning import ClassifierConfig, StopConfig, TextConfig, TuningConfig
from finetune.tuning_loop import Fit, Measured, fit, measure
from heads import run_folder
from heads.base import FeatureSpec
from heads.distributed import Group, ending_at_once, group_for
from heads.evaluate import main_metric
from heads.losses import AnyLoss
from heads.losses.base import ClassStatistics
from heads.models.linear import Linear, LinearConfig
from heads.parts import Parts, choose_parts, class_counts, labelled_part
from heads.progress import duration
from heads.results import write_results
from heads.scoring import MetricsConfig
from heads.specification import build_loss

RECORD = "train.json"
"""What a finished folder was made from."""

_FREE = ("out", "restart", "device", "quiet")
"""Options that do not change what is computed."""


class TrainConfig(Config):
    """Adapt a backbone to a labelled dataset, together with a linear head."""

    dataset: AnyDataset = Field(default=GardenConfig(), discriminator="kind")
    """Images with labels."""
    backbone: AnyBackbone = Field(default=OpenClipConfig(), discriminator="kind")
    """Encoder to adapt, and its weights."""
    adapter: AnyAdapter = Field(default=FrozenConfig(), discriminator="kind")
    """What of it is trained."""
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
    head begins with its weights and scaling; unset = zeros."""
    loss: AnyLoss | None = Field(default=None, discriminator="kind")
    """Loss on the head's logits, by kind; unset = softmax cross-entropy (single label) or sigmoid
    cross-entropy (multi label)."""
    text: TextConfig = TextConfig()
    """Class names as text."""
    optim: TuningConfig = TuningConfig()
    """Optimiser, schedule, batches and arithmetic."""
    stop: StopConfig = StopConfig()
    """When to stop before the last epoch."""
    images: ImagesConfig = ImagesConfig()
    """Reading and augmentation of the images."""
    train_split: str = "train"
    """Split to train on."""
    val_split: str | None = None
    """Split that picks the epoch and stops the training; `carve` = hold rows of the training split
    out; unset = val if the dataset has one, otherwise carve; `none` = train all epochs on all rows
    and keep the last."""
    val_fraction: float = Field(default=0.1, gt=0, lt=1)
    """Share of each class's training rows that `carve` holds out, 0..1."""
    test_split: str | None = None
    """Split that is only reported, never decided on; unset = test if the dataset has one."""
    metrics: MetricsConfig = MetricsConfig()
    """How metrics are counted."""
    device: str = "auto"
    """auto (the GPU if there is one), cpu or cuda:N."""
    seed: NonNegativeInt = 42
    """Fixes initial values, order, augmentation and held-out rows."""
    quiet: bool = False
    """Print nothing but warnings and errors."""

    @model_validator(mode="after")
    def _something_to_train(self) -> "TrainConfig":
        if self.objective == "image_text":
            if self.adapter.kind == "linear":
                raise ValueError(
                    "objective image_text with adapter linear leaves nothing to train; choose "
                    "another adapter"
                )
            for name, given in (("init_head", self.init_head), ("loss", self.loss)):
                if given is not None:
                    raise ValueError(
                        f"objective image_text has no head, but {name} is given; leave it out"
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
        manifest = config.dataset.open()
        rows = ManifestRows(manifest)
        _require_labels(rows)
        record = _record(config, manifest)
        finished = group.follow(
            is_finished(config.out, record, config.restart, RECORD) if group.leads else None
        )
        if finished:
            metrics = read_json(config.out / "metrics.json")
            if group.leads and not config.quiet:
                print(f"{config.out}: trained already with this configuration (--restart redoes)")
            return Report(config.out, metrics, reused=True)
        place = resumable(config.out, record, config.restart, RECORD)
        with place if group.leads else nullcontext(config.out) as folder:
            metrics = _train(config, manifest, rows, group.follow(folder), group)
            if group.leads:
                (folder / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
                write_json(folder / "metrics.json", metrics)
                write_json(folder / RECORD, {**record, "versions": run_folder.versions()})
                (folder / LAST).unlink()
        metrics = group.follow(metrics)
    if group.leads and not config.quiet:
        print(summary(metrics))
        print(f"written to {config.out}: --backbone adapted --backbone.model {config.out}")
    return Report(config.out, metrics)


def _train(
    config: TrainConfig, manifest: Manifest, rows: ManifestRows, folder: Path, group: Group
) -> dict[str, Any]:
    """Trains, and fills the folder; returns the metrics (those of the leading process count)."""
    started = time.perf_counter()
    device = group.device
    quiet = config.quiet or not group.leads
    parts = _parts(config, rows)
    val = None if config.val_split == "none" else parts.val
    backbone = config.backbone.open(str(device), "fp32")
    towers = backbone.trainable()
    towers.model.eval()
    torch.manual_seed(config.seed)
    head, head_config = _head(config, manifest, backbone, device)
    adapter = config.adapter.attach(towers).to(device)
    objective = _objective(config, manifest, backbone, adapter, head, parts).to(device)
    tuned = Tuned(adapter, objective)
    spec = backbone.spec
    source = PixelSource(towers, spec.pixels, manifest, parts.train, config.images, device)
    metric = main_metric(manifest.task)
    if not quiet:
        print(_opening(config, tuned, parts, towers.name, device))
    try:
        if objective.offset is not None:
            _start_offset(objective, source, parts)
        fitted = fit(
            tuned,
            source,
            parts.train,
            val,
            config.optim,
            config.stop,
            build=lambda: tuned.build_optimizer(config.optim, config.head),
            group=group,
            seed=config.seed,
            metric=metric,
            folder=folder,
            quiet=quiet,
        )
        if not group.leads:
            return {}
        write_adapter(folder, config.backbone, backbone, config.adapter, adapter.state())
        adapter.fold()
        adapter.requires_grad_(False)
        finished = adapter.finish(backbone)
        finished.spec = replace(finished.spec, identity=read_adapter(folder).identity())
        measured = _measure_all(objective, source, finished, parts, val is not None, config, device)
    finally:
        source.close()
    values = _values(config, tuned, fitted, measured, metric, device)
    run_folder.write_history(folder / "history.jsonl", fitted.history)
    dataset = EncodedDataset(config.out, manifest, finished, config.dataset.record())
    _write_head(config, folder, dataset, objective, head_config, parts, measured, values, fitted)
    values["unreadable"] = source.problems
    values["seconds_total"] = time.perf_counter() - started
    return values


def _parts(config: TrainConfig, rows: ManifestRows) -> Parts:
    """Which rows train, decide and are reported."""
    without = config.val_split == "none"
    parts = choose_parts(
        rows,
        train_split=config.train_split,
        val_split="carve" if without else config.val_split,
        val_fraction=config.val_fraction,
        test_split=config.test_split,
        select_on="val",
        seed=config.seed,
    )
    if not without:
        return parts
    return replace(parts, train=labelled_part(rows, config.train_split))


def _head(
    config: TrainConfig, manifest: Manifest, backbone: Backbone, device: torch.device
) -> tuple[Linear | None, LinearConfig]:
    """The head to train, None without one, and options that build it again."""
    if config.objective == "image_text":
        return None, LinearConfig(scaling="unit", bias=False, lrs=(1e-3,), weight_decays=(0.0,))
    if config.init_head is not None:
        return initial_head(config.init_head, manifest, backbone, device)
    options = config.head
    head = LinearConfig(
        feature="projected" if backbone.spec.projected_dim else "pooled",
        scaling=options.scaling,
        bias=options.bias,
        lrs=(options.lr,),
        weight_decays=(options.weight_decay,),
    )
    width = backbone.spec.projected_dim or backbone.spec.pooled_dim
    pairs = ((options.lr, options.weight_decay),)
    module = Linear(
        width, manifest.num_classes, bias=options.bias, scaling=options.scaling, pairs=pairs
    )
    return module.to(device), head


def _objective(
    config: TrainConfig,
    manifest: Manifest,
    backbone: Backbone,
    adapter: Adapter,
    head: Linear | None,
    parts: Parts,
) -> Objective:
    """Head and class text with their losses."""
    spec, options = backbone.spec, config.text
    alone = config.objective == "image_text"
    weight = options.weight
    if weight is None:
        weight = 0.3 if spec.has_text and spec.projected_dim else 0.0
    wanted = alone or weight > 0
    if wanted and not (spec.has_text and spec.projected_dim):
        raise ConfigError(
            f"{spec.identity.name} has no text tower, which "
            + ("objective image_text" if alone else f"text.weight {weight:g}")
            + " needs; "
            + ("choose another backbone" if alone else "set text.weight 0")
        )
    text = None
    if spec.has_text and spec.projected_dim:
        prompts = format_prompts(manifest.classes, templates_of(config.text, manifest))
        text = ClassText(prompts, adapter.towers, config.adapter.trains_text)
    scale = options.scale or (100.0 if alone else spec.logit_scale)
    counts = class_counts(parts.train, manifest.num_classes)
    statistics = ClassStatistics(counts, len(parts.train))
    criterion = build_loss(LinearConfig(), config.loss, manifest.task, statistics)
    assert criterion is not None, "linear heads take a loss"
    if not criterion.is_mean_over_rows and config.optim.accumulate > 1:
        raise ConfigError(
            f"loss {config.loss.kind if config.loss else ''} depends on which rows share a batch, "
            f"and optim.accumulate={config.optim.accumulate} would divide it; leave one out"
        )
    return Objective(head, criterion, manifest.task, text, weight, scale)


def templates_of(options: TextConfig, manifest: Manifest) -> list[str]:
    """The prompt templates that the options mean for a dataset."""
    columns = [str(column) for column in manifest.classes.columns]
    usual = choose_zero_shot(manifest.kind, columns)
    if manifest.kind.startswith("flowers102"):
        usual = "flowers"
    return expand(options.templates or usual, "text.templates")


def _start_offset(objective: Objective, source: Source, parts: Parts) -> None:
    """Begins the offset of the alignment where the first plain training images stand."""
    inputs, _ = next(iter(source.plain(parts.train, 256)))
    with torch.no_grad():
        objective.start_offset(source.encode(inputs))


def _measure_all(
    objective: Objective,
    source: Source,
    finished: Backbone,
    parts: Parts,
    with_val: bool,
    config: TrainConfig,
    device: torch.device,
) -> dict[str, Measured]:
    """Every part as the adapted backbone sees it, in float32, by name of its role."""

    def encode(inputs: Tensor) -> Tensor:
        return source.encode_finished(finished, inputs)

    roles = {"train": parts.train, "val": parts.val if with_val else None, "test": parts.test}
    size = max(config.optim.batch_size, 32)
    return {
        name: measure(objective, source, encode, part, size, nullcontext(), device)
        for name, part in roles.items()
        if part is not None
    }


def _values(
    config: TrainConfig,
    tuned: Tuned,
    fitted: Fit,
    measured: dict[str, Measured],
    metric: str,
    device: torch.device,
) -> dict[str, Any]:
    """What metrics.json says of the training."""
    history = fitted.history
    own = {name: t.numel() for name, t in tuned.state().items()}
    adapter = sum(count for name, count in own.items() if name.startswith("adapter/"))
    encoded = sum(len(one.part) for one in measured.values())
    values: dict[str, Any] = {
        "metric": metric,
        "selected_on": "val" if "val" in measured else "none",
        "best_epoch": fitted.best_epoch,
        "candidate": "",
        "epochs": len(history),
        "num_train_rows": len(measured["train"].part),
        "num_parameters": sum(own.values()),
        "num_adapter_parameters": adapter,
        "num_head_parameters": sum(own.values()) - adapter,
        "seconds": sum(line["seconds"] for line in history),
        "images_per_second": sum(line["images_per_second"] for line in history) / len(history),
        "waiting": sum(line["waiting"] for line in history) / len(history),
        "encoding_images_per_second": encoded / sum(one.seconds for one in measured.values()),
        "device": str(device),
        "val_rows_from": measured.get("val", measured["train"]).part.name,
    }
    for role, one in measured.items():
        values |= {f"{role}_acc_{name}": value for name, value in one.accuracy.items()}
        values[f"{role}_loss"] = one.loss
    return values


def _write_head(
    config: TrainConfig,
    folder: Path,
    dataset: EncodedDataset,
    objective: Objective,
    head_config: LinearConfig,
    parts: Parts,
    measured: dict[str, Measured],
    values: dict[str, Any],
    fitted: Fit,
) -> None:
    """The head as a finished run folder of heads, with its metrics, tables and page."""
    own = folder / head_folder.FOLDER
    own.mkdir(exist_ok=True)
    device = next(objective.parameters(), torch.zeros(())).device
    head = objective.head
    if head is None:  # class text as the weights of a linear head
        assert objective.text is not None
        vectors = objective.text_scale * objective.text().detach()
        head = Linear(
            vectors.shape[1], len(vectors), bias=False, scaling="unit", weight=vectors.cpu()
        ).to(device)
    head.eval()
    classes = dataset.classes
    spec = FeatureSpec(
        feature_dim=head.mean.shape[0],
        num_classes=len(classes),
        task=dataset.task,
        class_counts=class_counts(measured["train"].part, len(classes)),
        classes=classes,
        prompts=None,
        logit_scale=dataset.backbone.spec.logit_scale,
        num_rows=len(measured["train"].part),
        feature_dims={f"image/{dataset.feature}": head.mean.shape[0]},
    )
    record = run_folder.describe_head(dataset, head_config, spec)
    state = head.trained_state()
    run_folder.write_json(own / "head.json", record)
    run_folder.write_tensors(own / run_folder.WEIGHTS["best"], state)
    run_folder.write_history(own / "history.jsonl", fitted.history)
    first = measured.get("val", measured["train"])
    shown = [first, *([measured["test"]] if "test" in measured else [])]
    page_values = values | {
        "num_parameters": sum(t.numel() for t in state.values()),
    }
    found = write_results(
        own,
        head,
        [(one.part, head_folder.tables(dataset.feature, one.features, device)) for one in shown],
        options=config.metrics,
        calibrating="val" in measured,
        seed=config.seed,
        classes=classes,
        values=page_values,
        history=fitted.history,
        record=record,
        config={"cache": str(config.out), **config.record()},
        page=True,
    )
    run_folder.write_json(own / "metrics.json", page_values | found)


def _require_labels(rows: ManifestRows) -> None:
    if rows.task == "unlabelled" or rows.num_classes == 0:
        raise ConfigError(
            f"{rows.path}: holds {rows.num_classes} classes and is {rows.task}; fine-tuning needs "
            "labels (for image-caption pairs without labels: python -m finetune.pretrain)"
        )


def _record(config: TrainConfig, manifest: Manifest) -> dict[str, Any]:
    """Everything that changes the result, as plain JSON values."""
    record = {name: value for name, value in config.record().items() if name not in _FREE}
    for name in ("ram_budget_gib", "num_readers"):
        del record["images"][name]
    plain: dict[str, Any] = json.loads(
        json.dumps({"config": record, "dataset": manifest.identity.record()})
    )
    return plain


def _opening(
    config: TrainConfig, tuned: Tuned, parts: Parts, name: str, device: torch.device
) -> str:
    """What is trained, in one line."""
    adapter = sum(p.numel() for p in tuned.adapter_parameters)
    head = sum(p.numel() for p in tuned.objective.parameters())
    test = 0 if parts.test is None else len(parts.test)
    return (
        f"{name} with adapter {config.adapter.kind}: {adapter:,} + {head:,} parameters of adapter "
        f"and head on {device}; {len(parts.train):,} images to train, {len(parts.val):,} "
        f"({parts.val.name}) to decide, {test:,} to report"
    )


def summary(values: dict[str, Any]) -> str:
    """The result in a few lines."""
    lines = [
        f"trained {values['epochs']} epochs in {duration(values['seconds'])}, "
        f"{values['images_per_second']:,.0f} images/s, {values['waiting']:.0%} of the time waiting "
        f"for data; best epoch {values['best_epoch']}"
    ]
    for role in ("train", "val", "test"):
        shown = [
            f"{label} {values[f'{role}_acc_{name}']:.2%}"
            for name, label in (("cls", "head"), ("txt", "text"))
            if f"{role}_acc_{name}" in values
        ]
        if shown:
            lines.append(f"  {role:5}  {values['metric']}: {', '.join(shown)}")
    return "\n".join(lines)


if __name__ == "__main__":
    with ending_at_once():
        run_job(TrainConfig, run)
