"""Training a head on features that are already there: the loop, readable from top to bottom."""

import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from heads import optim as optimisation
from heads import run_folder
from heads.averaging import WeightAverage
from heads.base import Head
from heads.checkpoint import (
    CHECKPOINT,
    NOTHING,
    Best,
    Training,
    better,
    copied_state,
    restore_state,
    save_state,
)
from heads.data import FeatureTables
from heads.distributed import Group
from heads.evaluate import score_candidates
from heads.event_file import EventFile
from heads.optim import OptimConfig
from heads.parts import Part
from heads.progress import ProgressLine, duration
from heads.run_folder import RunError
from heads.watch import EarlyStop, Plateau

SAVE_SECONDS = 10.0
"""Time between two saved states, if the user names no number of epochs."""

SAVE_SHARE = 20
"""At least this many times as long as the last one took: saving gigabytes costs 5 % at most."""


@dataclass(frozen=True)
class Material:
    """Features and targets of the rows that train and of those that decide."""

    train: FeatureTables
    train_part: Part
    val: FeatureTables
    val_part: Part


@dataclass(frozen=True)
class Fitted:
    """What a training came to.

    Attributes:
        best: the best model by validation.
        last: the trained tensors of the same candidate as they were at the end.
        history: one record an epoch.
    """

    best: Best
    last: Mapping[str, Tensor]
    history: list[dict[str, Any]]


def fit(
    head: Head,
    material: Material,
    optim: OptimConfig,
    *,
    folder: Path,
    fingerprint: str,
    metric: str,
    seed: int,
    group: Group | None = None,
    stop: EarlyStop | None = None,
    stop_on: Literal["metric", "loss"] = "metric",
    save_every: int | None = None,
    events: bool = False,
    quiet: bool = True,
) -> Fitted:
    """Trains `head` in place.

    After every `save_every` epochs the whole state is on disk. Order of rows and all random numbers
    of an epoch follow from (seed, epoch), so that a resumed training repeats an uninterrupted one
    bit for bit.

    Args:
        head: on the device of the material.
        material: what to train on and what to decide by.
        optim: resolved.
        folder: run folder; an interrupted training in it is gone on with.
        fingerprint: of the cache that the material comes from.
        metric: name of the deciding metric, for records and progress.
        seed: of row order and random numbers.
        group: processes that train together; None = this one alone.
        stop: when to stop early; None = never.
        stop_on: what early stopping and the plateau schedule look at: the metric, or the
            cross-entropy of the validation rows.
        save_every: epochs between two saved states; None = by `SAVE_SECONDS`.
        events: write TensorBoard event files as well.
        quiet: show no progress.

    Raises:
        RunError: if a loss is NaN or infinite, with the optimiser step; if no epoch could be
            picked; if a batch does not fit into memory.
    """
    table, device = material.train, material.train.device
    group = group or Group(0, 1, device)
    batch_size = optim.batch_size
    assert isinstance(batch_size, int), "not resolved"
    assert optim.epochs is not None, "not resolved"
    num_rows, num_steps = len(table), optim.num_steps(len(table))
    factor = optimisation.lr_factor(optim.schedule, num_steps)
    mixed, scaler = mixed_precision(optim.precision, device)
    training = Training(
        head,
        optimisation.build(optim, head),
        scaler,
        WeightAverage(head, optim.ema_decay) if optim.ema_decay else None,
        stop or EarlyStop(),
        Plateau(optim.schedule),
    )
    optimizer, average, plateau = training.optimizer, training.average, training.plateau
    targets = torch.from_numpy(material.train_part.targets).to(device)  # multi-hot: a byte each
    if (folder / CHECKPOINT).is_file():
        restore_state(run_folder.read_tensors(folder / CHECKPOINT), training, fingerprint)
    history = training.history
    compute = torch.compile(head.loss) if optim.compile else head.loss
    progress = ProgressLine(quiet or not group.leads)
    writer = EventFile(folder, history) if events and group.leads else None
    first_epoch, started = len(history), time.perf_counter()
    saved, pause = started, SAVE_SECONDS
    step = first_epoch * (num_steps // optim.epochs)
    for epoch in range(first_epoch, optim.epochs):
        if training.stop.is_due:
            break
        epoch_started = time.perf_counter()
        generator = torch.Generator().manual_seed(_mixed(seed, epoch))
        torch.manual_seed(_mixed(seed, epoch, *([group.rank] if group.rank else [])))
        order = torch.randperm(num_rows, generator=generator).to(table.index_device)
        views = None
        if table.num_views > 1:
            views = torch.randint(table.num_views, (num_rows,), generator=generator)
            views = views.to(table.index_device)
        head.train()
        factors = head.lr_factors()
        losses: dict[str, list[Tensor]] = {}
        for start in range(0, num_rows, batch_size):
            own, divisor = group.share(order[start : start + batch_size])
            optimizer.zero_grad(set_to_none=True)
            means: dict[str, Tensor] = {}
            num_pieces = min(optim.accumulate, len(own))
            for piece in own.tensor_split(num_pieces) if num_pieces > 1 else (own,):
                features = table.batch(piece, None if views is None else views[piece])
                wanted = targets[piece.to(device)]
                wanted = wanted.float() if wanted.ndim == 2 else wanted
                with mixed:
                    parts = compute(features, wanted, step / num_steps)
                if len(piece) < divisor:  # its part of the mean over the whole batch
                    parts = {name: v * (len(piece) / divisor) for name, v in parts.items()}
                scaler.scale(parts["loss"]).backward()  # type: ignore[no-untyped-call]
                for name, part in parts.items():
                    part = part.detach()
                    means[name] = means[name] + part if name in means else part
            for name, mean in means.items():
                losses.setdefault(name, []).append(mean)
            group.sum_gradients(head)
            optimisation.set_lr(optimizer, factor(step) * plateau.scale, factors, plateau.min_lr)
            if optim.clip_norm is not None:
                scaler.unscale_(optimizer)
                optimisation.clip(head, optim.clip_norm)
            scaler.step(optimizer)
            scaler.update()
            step += 1
            if average is not None:
                average.update(step)
        epoch_means = _epoch_means(losses, step, group)
        group.follow_buffers(head)
        head.eval()
        with nullcontext() if average is None else average.applied():
            scores = None
            if group.leads:
                scores = score_candidates(
                    head, material.val, material.val_part, with_loss=stop_on == "loss"
                )
            scores = group.follow(scores)
            assert scores is not None, "the leading process has scores"
            value = max(scores.candidates.values())
            if head.selectable:
                training.best = better(training.best, scores.candidates, head, epoch + 1)
        if head.selectable:
            for watch in (training.stop, plateau):
                watch.see(-scores.loss if scores.loss is not None else value)
        head.after_epoch(scores.all)
        now = time.perf_counter()
        history.append(
            {
                "epoch": epoch + 1,
                "step": step,
                **epoch_means,
                f"val_{metric}": value,
                **({} if scores.loss is None else {"val_loss": scores.loss}),
                **({"monitors": scores.monitors} if scores.monitors else {}),
                "lr": max(group["lr"] for group in optimizer.param_groups),
                "seconds": now - epoch_started,
            }
        )
        if writer is not None:
            writer.add(history[-1])
        due = (epoch + 1) % save_every == 0 if save_every else now - saved >= pause
        if due and epoch + 1 < optim.epochs and group.leads:
            run_folder.write_history(folder / "history.jsonl", history)
            save_state(folder / CHECKPOINT, training, fingerprint)
            saved = time.perf_counter()
            pause = max(SAVE_SECONDS, SAVE_SHARE * (saved - now))
        left = (now - started) / (epoch + 1 - first_epoch) * (optim.epochs - epoch - 1)
        shown = epoch_means.get("best_loss", epoch_means["loss"])
        best = f"best {training.best.value:.2%}" if training.best.epoch else "none to pick yet"
        progress.show(
            f"epoch {epoch + 1}/{optim.epochs}  loss {shown:.4f}  "
            f"val {metric} {value:.2%} ({best})  "
            f"{num_rows / (now - epoch_started):,.0f} rows/s  {duration(left)} left"
        )
    progress.close()
    if not training.best.epoch:
        raise RunError(
            f"none of {len(history)} epochs ended with a model to pick: the head was not through "
            "the stages before its last; raise optim.epochs"
        )
    if group.leads:
        run_folder.write_history(folder / "history.jsonl", history)
    with nullcontext() if average is None else average.applied():
        return Fitted(training.best, copied_state(head, training.best.candidate), history)


def mixed_precision(
    precision: Literal["auto", "fp32", "bf16", "fp16"], device: torch.device
) -> tuple[AbstractContextManager[None], torch.amp.GradScaler]:
    """The context of forward pass and loss, and what scales the loss; both idle for float32."""
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    mixed: AbstractContextManager[None] = nullcontext()  # idle autocast costs 10 us a step
    if precision != "fp32":
        dtype = torch.float16 if precision == "fp16" else torch.bfloat16
        mixed = torch.autocast(device.type, dtype)
    return mixed, torch.amp.GradScaler(device.type, enabled=precision == "fp16")


def untrained(head: Head, material: Material) -> Fitted:
    """The better of the candidates of a head that has nothing to train."""
    scores = score_candidates(head, material.val, material.val_part)
    best = better(NOTHING, scores.candidates, head, 0)
    return Fitted(best, best.state, [])


def _epoch_means(losses: Mapping[str, list[Tensor]], step: int, group: Group) -> dict[str, float]:
    """Mean of each part of the loss; looks at the device once an epoch, not once a step.

    Args:
        losses: of each step of the epoch, what this process adds to the mean over the batch.
        step: optimiser steps so far.
        group: the processes that each have their own share.
    """
    columns = {n: group.sum(torch.stack(values).double()).cpu() for n, values in losses.items()}
    bad = ~torch.isfinite(columns["loss"])
    if bad.any():
        first = step - len(bad) + int(bad.nonzero()[0]) + 1
        raise RunError(
            f"the loss is {columns['loss'][bad][0].item()} at optimiser step {first}; lower "
            "optim.lr or set optim.clip_norm"
        )
    return {name: float(values.mean()) for name, values in columns.items()}


@contextmanager
def memory_advice(optim: OptimConfig) -> Iterator[None]:
    """Says what to do when a batch does not fit into memory; it is never made smaller silently.

    Raises:
        RunError: in place of torch's own error.
    """
    try:
        yield
    except RuntimeError as error:
        lacking = isinstance(error, torch.OutOfMemoryError)
        if not lacking and "can't allocate memory" not in str(error):
            raise
        raise RunError(
            f"a batch of {optim.batch_size} rows in {optim.accumulate} piece(s) does not fit into "
            f"memory; raise optim.accumulate to {2 * optim.accumulate} (same result), or lower "
            "optim.batch_size"
        ) from None


def _mixed(*numbers: int) -> int:
    """A 63-bit seed; neighbouring seeds and epochs share nothing."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
