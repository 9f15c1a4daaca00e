"""Job: heads behind a frozen dual encoder, trained by a contrastive loss on cached vectors alone.

    python -m finetune.project --cache cache/photos --out adapted/photos

No image is decoded and no tower runs: an epoch takes seconds. The result is an adapted backbone
that every job opens by its path (`--backbone adapted --backbone.model adapted/photos`), and
`featcache.finish` turns the cache into one of it.
"""

import functools
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor, nn

from featcache.adapter_folder import write_adapter
from featcache.adapters.projection import Projection, ProjectionConfig
from featcache.backbones.base import Backbone
from featcache.class_text import class_text_features, open_cache_backbone, recorded_backbone
from featcache.config import Config, run_job
from featcache.precision import resolve_device
from featcache.prompts import choose_zero_shot, expand
from featcache.reader import Cache, open_cache
from featcache.reporting.style import MUTED, PALETTE, dress, figure
from featcache.storage import CachePath
from finetune.checkpoint import LAST, read_state, save_state, seed_all
from finetune.contrastive.pair_features import PairFeatures, PairMeasure, PairRows, choose_pairs
from finetune.losses import AnyPairLoss, PairLossConfig
from finetune.losses.info_nce import InfoNceConfig
from finetune.optim import AdamWConfig
from finetune.output import is_finished, resumable
from heads.optim import set_lr
from heads.run_folder import RunError, read_json, versions, write_json
from heads.watch import EarlyStop

RECORD = "project.json"
"""What a finished folder was made from."""

BATCH, MIN_STEPS = 2048, 4
"""Images a step, and steps an epoch that a small split is cut into at least."""

SAVE_SECONDS = 10.0
"""Time between two saved states."""

_FREE = ("out", "restart", "device", "quiet")
"""Options that do not change what is computed."""


class ProjectConfig(Config):
    """Train heads behind a dual encoder's projections on cached image and caption features."""

    cache: CachePath
    """Cache with image/projected and text/projected, of a dataset with captions."""
    adapter: ProjectionConfig = ProjectionConfig()
    """The heads."""
    out: Path
    """Folder for the result: an adapted backbone, metrics and curves."""
    restart: bool = False
    """Train anew and replace a finished or interrupted result in `out`."""
    loss: AnyPairLoss = Field(default=InfoNceConfig(), discriminator="kind")
    """Contrastive loss: info_nce or siglip."""
    optim: AdamWConfig = AdamWConfig(lr=1e-3, warmup=0.1)
    """Optimizer and schedule."""
    epochs: PositiveInt = 50
    """Most passes over the training images, a random caption of each."""
    batch_size: int | None = Field(default=None, ge=2)
    """Distinct images a step, the number of negatives plus one, at most all of them; unset = 2048,
    or the largest power of two that makes four steps an epoch of a small split."""
    patience: PositiveInt | None = 10
    """Stop after this many epochs in a row without a better mean recall; unset = run all."""
    train_split: str = "train"
    """Split that is trained on."""
    val_split: str | None = None
    """Split that picks the epoch; unset = val if there is one, otherwise carved out of train."""
    val_fraction: float = Field(default=0.1, gt=0, lt=1)
    """Share of the training images that carving takes, 0..1; by their ids."""
    templates: list[str] | None = None
    """Zero-shot prompts, names of sets or format strings over the class table's columns, of caches
    with one label an image; unset = the set that suits the dataset."""
    device: str = "auto"
    """auto (the GPU if there is one), cpu or cuda:N."""
    seed: NonNegativeInt = 0
    """Fixes initial weights, order, captions, views and carved rows."""
    quiet: bool = False
    """Print nothing but warnings and errors."""


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


def run(config: ProjectConfig) -> Report:
    """Trains the heads and writes them, or finds them finished.

    Raises:
        UserError: one line with what was found, what was expected and what to do.
    """
    cache = open_cache(config.cache)
    record = {k: v for k, v in config.record().items() if k not in _FREE}
    record = json.loads(json.dumps({"config": record, "cache": cache.fingerprint}))
    if is_finished(config.out, record, config.restart, RECORD):
        if not config.quiet:
            print(f"{config.out}: trained already with this configuration (--restart redoes)")
        return Report(config.out, read_json(config.out / "metrics.json"), reused=True)
    with resumable(config.out, record, config.restart, RECORD) as folder:
        metrics = _project(config, cache, folder)
        (folder / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
        write_json(folder / "metrics.json", metrics)
        write_json(folder / RECORD, {**record, "versions": versions()})
        (folder / LAST).unlink(missing_ok=True)
    if not config.quiet:
        print(summary(metrics))
        print(f"written to {config.out}: --backbone adapted --backbone.model {config.out}")
    return Report(config.out, metrics)


def _project(config: ProjectConfig, cache: Cache, folder: Path) -> dict[str, Any]:
    """Trains, measures and fills the folder; returns the metrics."""
    device = resolve_device(config.device)
    train, val, test = choose_pairs(
        cache, config.train_split, config.val_split, config.val_fraction, config.seed
    )
    backbone = open_cache_backbone(cache)
    torch.manual_seed(config.seed)
    adapter = config.adapter.attach(backbone.trainable())
    _begin(adapter, backbone, config.loss)
    adapter.to(device)
    prompts = _class_prompts(config, cache, backbone)
    measures = [
        PairMeasure(cache, part, device, prompts) for part in (val, test) if part is not None
    ]
    before = {one.name: one(nn.Identity(), nn.Identity()) for one in measures}
    history = _fit(config, adapter, cache, train, measures[0], before[val.name], folder)
    after = {one.name: one(adapter.image.eval(), adapter.text.eval()) for one in measures}
    write_adapter(folder, recorded_backbone(cache), backbone, config.adapter, adapter.state())
    with (folder / "history.jsonl").open("w", encoding="utf-8") as log:
        log.writelines(json.dumps(line) + "\n" for line in history)
    _draw(folder / "curves.png", history, before[val.name])
    best = max(history, key=lambda line: (line["mean_recall"], -line["epoch"]))
    return {
        "before": before,
        "after": after,
        "best_epoch": best["epoch"],
        "epochs": history[-1]["epoch"],
        "batch_size": _batch_size(config, len(train)),
        "num_train_images": len(train),
        "num_parameters": sum(t.numel() for t in adapter.state().values()),
        "seconds": history[-1]["seconds"],
        "pairs_per_second": history[-1]["pairs_per_second"],
        "logit_scale": adapter.logit_scale.detach().exp().item(),
        "device": str(device),
    }


def _begin(adapter: Projection, backbone: Backbone, loss: PairLossConfig) -> None:
    """Scale and bias that suit the loss: those of the backbone, if it was trained with such one."""
    biased = loss.initial_bias is not None
    adapter.logit_bias.requires_grad_(biased)
    if biased and not isinstance(getattr(backbone.trainable().model, "logit_bias", None), Tensor):
        assert loss.initial_bias is not None
        adapter.logit_scale.data.fill_(loss.initial_scale)
        adapter.logit_bias.data.fill_(loss.initial_bias)


def _class_prompts(config: ProjectConfig, cache: Cache, backbone: Backbone) -> Tensor | None:
    """(T, C, P) class text features of the backbone; None without classes to tell apart."""
    if cache.task != "single_label" or cache.num_classes < 2:
        return None
    kind = cache.identity.dataset.kind
    names = config.templates or [choose_zero_shot(kind, list(cache.classes.columns))]
    found = class_text_features(cache, expand(names), lambda: backbone)
    return torch.from_numpy(found)


def _fit(
    config: ProjectConfig,
    adapter: Projection,
    cache: Cache,
    train: PairRows,
    measure: PairMeasure,
    before: dict[str, float],
    folder: Path,
) -> list[dict[str, Any]]:
    """The loop; leaves the best epoch's tensors in `adapter` and returns a line an epoch.

    Epoch 0 is the beginning: heads that change nothing at first are given back as they were if no
    epoch is better.
    """
    pairs = PairFeatures(cache, train.rows, adapter.logit_scale.device)
    batch_size = _batch_size(config, len(pairs))
    steps = len(pairs) // batch_size
    optimizer = config.optim.build(adapter)
    factor = config.optim.lr_factor(config.epochs * steps)
    parameters = [*adapter.trained_parameters().values()]
    bias = adapter.logit_bias if adapter.logit_bias.requires_grad else None
    stop = EarlyStop(config.patience)
    best, live = _copied(adapter), functools.partial(adapter.state)
    history: list[dict[str, Any]] = []
    if (folder / LAST).is_file():
        state = read_state(folder / LAST)
        state.restore({"adapter": live()}, optimizer)
        best, history = state.tensors["best"], state.values["history"]
        stop.restore(state.values["stop"])
        if not config.quiet:
            print(f"going on after epoch {history[-1]['epoch']}")
    else:
        start = measure(adapter.image.eval(), adapter.text.eval())
        history.append({"epoch": 0, "seconds": 0.0, "pairs_per_second": 0.0, **start})
        stop.see(start["mean_recall"])
    if not config.quiet:
        num = sum(p.numel() for p in parameters if p.requires_grad)
        print(
            f"{num:,} parameters in training on {adapter.logit_scale.device}; {len(pairs):,} "
            f"images with {pairs.offsets[-1]:,} captions, {steps} steps of {batch_size} an epoch; "
            f"mean recall of {measure.name} before {before['mean_recall']:.4f}"
        )
    aside = history[-1]["seconds"]
    started = saved = time.perf_counter()
    for epoch in range(history[-1]["epoch"], config.epochs):
        if stop.is_due:
            break
        seed_all(config.seed, epoch)  # for dropout
        adapter.train()
        total, began = torch.zeros((), device=adapter.logit_scale.device), time.perf_counter()
        for step, (images, texts) in enumerate(pairs.batches(batch_size, config.seed, epoch)):
            set_lr(optimizer, factor(epoch * steps + step))
            one, other = F.normalize(adapter.image(images)), F.normalize(adapter.text(texts))
            loss = config.loss.loss(one, other, adapter.logit_scale, bias)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            if config.optim.clip_norm:
                nn.utils.clip_grad_norm_(parameters, config.optim.clip_norm)
            optimizer.step()
            config.loss.clamp(adapter.logit_scale)
            total += loss.detach()
        mean = total.item() / steps
        if not torch.isfinite(total):
            raise RunError(f"epoch {epoch + 1}: the loss is {mean}; lower optim.lr")
        rate = steps * batch_size / (time.perf_counter() - began)
        line = {"epoch": epoch + 1, "loss": mean, "pairs_per_second": rate}
        line |= measure(adapter.image.eval(), adapter.text.eval())
        line["seconds"] = aside + time.perf_counter() - started
        stop.see(line["mean_recall"])
        history.append(line)
        if stop.bad_epochs == 0:
            best = _copied(adapter)
        if not config.quiet:
            left = (config.epochs - epoch - 1) * (line["seconds"] / (epoch + 1))
            print(
                f"epoch {epoch + 1}/{config.epochs}  loss {mean:.3f}  {measure.name} mean recall "
                f"{line['mean_recall']:.4f}{'  best' * (stop.bad_epochs == 0)}  {rate:,.0f} "
                f"pairs/s  {left:.0f} s left",
                flush=True,
            )
        if time.perf_counter() - saved > SAVE_SECONDS:
            save_state(
                folder / LAST,
                tensors={"adapter": live(), "best": best},
                optimizer=optimizer,
                values={"history": history, "stop": stop.record()},
            )
            saved = time.perf_counter()
    adapter.load(best)
    return history


def _batch_size(config: ProjectConfig, num_images: int) -> int:
    fitting = 2 ** int(math.log2(max(num_images / MIN_STEPS, 2)))
    return min(config.batch_size or min(BATCH, fitting), num_images)


def _copied(adapter: Projection) -> dict[str, Tensor]:
    return {name: t.detach().cpu().clone() for name, t in adapter.state().items()}


def summary(metrics: dict[str, Any]) -> str:
    """Before and after on every measured split, in percent."""
    lines = [
        f"best epoch {metrics['best_epoch']} of {metrics['epochs']}, {metrics['seconds']:.1f} s, "
        f"{metrics['num_parameters']:,} parameters"
    ]
    for split, before in metrics["before"].items():
        lines.append(f"{split:<28}{'before':>8}{'after':>8}")
        lines += [
            f"  {name:<26}{100 * value:>8.2f}{100 * metrics['after'][split][name]:>8.2f}"
            for name, value in before.items()
        ]
    return "\n".join(lines)


def _draw(file: Path, history: list[dict[str, Any]], before: dict[str, float]) -> None:
    """Training loss above; below, recalls at 1, 5 and 10 (mean of both ways), before as dots."""
    made = figure(7, 6)
    top, bottom = made.subplots(2, 1, sharex=True)
    trained = [line for line in history if "loss" in line]
    top.plot([e["epoch"] for e in trained], [e["loss"] for e in trained], color=PALETTE[0], lw=2)
    dress(top, "Training loss, nats")
    for color, k in zip(PALETTE, (1, 5, 10), strict=False):
        names = [f"{way}_recall_at_{k}" for way in ("image_to_text", "text_to_image")]
        if any(name not in before for name in names):
            continue  # a split of fewer than k images
        values = [100 * sum(line[name] for name in names) / 2 for line in history]
        epochs = [line["epoch"] for line in history]
        bottom.plot(epochs, values, color=color, lw=2)
        start = 100 * sum(before[n] for n in names) / 2
        bottom.plot([0, epochs[-1]], [start, start], color=color, ls=":", lw=1.4)
        bottom.annotate(f" R@{k}", (epochs[-1], values[-1]), color=color, fontsize=9.5, va="center")
    dress(bottom, "Validation recall, %: both ways averaged; dotted: before")
    bottom.set_xlabel("epoch", color=MUTED, fontsize=9.5)
    bottom.margins(x=0.08)
    made.savefig(file)


if __name__ == "__main__":
    run_job(ProjectConfig, run)
