"""Training a head on features that are already there: the loop, readable from top to bottom."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from heads import optim as optimisation
from heads import run_folder
from heads.base import Head
from heads.checkpoint import CHECKPOINT, NOTHING, Best, better, restore_state, save_state
from heads.data import FeatureTable, Part
from heads.evaluate import score_candidates
from heads.optim import OptimConfig
from heads.progress import ProgressLine, duration
from heads.run_folder import RunError

SAVE_SECONDS = 10.0
"""Time between two saved states, if the user names no number of epochs."""

_THREADS_PAY = 2**25
"""Multiplications a step from which on several threads are faster than the barriers they cost."""


@dataclass(frozen=True)
class Material:
    """Features and targets of the rows that train and of those that decide."""

    train: FeatureTable
    train_part: Part
    val: FeatureTable
    val_part: Part


def fit(
    head: Head,
    material: Material,
    optim: OptimConfig,
    *,
    folder: Path,
    fingerprint: str,
    metric: str,
    seed: int,
    patience: int | None = None,
    save_every: int | None = None,
    quiet: bool = True,
) -> tuple[Best, list[dict[str, Any]]]:
    """Trains `head` in place; returns the best model by validation and one record an epoch.

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
        patience: epochs without a better validation metric after which to stop; None = never.
        save_every: epochs between two saved states; None = by `SAVE_SECONDS`.
        quiet: show no progress.

    Raises:
        RunError: if a loss is NaN or infinite, with the optimiser step.
    """
    table, device = material.train, material.train.device
    batch_size = optim.batch_size
    assert batch_size is not None, "not resolved"
    assert optim.epochs is not None, "not resolved"
    num_rows, num_steps = len(table), optim.num_steps(len(table))
    factor = optimisation.lr_factor(optim.schedule, num_steps)
    optimizer = optimisation.build(optim, head)
    targets = torch.from_numpy(material.train_part.targets)
    targets = targets.to(device, torch.float32 if targets.ndim == 2 else torch.int64)
    best, history = NOTHING, list[dict[str, Any]]()
    last = folder / CHECKPOINT
    if last.is_file():
        saved_state = run_folder.read_tensors(last)
        best, history = restore_state(saved_state, head, optimizer, fingerprint)
    progress = ProgressLine(quiet)
    first_epoch, started = len(history), time.perf_counter()
    saved = started
    step = first_epoch * (num_steps // optim.epochs)
    for epoch in range(first_epoch, optim.epochs):
        if patience is not None and epoch - best.epoch >= patience:
            break
        epoch_started = time.perf_counter()
        generator = torch.Generator().manual_seed(_mixed(seed, epoch))
        torch.manual_seed(_mixed(seed, epoch))
        order = torch.randperm(num_rows, generator=generator)
        views = None
        if table.num_views > 1:
            views = torch.randint(table.num_views, (num_rows,), generator=generator)
        head.train()
        factors = head.lr_factors()
        losses: dict[str, list[Tensor]] = {}
        for start in range(0, num_rows, batch_size):
            index = order[start : start + batch_size]
            features = table.batch(index, None if views is None else views[index])
            optimisation.set_lr(optimizer, factor(step), factors)
            parts = head.loss((features,), targets[index.to(device)], step / num_steps)
            optimizer.zero_grad(set_to_none=True)
            parts["loss"].backward()  # type: ignore[no-untyped-call]
            if optim.clip_norm is not None:
                optimisation.clip(head, optim.clip_norm)
            optimizer.step()
            step += 1
            for name, value in parts.items():
                losses.setdefault(name, []).append(value.detach())
        means = _epoch_means(losses, step)
        head.eval()
        scores = score_candidates(head, material.val, material.val_part)
        values = scores.candidates
        if head.selectable:
            best = better(best, values, head, epoch + 1)
        head.after_epoch(scores.all)
        now = time.perf_counter()
        history.append(
            {
                "epoch": epoch + 1,
                "step": step,
                **means,
                f"val_{metric}": max(values.values()),
                "lr": max(group["lr"] for group in optimizer.param_groups),
                "seconds": now - epoch_started,
            }
        )
        due = (epoch + 1) % save_every == 0 if save_every else now - saved >= SAVE_SECONDS
        if due and epoch + 1 < optim.epochs:
            run_folder.write_history(folder / "history.jsonl", history)
            save_state(last, head, optimizer, best, history, fingerprint)
            saved = now
        left = (now - started) / (epoch + 1 - first_epoch) * (optim.epochs - epoch - 1)
        progress.show(
            f"epoch {epoch + 1}/{optim.epochs}  loss {means.get('best_loss', means['loss']):.4f}  "
            f"val {metric} {max(values.values()):.2%} (best {best.value:.2%})  "
            f"{num_rows / (now - epoch_started):,.0f} rows/s  {duration(left)} left"
        )
    progress.close()
    run_folder.write_history(folder / "history.jsonl", history)
    return best, history


def untrained(head: Head, material: Material) -> Best:
    """The better of the candidates of a head that has nothing to train."""
    scores = score_candidates(head, material.val, material.val_part)
    return better(NOTHING, scores.candidates, head, 0)


def _epoch_means(losses: Mapping[str, list[Tensor]], step: int) -> dict[str, float]:
    """Mean of each part of the loss; looks at the device once an epoch, not once a step."""
    columns = {name: torch.stack(values).double().cpu() for name, values in losses.items()}
    bad = ~torch.isfinite(columns["loss"])
    if bad.any():
        first = step - len(bad) + int(bad.nonzero()[0]) + 1
        raise RunError(
            f"the loss is {columns['loss'][bad][0].item()} at optimiser step {first}; lower "
            "optim.lr or set optim.clip_norm"
        )
    return {name: float(values.mean()) for name, values in columns.items()}


@contextmanager
def enough_threads(head: Head, batch_size: int | None) -> Iterator[None]:
    """One thread for steps too small to share; measured 5x faster on a busy machine."""
    before = torch.get_num_threads()
    work = (batch_size or 1) * sum(p.numel() for p in head.parameters() if p.requires_grad)
    torch.set_num_threads(1 if work < _THREADS_PAY else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _mixed(seed: int, epoch: int) -> int:
    """A 63-bit seed; neighbouring seeds and epochs share nothing."""
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0] >> 1)
