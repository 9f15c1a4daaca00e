"""Job: image-caption pairs to a dual encoder, trained by InfoNCE or SigLIP's loss.

    python -m finetune.pretrain --dataset garden --out backbones/garden
    torchrun --nproc-per-node 4 -m finetune.pretrain --config finetune/configs/coco_rn50_6.yaml

From random weights or, with `--init`, from those of a dual encoder that is there. The result is a
folder in open_clip's `local-dir` format, beside it the configuration, the metrics and the loss
curve. It appears in one piece: a folder that exists is complete. What an interrupted run has
reached is in `OUT.partial`; the same command goes on from there, bit for bit.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from featcache.backbones.base import PixelSpec
from featcache.backbones.local_dir import save_local_dir
from featcache.config import run_job
from featcache.errors import ConfigError
from featcache.manifest import Manifest
from featcache.precision import fastest_precision
from finetune.contrastive.architectures import image_size, tokenizer, with_logits
from finetune.contrastive.checkpoints import (
    checkpoints,
    forget_half_written,
    read_checkpoint,
    weights_of,
    write_checkpoint,
)
from finetune.contrastive.config import PretrainConfig
from finetune.contrastive.gradient_cache import batch_norms
from finetune.contrastive.loop import Progress, Rhythm, Training, train
from finetune.contrastive.pair_stream import PairStream
from finetune.contrastive.pairs import Pairs, pairs_of
from finetune.contrastive.pictures import draw_curves
from finetune.contrastive.starting_weights import Start, start_of
from finetune.contrastive.text import TokenTable, UsedVocabulary, can_shorten
from finetune.contrastive.validation import Validation
from finetune.images.loading import Images
from finetune.images.training_images import TrainingImages
from finetune.output import RECORD, is_finished, resumable
from finetune.recompute import recompute_blocks
from heads.distributed import Group, ending_at_once, group_for
from heads.run_folder import read_json, versions, write_history, write_json

__all__ = ["PretrainConfig", "Report", "run"]

NORMALIZATIONS = {
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "coco": ((0.4225, 0.4012, 0.3659), (0.2681, 0.2635, 0.2763)),
}
"""Mean and standard deviation per channel, in units of 0..1."""

SAMPLE = 2048
"""Images that the statistics of a dataset are taken from."""


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
    """Trains the dual encoder and writes it, or finds it finished; goes on with an interrupted run.

    Raises:
        UserError: one line with what was found, what was expected and what to do.
    """
    with group_for(config.device) as group:
        if config.batch_size % group.size:
            raise ConfigError(
                f"batch_size: {config.batch_size} images a step cannot be shared equally by "
                f"{group.size} processes; choose a multiple of {group.size}"
            )
        start = start_of(config.init, config.architecture, config.image_size, config.context_length)
        loss = config.loss
        architecture = with_logits(start.architecture, loss.initial_scale, loss.initial_bias)
        manifest = config.dataset.open() if group.leads else None
        group.follow(None)  # the others wait: opening a dataset may write it
        manifest = manifest or config.dataset.open()
        record = _record(config, manifest, architecture, start)
        if group.follow(group.leads and is_finished(config.out, record, config.restart)):
            if group.leads:
                print(
                    f"{config.out}: already pretrained with this configuration, reused (--restart "
                    "to redo)"
                )
            return Report(config.out, read_json(config.out / "metrics.json"), reused=True)
        with _folder(config, record, group) as folder:
            metrics = _pretrain(config, manifest, start, architecture, folder, group)
            if group.leads:
                (folder / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
                write_json(folder / "metrics.json", metrics)
                write_json(folder / RECORD, {**record, "versions": versions()})
        group.follow(None)
    if group.leads:
        print(f"written to {config.out}: open it as local-dir:{config.out}")
    return Report(config.out, metrics, reused=False)


@contextmanager
def _folder(config: PretrainConfig, record: dict[str, Any], group: Group) -> Iterator[Path]:
    """The folder that the run works in; the first process makes it the result at the end."""
    if not group.leads:
        yield group.follow(config.out)
        return
    with resumable(config.out, record, config.restart) as folder:
        forget_half_written(folder)
        yield group.follow(folder)


def _pretrain(
    config: PretrainConfig,
    manifest: Manifest,
    start: Start,
    architecture: dict[str, Any],
    folder: Path,
    group: Group,
) -> dict[str, Any]:
    """Trains, validates and saves into `folder`; returns the metrics."""
    device, precision = group.device, config.precision
    if precision == "auto":
        precision = fastest_precision(device)
    if precision == "fp16" and config.strategy == "fsdp":
        raise ConfigError(
            "strategy: fsdp has no loss scaling for fp16; set precision bf16 or fp32, or strategy "
            "ddp"
        )
    torch.manual_seed(config.seed)
    model = start.model(architecture).to(device).to(memory_format=torch.channels_last)
    size, tokenize = image_size(model), tokenizer(architecture)
    if config.gradient_checkpointing:
        recompute_blocks(model)

    pairs = pairs_of(manifest, config.train_split)
    if len(pairs) < config.batch_size:
        raise ConfigError(
            f"batch_size: {config.batch_size} images a step, but {config.train_split} has only "
            f"{len(pairs)} images with captions; lower batch_size"
        )
    spec = _pixels(config, start, size, pairs)
    texts = TokenTable.of(pairs.texts, tokenize)
    tables = [texts]
    validation = None
    if config.val_split:
        captions, prompts = Validation.tables(manifest, config.val_split, config.prompt, tokenize)
        tables += [captions, prompts]
    vocabulary = None
    if can_shorten(model) and config.strategy == "ddp":
        vocabulary = UsedVocabulary(model, np.concatenate([t.ids.ravel() for t in tables]))
        tables = [vocabulary.compact(table) for table in tables]
    with TrainingImages(
        pairs.root, pairs.paths, spec, config.augmentation, config.loading, device
    ) as images:
        if config.val_split and group.leads:
            validation = Validation.open(
                manifest, config.val_split, tables[1], tables[2], spec, config.loading, device
            )
        training = Training(
            model,
            tables[0],
            images,
            config.loss,
            config.optim,
            group=group,
            strategy=config.strategy,
            precision=precision,
            accumulate=config.accumulate,
        )
        progress, problems = Progress(), images.images.problems
        if held := group.follow(checkpoints(folder)):
            progress, known = read_checkpoint(held[-1], training, vocabulary)
            problems.update(known)
        if group.leads:
            _tell(config, start, training, pairs, precision, images, progress)

        def save(progress: Progress) -> None:
            write_checkpoint(
                folder,
                training,
                vocabulary,
                progress,
                architecture,
                spec,
                config.keep_checkpoints,
                problems,
            )

        def validate() -> dict[str, float]:
            measured = model
            if config.strategy == "fsdp":  # shards cannot be called tower by tower
                whole = weights_of(training, None)
                if group.leads:
                    measured = start.model(architecture).to(device)
                    measured.load_state_dict(whole)
            return group.follow({} if validation is None else validation.measure(measured))

        steps_per_epoch = len(pairs) // config.batch_size
        rhythm = Rhythm(
            config.steps or config.epochs * steps_per_epoch,
            steps_per_epoch,
            config.log_every,
            config.validate_every,
            config.validate_steps,
            config.save_every,
        )
        stream = PairStream(
            pairs,
            images,
            batch_size=config.batch_size,
            seed=config.seed,
            group=group,
            first_step=progress.step,
            num_steps=rhythm.num_steps,
        )
        log = folder / "history.jsonl"
        if group.leads:
            write_history(log, progress.history)

        def record(entry: dict[str, Any]) -> None:
            with log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")

        train(
            training,
            stream,
            rhythm,
            progress,
            config.seed,
            validate=validate if config.val_split else None,
            save=save,
            record=record,
        )
        weights = weights_of(training, vocabulary)
    if group.leads:
        for path, reason in list(problems.items())[:10]:
            print(f"unreadable, left out: {path}: {reason}")
        save_local_dir(folder, weights, architecture, spec)
        draw_curves(
            folder / "curves.png",
            progress.history,
            f"{start.name} on {config.dataset.kind}",
            config.loss.of_chance(config.batch_size),
            config.loss.kind,
        )
        if config.save_every is None:
            for checkpoint in checkpoints(folder):
                shutil.rmtree(checkpoint)
    if validation is not None:
        validation.images.close()
    return _summary(config, progress, len(pairs), problems, device)


def _pixels(config: PretrainConfig, start: Start, size: tuple[int, int], pairs: Pairs) -> PixelSpec:
    """Preprocessing of the towers; what the weights were trained with, if there are any."""
    if start.pixels is not None and config.normalization == "clip":
        return start.pixels
    mean, std = NORMALIZATIONS.get(config.normalization, NORMALIZATIONS["clip"])
    spec = replace(start.pixels or PixelSpec(size, mean, std), mean=mean, std=std)
    if config.normalization == "dataset":
        found = _statistics(pairs, spec, config)
        spec = replace(spec, mean=found[0], std=found[1])
    return spec


def _statistics(
    pairs: Pairs, spec: PixelSpec, config: PretrainConfig
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation per channel of at most `SAMPLE` training images, in units of 0..1."""
    which = np.sort(np.random.default_rng(config.seed).permutation(len(pairs))[:SAMPLE])
    with Images(pairs.root, pairs.paths, spec, None, config.loading) as images:
        pixels, _ = images.take(which)
    values = pixels.transpose(0, 1).flatten(1).double() / 255.0
    mean, std = values.mean(dim=1), values.std(dim=1).clamp(min=1e-3)
    return tuple(mean.round(decimals=6).tolist()), tuple(std.round(decimals=6).tolist())


def _tell(
    config: PretrainConfig,
    start: Start,
    training: Training,
    pairs: Pairs,
    precision: str,
    images: TrainingImages,
    progress: Progress,
) -> None:
    num_parameters = sum(parameter.numel() for parameter in training.model.parameters())
    together = f" × {training.group.size} processes" if training.group.size > 1 else ""
    print(
        f"{start.name}: {num_parameters / 1e6:.2f} M parameters in training, {precision} on "
        f"{training.group.device}{together}; {len(pairs)} images, {len(pairs.texts)} distinct "
        f"captions, {'kept in memory' if images.images.in_memory else 'decoded batch by batch'}"
    )
    if pairs.num_without:
        print(f"{pairs.num_without} images of {config.train_split} have no caption: left out")
    if norms := batch_norms(training.model) if config.accumulate > 1 else []:
        own = config.batch_size // training.group.size // config.accumulate
        print(
            f"batch normalisation ({len(norms)} layers) sees {own} images at a time: accumulate "
            "keeps the negatives, but is another model than one piece would be"
        )
    if progress.step:
        print(f"going on after step {progress.step} of an interrupted run", flush=True)


def _record(
    config: PretrainConfig, manifest: Manifest, architecture: dict[str, Any], start: Start
) -> dict[str, Any]:
    """Everything that changes the result, as plain JSON values."""
    record = config.record()
    for name in ("out", "restart", "log_every", "device", "save_every", "keep_checkpoints"):
        del record[name]
    for name in ("architecture", "init", "strategy"):  # what they lead to is told by the rest
        del record[name]
    for name in ("ram_budget_gib", "num_readers", "num_workers"):
        del record["loading"][name]
    values = {
        "config": record,
        "dataset": manifest.identity.record(),
        "architecture": architecture,
        "init": start.weights,
    }
    plain: dict[str, Any] = json.loads(json.dumps(values))
    return plain


def _summary(
    config: PretrainConfig,
    progress: Progress,
    num_images: int,
    problems: Mapping[str, str],
    device: torch.device,
) -> dict[str, Any]:
    last = progress.history[-1]
    metrics = {
        "steps": last["step"],
        "epochs": last["epoch"],
        "images": num_images - len(problems),
        "images_per_second": last["images_per_second"],
        "waited": last["waited"],
        "seconds": progress.seconds,
        "loss": last["loss"],
        "loss_of_chance": config.loss.of_chance(config.batch_size),
        "logit_scale": last["logit_scale"],
        "unreadable": dict(problems),
    }
    if "logit_bias" in last:
        metrics["logit_bias"] = last["logit_bias"]
    if device.type == "cuda":
        metrics["peak_memory_bytes"] = torch.cuda.max_memory_allocated(device)
    if "validation" in last:
        metrics["validation"] = last["validation"]
    return metrics


if __name__ == "__main__":
    with ending_at_once():
        run_job(PretrainConfig, run)
