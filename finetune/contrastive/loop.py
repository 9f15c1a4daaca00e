"""The training of a dual encoder on image-caption pairs: the loop, readable from top to bottom."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.checkpoint import seed_all
from finetune.contrastive.gradient_cache import contrastive_step
from finetune.contrastive.pair_stream import Batch, PairStream
from finetune.contrastive.text import TokenTable, encode_text
from finetune.images.training_images import TrainingImages
from finetune.losses import PairLossConfig
from finetune.optim import AdamWConfig
from finetune.parallel import PairTowers, Spread, Strategy, clip_norm, spread
from heads.distributed import Group
from heads.optim import set_lr
from heads.progress import duration
from heads.run_folder import RunError

SAVE_SECONDS = 60.0
"""Time between two saved states, if the user names no number of steps."""

SAVE_SHARE = 20
"""At least this many times as long as the last one took: saving gigabytes costs 5 % at most."""


@dataclass
class Progress:
    """What changes while a training goes on, apart from tensors; plain values.

    Attributes:
        step: optimizer steps done.
        epoch: that the last of them was in, from 1.
        seconds: spent in training, in all runs of it, without validations and saving.
        waited: of them, waiting for pixels.
        losses: of the steps since the last record.
        history: one record every so many steps.
    """

    step: int = 0
    epoch: int = 1
    seconds: float = 0.0
    waited: float = 0.0
    losses: list[float] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Rhythm:
    """After which steps something happens besides training.

    Attributes:
        num_steps: optimizer steps of the whole training.
        steps_per_epoch: of one pass over the split.
        log_every: steps between records.
        validate_epochs: epochs between validations; 0 = none.
        validate_steps: steps between further validations; None = none.
        save_every: steps between saved states; None = by time.
    """

    num_steps: int
    steps_per_epoch: int
    log_every: int
    validate_epochs: int
    validate_steps: int | None
    save_every: int | None

    def validates(self, done: int) -> bool:
        """Whether a validation follows the step that is the `done`-th; one follows the last."""
        if done == self.num_steps:
            return True
        if self.validate_steps is not None and done % self.validate_steps == 0:
            return True
        epochs, rest = divmod(done, self.steps_per_epoch)
        return rest == 0 and self.validate_epochs > 0 and epochs % self.validate_epochs == 0


class Training:
    """Towers, optimizer and loss of one run, on one or several processes.

    Attributes:
        model: open_clip dual encoder; holds the weights.
        towers: the same as the processes train it together.
        optimizer: over its parameters.
        scaler: of the loss, for float16; otherwise it does nothing.
        group: the processes.
        strategy: how they share the weights.
    """

    def __init__(
        self,
        model: nn.Module,
        texts: TokenTable,
        images: TrainingImages,
        loss: PairLossConfig,
        optim: AdamWConfig,
        *,
        group: Group,
        strategy: Strategy = "ddp",
        precision: Literal["fp32", "bf16", "fp16"] = "fp32",
        accumulate: int = 1,
    ) -> None:
        """Makes the towers ready for the processes, and the optimizer behind them.

        Args:
            model: on the group's device, in training mode.
            texts: token ids of all captions.
            images: makes batches into what the image tower takes.
            loss: on the features of a batch.
            optim: optimizer.
            group: the processes.
            strategy: how they share the weights.
            precision: arithmetic of the towers.
            accumulate: pieces in which a process encodes its rows of a batch.
        """
        self.model, self.group, self.strategy = model, group, strategy
        self.texts, self.images, self.loss, self.optim = texts, images, loss, optim
        self.accumulate = accumulate
        apart = [one for one in (model.logit_scale, self.bias) if isinstance(one, nn.Parameter)]
        self.towers: Spread = spread(
            PairTowers(model, encode_text), group, strategy=strategy, apart=apart
        )
        self.optimizer = optim.build(model)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.scaler = torch.amp.GradScaler(group.device.type, enabled=precision == "fp16")
        self._dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)

    @property
    def scale(self) -> Tensor:
        """() natural logarithm of the logit scale."""
        return cast(Tensor, self.model.logit_scale)

    @property
    def bias(self) -> Tensor | None:
        """() logit bias, for losses that have one."""
        return cast(Tensor | None, getattr(self.model, "logit_bias", None))

    def step(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """One optimizer step; the () loss of the whole batch and the () norm of its gradient."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = contrastive_step(
            self.towers,
            self._encode,
            batch.chunks(min(self.accumulate, len(batch))),
            lambda images, texts: self.loss.loss(images, texts, self.scale, self.bias, self.group),
            self.scaler.scale,
        )
        self.scaler.unscale_(self.optimizer)
        norm = clip_norm(self.parameters, self.optim.clip_norm or math.inf)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.loss.clamp(self.scale)
        return loss, norm

    def _encode(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(b, P) image and text features, L2-normalised float32."""
        device = self.group.device
        pixels = self.images.inputs(batch.images)
        # Equal captions are encoded once.
        distinct, place = np.unique(batch.caption_ids, return_inverse=True)
        tokens = self.texts.rows(distinct).to(device, non_blocking=True)
        mixed = nullcontext() if self._dtype is None else torch.autocast(device.type, self._dtype)
        with mixed:
            images, captions = self.towers(
                pixels.contiguous(memory_format=torch.channels_last), tokens
            )
        captions = captions.float()[torch.from_numpy(place).to(device, non_blocking=True)]
        return F.normalize(images.float(), dim=-1), F.normalize(captions, dim=-1)


def train(
    training: Training,
    stream: PairStream,
    rhythm: Rhythm,
    progress: Progress,
    seed: int,
    *,
    validate: Callable[[], Mapping[str, float]] | None,
    save: Callable[[Progress], None],
    record: Callable[[dict[str, Any]], None],
) -> None:
    """Trains to the last step, from where `progress` stands.

    Args:
        training: towers and optimizer, at that state.
        stream: batches from that step on.
        rhythm: after which steps something happens.
        progress: is brought up to date.
        seed: of random numbers drawn in the towers.
        validate: measures the model; every process calls it. None = no validation.
        save: writes the state; every process calls it.
        record: takes the first process's new records.

    Raises:
        RunError: if a loss or gradient is NaN or infinite, with the first such step; what was
            saved last is from before it.
    """
    group, factor = training.group, training.optim.lr_factor(rhythm.num_steps)
    batch_size = stream.batch_size
    unseen: list[tuple[Tensor, Tensor]] = []
    saved = resumed = time.perf_counter()
    pause, waited, seconds = SAVE_SECONDS, progress.waited, progress.seconds
    training.model.train()
    for batch in stream:
        seed_all(seed, 2, progress.step, group.rank)
        set_lr(training.optimizer, factor(progress.step))
        unseen.append(training.step(batch))
        progress.step, progress.epoch = progress.step + 1, batch.epoch + 1
        done, last = progress.step, progress.step == rhythm.num_steps
        validates = validate is not None and rhythm.validates(done)
        logs = last or validates or done % rhythm.log_every == 0
        due = not last and time.perf_counter() - saved >= pause
        if rhythm.save_every is not None:
            saves = last or done % rhythm.save_every == 0
        else:  # one clock decides for all processes, and rarely
            saves = due if group.size == 1 else logs and group.follow(due)
        if not logs and not saves:
            continue
        losses, norms = _checked(unseen, done, rhythm.num_steps, training)
        unseen = []
        progress.losses += losses
        progress.seconds = seconds + time.perf_counter() - resumed
        progress.waited = waited + stream.waited
        if logs:
            entry = _entry(training, progress, norms[-1], batch_size)
            progress.losses = []
            if group.leads:
                _print(entry, rhythm.num_steps, progress)
            if validates and validate is not None:
                before = time.perf_counter()
                entry["validation"] = dict(validate())
                resumed += time.perf_counter() - before
                if group.leads:
                    shown = (f"{name} {value:.3f}" for name, value in entry["validation"].items())
                    print(f"  validation: {'  '.join(shown)}", flush=True)
            progress.history.append(entry)
            if group.leads:
                record(entry)
        if saves:
            before = time.perf_counter()
            save(progress)
            saved = time.perf_counter()
            resumed += saved - before
            pause = max(SAVE_SECONDS, SAVE_SHARE * (saved - before))
    training.model.eval()


def _checked(
    unseen: Sequence[tuple[Tensor, Tensor]], done: int, num_steps: int, training: Training
) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of the latest steps; the device is waited for here only."""
    table = torch.stack([torch.stack((loss.float(), norm.float())) for loss, norm in unseen])
    losses, norms = table.T.tolist()
    first = done - len(losses) + 1
    for step, (loss, norm) in enumerate(zip(losses, norms, strict=True), first):
        # A float16 gradient may overflow: the scaler leaves that step out and scales less.
        wrong = not math.isfinite(loss) or not (math.isfinite(norm) or training.scaler.is_enabled())
        if wrong:
            what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient is {norm}"
            raise RunError(
                f"step {step} of {num_steps}: {what}; lower optim.lr or set optim.clip_norm (what "
                "was saved before it stays)"
            )
    return losses, norms


def _entry(training: Training, progress: Progress, norm: float, batch_size: int) -> dict[str, Any]:
    bias = training.bias
    return {
        "step": progress.step,
        "epoch": progress.epoch,
        "loss": sum(progress.losses) / len(progress.losses),
        "lr": training.optimizer.param_groups[0]["lr"],
        "logit_scale": training.scale.exp().item(),
        **({} if bias is None else {"logit_bias": bias.item()}),
        "grad_norm": norm,
        "images_per_second": progress.step * batch_size / progress.seconds,
        "waited": progress.waited / progress.seconds,
    }


def _print(entry: Mapping[str, Any], num_steps: int, progress: Progress) -> None:
    left = progress.seconds / progress.step * (num_steps - progress.step)
    print(
        f"step {entry['step']}/{num_steps}  epoch {entry['epoch']}  loss {entry['loss']:.3f}  "
        f"{entry['images_per_second']:.0f} images/s ({entry['waited']:.0%} waiting for them)  "
        f"{duration(left)} left",
        flush=True,
    )
