"""Job: image-caption pairs to a dual encoder trained from scratch by InfoNCE.

    python -m finetune.pretrain --dataset garden --out backbones/garden

The result is a folder in open_clip's `local-dir` format, beside it the configuration, the metrics
and the loss curve. It is written in one piece: a folder that exists is complete.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator
from torch import Tensor, nn

from featcache.backbones.base import PixelSpec
from featcache.config import Config, run_job
from featcache.datasets import AnyDataset
from featcache.datasets.garden import GardenConfig
from featcache.errors import ConfigError
from featcache.manifest import Manifest
from featcache.precision import fastest_precision, resolve_device
from finetune.architectures import build, image_size, model_config, save_local_dir, tokenizer
from finetune.data import (
    Batch,
    ImagesConfig,
    ImageStore,
    Pairs,
    ahead,
    augment,
    batches,
    normalize,
    pairs_of,
    pixel_statistics,
)
from finetune.losses.info_nce import clamp_logit_scale, info_nce
from finetune.optim import AdamWConfig
from finetune.output import RECORD, is_finished, read_json, write_json, written_at_once
from finetune.text import TokenTable, UsedVocabulary, can_shorten, encode_text
from finetune.validation import Validation
from heads.optim import set_lr
from heads.run_folder import RunError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

MARGIN = 1.125
"""Side of the training pixels that are kept, over the side that the tower takes: room for crops."""


class PretrainConfig(Config):
    """Train a CLIP-like dual encoder from scratch on image-caption pairs (InfoNCE)."""

    dataset: AnyDataset = Field(default=GardenConfig(), discriminator="kind")
    """Images with captions."""
    train_split: str = "train"
    """Split that is trained on."""
    val_split: str = "val"
    """Split that is only looked at; empty = no validation."""
    architecture: str = "demo-rn"
    """demo-rn or demo-vit (64 pixels), an open_clip name (RN50, ViT-B-32, …), or a .json file."""
    image_size: PositiveInt | None = None
    """Side of the images in pixels; unset = the architecture's."""
    context_length: PositiveInt | None = None
    """Longest caption in tokens, start and end included; unset = the architecture's."""
    out: Path = Path("backbones/garden")
    """Folder for the result; opens as `local-dir:FOLDER`."""
    restart: bool = False
    """Train anew and replace a finished result in `out`."""
    epochs: PositiveInt = 9
    """Passes over the training split."""
    steps: PositiveInt | None = None
    """Optimizer steps; unset = all of `epochs`, otherwise as many epochs as it takes."""
    batch_size: PositiveInt = 128
    """Distinct images a step; the number of negatives is one less."""
    optim: AdamWConfig = AdamWConfig()
    """Optimizer and schedule."""
    images: ImagesConfig = ImagesConfig()
    """Reading and augmentation of the training images."""
    prompt: str = "a photo of a {name}."
    """Zero-shot prompt of validation; may name any column of the class table."""
    validate_every: NonNegativeInt = 3
    """Epochs between validations; 0 = only at the end."""
    log_every: PositiveInt = 20
    """Steps between log lines."""
    device: str = "auto"
    """auto = the first GPU if there is one, else the CPU; or cpu, cuda, cuda:N."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the towers; weights stay float32. auto = bf16 where the device has it."""
    seed: NonNegativeInt = 0
    """Fixes initial weights, order, captions and crops."""

    @model_validator(mode="after")
    def _more_than_one(self) -> "PretrainConfig":
        if self.batch_size < 2:
            raise ValueError(f"batch_size is {self.batch_size}; InfoNCE needs 2 or more images")
        return self


@dataclass(frozen=True)
class Report:
    """What a run left behind.

    Attributes:
        folder: the result; `local-dir:{folder}` opens it.
        metrics: content of metrics.json.
        reused: whether the folder was already finished.
    """

    folder: Path
    metrics: dict[str, Any]
    reused: bool


def run(config: PretrainConfig) -> Report:
    """Trains the dual encoder and writes it, or finds it finished.

    Raises:
        UserError: one line with what was found, what was expected and what to do.
    """
    architecture = model_config(config.architecture, config.image_size, config.context_length)
    manifest = config.dataset.open()
    record = _record(config, manifest, architecture)
    if is_finished(config.out, record, config.restart):
        metrics = read_json(config.out / "metrics.json")
        print(
            f"{config.out}: already pretrained with this configuration, reused (--restart to redo)"
        )
        return Report(config.out, metrics, reused=True)
    with written_at_once(config.out) as folder:
        metrics = _pretrain(config, manifest, architecture, folder)
        (folder / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
        write_json(folder / "metrics.json", metrics)
        write_json(folder / RECORD, {**record, "versions": _versions()})
    print(f"written to {config.out}: open it as local-dir:{config.out}")
    return Report(config.out, metrics, reused=False)


def _pretrain(
    config: PretrainConfig, manifest: Manifest, architecture: dict[str, Any], folder: Path
) -> dict[str, Any]:
    """Trains, validates and saves into `folder`; returns the metrics."""
    device, precision = resolve_device(config.device), config.precision
    if precision == "auto":
        precision = "bf16" if fastest_precision(device) == "bf16" else "fp32"
    torch.manual_seed(config.seed)
    model = build(architecture).to(device)
    model = model.to(memory_format=torch.channels_last)
    size, tokenize = image_size(model), tokenizer(architecture)

    pairs = pairs_of(manifest, config.train_split)
    if len(pairs) < config.batch_size:
        raise ConfigError(
            f"batch_size: {config.batch_size} images a step, but {config.train_split} has only "
            f"{len(pairs)} images with captions; lower batch_size"
        )
    kept = (math.ceil(size[0] * MARGIN), math.ceil(size[1] * MARGIN))
    started = time.perf_counter()
    store = ImageStore(
        pairs.root, pairs.paths, PixelSpec(kept, CLIP_MEAN, CLIP_STD), "scaled", config.images
    )
    spec = PixelSpec(size, CLIP_MEAN, CLIP_STD)
    if config.images.normalization == "dataset":
        mean, std = pixel_statistics(store, config.seed)
        spec = replace(spec, mean=mean, std=std)
    validation = None
    if config.val_split:
        validation = Validation.open(
            manifest, config.val_split, config.prompt, tokenize, spec, config.images, device
        )
    texts = TokenTable.of(pairs.texts, tokenize)
    vocabulary = None
    if can_shorten(model):
        tables = [texts] if validation is None else [texts, validation.texts, validation.prompts]
        vocabulary = UsedVocabulary(model, np.concatenate([t.ids.ravel() for t in tables]))
        texts = vocabulary.compact(texts)
        validation = None if validation is None else validation.compact(vocabulary)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"{config.architecture}: {num_parameters / 1e6:.2f} M parameters in training, {precision} "
        f"on {device}; {len(pairs)} images, {len(pairs.texts)} distinct captions, "
        f"{'decoded in memory' if store.in_memory else 'decoded batch by batch'} "
        f"after {time.perf_counter() - started:.1f} s"
    )
    if pairs.num_without:
        print(f"{pairs.num_without} images of {config.train_split} have no caption: left out")

    def encode_batch(batch: Batch, random: np.random.Generator) -> tuple[Tensor, Tensor]:
        pixels = augment(
            batch.pixels.to(device), size, config.images.min_area, config.images.flip, random
        )
        pixels = normalize(pixels, spec.mean, spec.std)
        distinct, place = np.unique(batch.caption_ids, return_inverse=True)
        tokens = texts.rows(distinct).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            images = model.encode_image(pixels.contiguous(memory_format=torch.channels_last))  # type: ignore[operator]
            captions = encode_text(model, tokens)
        captions = captions.float()[torch.from_numpy(place).to(device)]
        return F.normalize(images.float(), dim=-1), F.normalize(captions, dim=-1)

    try:
        with (folder / "history.jsonl").open("w", encoding="utf-8") as log:
            history = _train(config, model, pairs, store, encode_batch, validation, log.write)
    finally:
        store.close()
    for path, reason in list(store.problems.items())[:10]:
        print(f"unreadable, left out: {path}: {reason}")
    metrics = _summary(config, history, len(pairs), store)
    if validation is not None:
        metrics["validation"] = history[-1]["validation"]
        validation.images.close()
    if vocabulary is not None:
        vocabulary.restore()
    save_local_dir(folder, model, architecture, spec)
    _draw(folder / "curves.png", history, config)
    return metrics


def _train(
    config: PretrainConfig,
    model: nn.Module,
    pairs: Pairs,
    store: ImageStore,
    encode_batch: Callable[[Batch, np.random.Generator], tuple[Tensor, Tensor]],
    validation: Validation | None,
    write: Callable[[str], Any],
) -> list[dict[str, Any]]:
    """The loop: one optimizer step a batch; returns the log, one record every `log_every` steps."""
    steps_per_epoch = len(pairs) // config.batch_size
    num_steps = config.steps or config.epochs * steps_per_epoch
    logit_scale = model.logit_scale
    assert isinstance(logit_scale, nn.Parameter)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = config.optim.build(model)
    factor = config.optim.lr_factor(num_steps)
    history: list[dict[str, Any]] = []
    losses: list[float] = []
    started, aside = time.perf_counter(), 0.0
    stream = batches(pairs, store, config.batch_size, config.seed)
    stream = stream if store.in_memory else ahead(stream)
    model.train()
    for step in range(num_steps):
        batch = next(stream)
        set_lr(optimizer, factor(step))
        images, captions = encode_batch(batch, np.random.default_rng([config.seed, 1, step]))
        loss = info_nce(images, captions, logit_scale)
        if not torch.isfinite(loss):
            raise RunError(
                f"step {step + 1} of {num_steps}: the loss is {loss.item()}; lower optim.lr or "
                "set optim.clip_norm"
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        limit = config.optim.clip_norm or math.inf
        norm = nn.utils.clip_grad_norm_(parameters, limit)
        optimizer.step()
        clamp_logit_scale(logit_scale)
        losses.append(loss.item())

        done, ends_epoch = step + 1, (step + 1) % steps_per_epoch == 0
        last = done == num_steps
        every = config.validate_every
        validate = validation is not None and (
            last or (every > 0 and ends_epoch and done // steps_per_epoch % every == 0)
        )
        if done % config.log_every and not validate and not last:
            continue
        elapsed = time.perf_counter() - started - aside
        entry: dict[str, Any] = {
            "step": done,
            "epoch": batch.epoch + 1,
            "loss": sum(losses) / len(losses),
            "lr": optimizer.param_groups[0]["lr"],
            "logit_scale": logit_scale.exp().item(),
            "grad_norm": norm.item(),
            "images_per_second": done * config.batch_size / elapsed,
        }
        losses = []
        minutes, seconds = divmod(round(elapsed / done * (num_steps - done)), 60)
        print(
            f"step {done}/{num_steps}  epoch {entry['epoch']}  loss {entry['loss']:.3f}  "
            f"{entry['images_per_second']:.0f} images/s  {minutes}:{seconds:02d} left",
            flush=True,
        )
        if validation is not None and validate:
            before = time.perf_counter()
            entry["validation"] = validation.measure(model)
            aside += time.perf_counter() - before
            shown = (f"{name} {value:.3f}" for name, value in entry["validation"].items())
            print(f"  {config.val_split}: {'  '.join(shown)}", flush=True)
        history.append(entry)
        write(json.dumps(entry) + "\n")
    model.eval()
    return history


def _record(
    config: PretrainConfig, manifest: Manifest, architecture: dict[str, Any]
) -> dict[str, Any]:
    """Everything that changes the result, as plain JSON values."""
    record = config.record()
    for name in ("out", "restart", "log_every", "device"):
        del record[name]
    for name in ("ram_budget_gib", "num_readers"):
        del record["images"][name]
    values = {"config": record, "dataset": manifest.identity.record(), "architecture": architecture}
    plain: dict[str, Any] = json.loads(json.dumps(values))
    return plain


def _summary(
    config: PretrainConfig, history: list[dict[str, Any]], num_images: int, store: ImageStore
) -> dict[str, Any]:
    last = history[-1]
    return {
        "steps": last["step"],
        "epochs": last["epoch"],
        "images": num_images - len(store.problems),
        "images_per_second": last["images_per_second"],
        "seconds": last["step"] * config.batch_size / last["images_per_second"],
        "loss": last["loss"],
        "loss_of_chance": math.log(config.batch_size),
        "logit_scale": last["logit_scale"],
        "unreadable": dict(store.problems),
    }


def _draw(file: Path, history: list[dict[str, Any]], config: PretrainConfig) -> None:
    """The loss over the steps, with the loss of a model that knows nothing; accuracies below."""
    measured = [entry for entry in history if "validation" in entry]
    figure = Figure(figsize=(7, 6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    top.plot([e["step"] for e in history], [e["loss"] for e in history], label="training loss")
    top.axhline(math.log(config.batch_size), color="grey", linestyle=":", label="chance")
    top.set_ylabel("InfoNCE, nats")
    top.legend()
    for name in ("zero_shot_top1", "image_to_text_recall_at_1", "image_to_text_recall_at_5"):
        points = [(e["step"], e["validation"][name]) for e in measured if name in e["validation"]]
        if points:
            bottom.plot(*zip(*points, strict=True), marker="o", label=name.replace("_", " "))
    bottom.set_ylim(0, 1)
    bottom.set_xlabel("optimizer step")
    bottom.set_ylabel(f"share of {config.val_split or 'val'}")
    if measured:
        bottom.legend()
    figure.suptitle(f"{config.architecture} on {config.dataset.kind}")
    figure.savefig(file, dpi=120)


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "open_clip_torch", "featcache")}


if __name__ == "__main__":
    run_job(PretrainConfig, run)
