"""Fine-tuning a backbone with a head: the loop, readable from top to bottom."""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from finetune.checkpoint import LAST, SavedState, read_state, save_state, seed_all
from finetune.tuning.objective import Objective
from finetune.tuning.options import StopConfig, TuningConfig
from finetune.tuning.sources import Source
from finetune.tuning.tuned import Tuned
from heads import metrics
from heads.distributed import Group
from heads.fitting import mixed_precision
from heads.optim import lr_factor
from heads.parts import Part
from heads.progress import ProgressLine, duration
from heads.run_folder import RunError
from heads.watch import EarlyStop, Plateau

IntArray = npt.NDArray[np.int64]
Encode = Callable[[Tensor], Tensor]

CHECK_STEPS = 50
"""Steps between two looks at the loss: each look waits for the device."""


@dataclass
class Fit:
    """All that changes while a training goes on, between two epochs.

    Attributes:
        tuned: adapter and head.
        optimizer: its state by parameter.
        scaler: of the loss, for float16; otherwise it does nothing.
        stop: counts epochs towards stopping early; plateau: towards lowering the rate.
        best_value: accuracy (mAP) of the best epoch; -inf before the first validation.
        best_epoch: counted from 1; 0 = what training began with.
        best_state: copy of the trained tensors of that epoch.
        history: one record an epoch.
    """

    tuned: Tuned
    optimizer: torch.optim.AdamW
    scaler: torch.amp.GradScaler
    stop: EarlyStop
    plateau: Plateau
    best_value: float = -math.inf
    best_epoch: int = 0
    best_state: dict[str, Tensor] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Writes all of it, atomically."""
        save_state(
            path,
            tensors={"tuned": self.tuned.state(), "best": self.best_state},
            optimizer=self.optimizer,
            scaler=self.scaler,
            values={
                "stop": self.stop.record(),
                "plateau": self.plateau.record(),
                "best_value": self.best_value if self.best_state else None,
                "best_epoch": self.best_epoch,
                "history": self.history,
            },
        )

    def restore(self, saved: SavedState) -> None:
        """Goes on where `save` was called."""
        saved.restore({"tuned": self.tuned.state()}, self.optimizer, self.scaler)
        values = saved.values
        self.stop.restore(values["stop"])
        self.plateau.restore(values["plateau"])
        self.history[:] = values["history"]
        if values["best_value"] is not None:
            self.best_value, self.best_epoch = values["best_value"], values["best_epoch"]
            self.best_state = dict(saved.tensors["best"])


@dataclass(frozen=True)
class Measured:
    """What a model says about the readable rows of a part.

    Attributes:
        part: those rows.
        features: (n, P) float32 on the CPU.
        accuracy: top-1 or mAP, 0..1, under "cls" (head) and "txt" (class text), those there are.
        loss: mean of the objective.
        seconds: what encoding took.
    """

    part: Part
    features: Tensor
    accuracy: dict[str, float]
    loss: float
    seconds: float


def fit(
    tuned: Tuned,
    source: Source,
    train: Part,
    val: Part | None,
    optim: TuningConfig,
    stop: StopConfig,
    *,
    build: Callable[[], torch.optim.AdamW],
    group: Group,
    seed: int,
    metric: str,
    folder: Path,
    quiet: bool,
    measure_first: bool = False,
) -> Fit:
    """Trains adapter and head in place, and puts the best epoch's tensors of both back.

    The order of rows and all random numbers of an epoch follow from (seed, epoch).

    Args:
        tuned: on its device.
        source: of inputs.
        train: rows trained on.
        val: rows that pick the epoch and stop the training; None = all epochs, the last is kept.
        optim: optimiser and schedule.
        stop: when to stop early.
        build: makes the optimiser.
        group: processes that train together.
        seed: of order, augmentation and dropout.
        metric: name of the accuracy, for records.
        folder: where the state is kept after each epoch, and an interrupted training is found.
        quiet: show no progress.
        measure_first: the head is fitted already: what it begins as is kept unless an epoch is
            better, and training stops early if none is.

    Raises:
        RunError: if a loss is NaN or infinite, with the optimiser step.
    """
    device, size = group.device, optim.batch_size
    steps_per_epoch = math.ceil(len(train) / size)
    num_steps = optim.steps or optim.epochs * steps_per_epoch
    num_epochs = math.ceil(num_steps / steps_per_epoch)
    factor = lr_factor(optim.schedule_over(num_steps), num_steps)
    mixed, scaler = mixed_precision(optim.precision, device)
    fitted = Fit(
        tuned,
        build(),
        scaler,
        EarlyStop(stop.patience, stop.min_delta),
        Plateau(optim.schedule),
    )
    if (folder / LAST).is_file():
        fitted.restore(read_state(folder / LAST))
    encode: Encode = torch.compile(source.encode) if optim.compile else source.encode
    optimizer, history = fitted.optimizer, fitted.history
    targets = train.target_tensor(device)
    progress = ProgressLine(quiet or not group.leads)
    step = history[-1]["step"] if history else 0

    def validate() -> tuple[dict[str, float], float]:
        assert val is not None, "nothing to measure"
        found = None
        if group.leads:
            measured = measure(tuned.objective, source, encode, val, size, mixed, device)
            found = measured.accuracy, measured.loss
        found = group.follow(found)
        assert found is not None, "the leading process has measured"
        return found

    if measure_first and val is not None and not history:
        tuned.eval()
        accuracy, loss = validate()
        kept = "cls" if "cls" in accuracy else "txt"
        fitted.best_value, fitted.best_state = accuracy[kept], tuned.copied()
        fitted.stop.see(-loss if stop.on == "loss" else accuracy[kept])
    started, first_step = time.perf_counter(), step
    for epoch in range(len(history), num_epochs):
        if fitted.stop.is_due:
            break
        epoch_started, waited = time.perf_counter(), source.waited
        order = np.random.default_rng([seed, 2, epoch]).permutation(len(train))
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        seed_all(seed, epoch, group.rank)
        shares = [group.share(torch.from_numpy(batch)) for batch in batches]
        # In place of an unreadable image comes one that no other process has in this epoch.
        spares = np.unique(np.concatenate([own.numpy() for own, _ in shares]))
        shares = shares[: num_steps - step]
        pieces = [
            piece
            for own, _ in shares
            for piece in np.array_split(own.numpy(), min(optim.accumulate, len(own)))
        ]
        inputs = source.augmented(pieces, seed, epoch, spares)
        tuned.train()
        losses: dict[str, list[Tensor]] = {}
        seen = 0
        for own, divisor in shares:
            optimizer.zero_grad(set_to_none=True)
            means: dict[str, Tensor] = {}
            for _ in range(min(optim.accumulate, len(own))):
                pixels, which = next(inputs)
                if len(which) == 0:
                    continue
                with mixed:
                    features, vectors = encode(pixels), tuned.objective.vectors()
                # A blocking copy would let the CPU wait for the device in every step.
                own_targets = targets[torch.from_numpy(which).to(device, non_blocking=True)]
                parts = tuned.objective(features.float(), own_targets, vectors)
                share = len(which) / divisor
                scaler.scale(parts["loss"] * share).backward()
                for name, value in parts.items():
                    means[name] = means.get(name, 0.0) + value.detach() * share
                seen += len(which)
            group.sum_gradients(tuned)
            _set_lr(optimizer, factor(step) * fitted.plateau.scale, optim, fitted.plateau.min_lr)
            if optim.clip_norm is not None:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(tuned.parameters(), optim.clip_norm)
            scaler.step(optimizer)
            scaler.update()
            step += 1
            for name, value in means.items():
                losses.setdefault(name, []).append(value)
            done = len(losses.get("loss", ()))
            if done % CHECK_STEPS == 0:
                _require_finite(losses["loss"][-CHECK_STEPS:], step)
            if not progress.quiet:
                elapsed = time.perf_counter() - epoch_started
                left = (time.perf_counter() - started) / (step - first_step) * (num_steps - step)
                progress.show(
                    f"epoch {epoch + 1}/{num_epochs}  step {step}/{num_steps}  "
                    f"{seen * group.size / elapsed:,.0f} images/s  "
                    f"{(source.waited - waited) / elapsed:.0%} waiting  {duration(left)} left"
                )
        record: dict[str, Any] = dict(_epoch_means(losses, step, group))
        seconds = time.perf_counter() - epoch_started
        record |= {
            "lr": optimizer.param_groups[0]["lr"],
            "images_per_second": float(group.sum(torch.tensor(float(seen)))) / seconds,
            "waiting": (source.waited - waited) / seconds,
        }
        tuned.eval()
        if val is not None:
            accuracy, loss = validate()
            kept = "cls" if "cls" in accuracy else "txt"
            value = accuracy[kept]
            record |= {"val_loss": loss, f"val_{metric}": value}
            if kept == "cls" and "txt" in accuracy:
                record["monitors"] = {"text": accuracy["txt"]}
            if value > fitted.best_value:
                fitted.best_value, fitted.best_epoch = value, epoch + 1
                fitted.best_state = tuned.copied()
            for watch in (fitted.stop, fitted.plateau):
                watch.see(-loss if stop.on == "loss" else value)
        record["seconds"] = time.perf_counter() - epoch_started
        history.append({"epoch": epoch + 1, "step": step, **record})
        if group.leads:
            fitted.save(folder / LAST)
        if not progress.quiet:
            progress.show(_line(history[-1], num_epochs, metric, fitted))
            progress.close()
    if val is None:
        fitted.best_epoch, fitted.best_state = len(history), tuned.copied()
    tuned.restore(fitted.best_state)
    tuned.eval()
    return fitted


@torch.no_grad()
def measure(
    objective: Objective,
    source: Source,
    encode: Encode,
    part: Part,
    batch_size: int,
    mixed: AbstractContextManager[None],
    device: torch.device,
) -> Measured:
    """Accuracies and loss on the readable rows of a part, without gradients.

    Args:
        objective: in evaluation mode.
        source: of inputs.
        encode: inputs to features.
        part: rows with targets.
        batch_size: rows encoded at a time.
        mixed: context of the encoder.
        device: where the objective lives.

    Raises:
        RunError: if none of the rows can be read, or weights that have diverged make features NaN
            or infinite.
    """
    features, own, seconds = encoded(source, encode, part, batch_size, mixed)
    accuracy, loss = score(objective, features, own, device)
    return Measured(own, features, accuracy, loss, seconds)


@torch.no_grad()
def encoded(
    source: Source, encode: Encode, part: Part, batch_size: int, mixed: AbstractContextManager[None]
) -> tuple[Tensor, Part, float]:
    """(n, P) float32 features on the CPU of the readable rows of a part, those rows, and seconds.

    Args: as `measure` takes them.

    Raises:
        RunError: if none of the rows can be read, or a feature is NaN or infinite.
    """
    started = time.perf_counter()
    rows, parts = [], []
    for inputs, which in source.plain(part, batch_size):
        with mixed:
            parts.append(encode(inputs).float())
        rows.append(which)
    if not parts:
        raise RunError(f"none of the {len(part)} images of {part.name!r} can be read")
    features, kept = torch.cat(parts).cpu(), np.concatenate(rows)  # one wait for the device
    if not features.isfinite().all():
        raise RunError(
            f"features of {part.name!r} are NaN or infinite, the training has diverged; lower "
            "optim.lr or set optim.clip_norm"
        )
    readable = np.zeros(len(part), np.bool_)
    readable[kept] = True
    return features, part.subset(readable, part.name), time.perf_counter() - started


@torch.no_grad()
def score(
    objective: Objective, features: Tensor, part: Part, device: torch.device, at_a_time: int = 4096
) -> tuple[dict[str, float], float]:
    """Accuracy under "cls" and "txt" (top-1, or mAP), and the mean loss, from (n, P) features."""
    vectors = objective.text() if objective.text is not None else None
    targets = part.target_tensor(device)
    total = 0.0
    logits: dict[str, list[Tensor]] = {}
    for start in range(0, len(part), at_a_time):
        span = slice(start, start + at_a_time)
        scores = objective.scores(features[span].to(device), vectors)
        loss = objective.losses(scores, targets[span])["loss"]
        total += float(loss) * len(targets[span])
        for name, values in scores.items():
            logits.setdefault(name, []).append(values.float().cpu())
    accuracy = {}
    for name, parts in logits.items():
        whole = torch.cat(parts)
        if part.targets.ndim == 1:
            right = metrics.target_rank(whole, torch.from_numpy(part.targets)) == 0
            accuracy[name] = float(right.double().mean())
        else:
            if not part.targets.any():
                raise RunError(
                    f"no image of {part.name!r} has a label, so nothing can be ranked right; "
                    "choose another val_split, or val_split carve"
                )
            precisions = metrics.average_precision(whole.numpy(), part.targets)
            accuracy[name] = float(np.nanmean(precisions))
    return accuracy, total / len(part)


def _set_lr(
    optimizer: torch.optim.Optimizer, factor: float, optim: TuningConfig, min_lr: float
) -> None:
    """Each group's rate: from its peak down to `final_lr` as the schedule falls from 1 to 0."""
    for group in optimizer.param_groups:
        peak = group["peak_lr"]
        floor = min(optim.final_lr, peak)
        group["lr"] = max(floor + (peak - floor) * factor, min(min_lr, peak))


def _epoch_means(losses: dict[str, list[Tensor]], step: int, group: Group) -> dict[str, float]:
    """Mean of each part of the loss over the epoch's steps, all processes together."""
    if not losses:
        raise RunError("no image of the training rows can be read")
    columns = {n: group.sum(torch.stack(values).double()).cpu() for n, values in losses.items()}
    _require_finite(list(columns["loss"]), step)
    return {name: float(values.mean()) for name, values in columns.items()}


def _require_finite(values: Sequence[Tensor], step: int) -> None:
    """Checks the losses of the last steps, `step` being the number done."""
    bad = [place for place, value in enumerate(values) if not torch.isfinite(value)]
    if bad:
        first = step - len(values) + bad[0] + 1
        raise RunError(
            f"the loss is {values[bad[0]].item()} at optimiser step {first}; "
            "lower optim.lr, set optim.clip_norm, or take optim.precision bf16 or fp32"
        )


def _line(record: dict[str, Any], num_epochs: int, metric: str, fitted: Fit) -> str:
    """An epoch in one line."""
    line = f"epoch {record['epoch']}/{num_epochs}  loss {record['loss']:.4f}"
    if "val_loss" in record:
        line += f"  val loss {record['val_loss']:.4f}  val {metric} {record[f'val_{metric}']:.2%}"
        if "monitors" in record:
            line += f" (text {record['monitors']['text']:.2%})"
        line += f"  best {fitted.best_value:.2%}"
    return (
        f"{line}  {record['images_per_second']:,.0f} images/s, {record['waiting']:.0%} waiting for "
        f"data  {duration(record['seconds'])}"
    )
