"""Options of fine-tuning: head, text alignment, optimiser, early stopping."""

from typing import Literal, Self

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from featcache.config import Config
from featcache.errors import ConfigError
from finetune.optim import Decay
from heads.optim import ScheduleConfig


class ClassifierConfig(Config):
    """The linear head on the backbone's image feature."""

    fit_first: bool = True
    """Fit the head to the backbone's features as they are, by the search of `heads.train --head
    linear`, and train both from there: no worse by validation than the frozen backbone. false =
    begin with zeros, as published. Not read with `init_head`, which is such a head."""
    scaling: Literal["standard", "unit", "l2"] | None = None
    """What the head reads: standard = each column of the feature to mean 0 and deviation 1 over the
    training rows before training; unit = the feature brought to norm 1; l2 = the same times the
    root of its width, with which equal steps of the weights move the logits further. Unset =
    standard with `fit_first`, otherwise unit. With `init_head` the head's own scaling is kept."""
    bias: bool = True
    """Add a per-class offset."""
    lr: PositiveFloat = 1e-3
    """Peak learning rate of the head, > 0."""
    weight_decay: NonNegativeFloat = 1e-4
    """Decoupled weight decay of the head's weights, 0 or more; offsets never decay."""

    @model_validator(mode="after")
    def _statistics_are_known(self) -> Self:
        if self.scaling == "standard" and not self.fit_first:
            raise ValueError(
                "scaling standard takes its statistics from the features that the head is fitted "
                "to first; set fit_first true, or scaling unit or l2"
            )
        return self


class TextConfig(Config):
    """Class names as text: the alignment loss, and the accuracy by text."""

    weight: NonNegativeFloat | None = None
    """Weight of the text-image alignment loss beside the classification loss, 0 or more; unset =
    0.3 where the backbone reads text, otherwise 0."""
    templates: str | list[str] | None = None
    """Prompt templates: names of sets, or format strings over the class table's columns; unset =
    `flowers` for flowers102, otherwise the set that suits the dataset."""
    scale: PositiveFloat | None = None
    """Multiplier of image-text cosines, > 0; unset = the one the backbone was trained with, or 100
    with objective image_text. It is never trained."""


class TuningConfig(Config):
    """How backbone and head are trained together."""

    lr: PositiveFloat | None = None
    """Peak learning rate of the adapter, > 0; unset = 1e-4, or 1e-5 for whole weights (full,
    last_blocks)."""
    weight_decay: NonNegativeFloat = 1e-2
    """Decoupled weight decay of the adapter's matrices, 0 or more; vectors and scalars (biases,
    norm gains) never decay."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay rates of AdamW's two moments, each in [0, 1)."""
    batch_size: PositiveInt = 32
    """Images of an optimiser step, all processes together; the last of an epoch may be smaller."""
    accumulate: PositiveInt = 1
    """Pieces in which a batch is computed one after the other, 1 or more: less memory, the same
    gradient."""
    epochs: PositiveInt = 40
    """Most passes over the training rows."""
    steps: PositiveInt | None = None
    """Optimiser steps; unset = all of `epochs`, otherwise as many epochs as it takes."""
    steps_per_shot: PositiveInt | None = None
    """Optimiser steps for each training image a class that `dataset.shots` keeps, in place of
    `steps`; few-shot CLIP-LoRA takes 500."""
    schedule: ScheduleConfig = ScheduleConfig(shape="constant", warmup_steps=0)
    """Learning-rate schedule, over all steps whether or not the training stops early. What of it is
    unset: shape constant, no warm-up, or the rise of one_cycle."""
    final_lr: NonNegativeFloat = 0.0
    """Learning rate that a falling schedule ends at, 0 or more."""
    clip_norm: PositiveFloat | None = None
    """Largest norm of the gradient over all trained tensors, > 0; unset = not clipped."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of the towers in training: fp32, or mixed with bf16, or mixed with fp16 and a
    scaled loss; weights stay float32. auto = bf16 on a GPU, fp32 on the CPU."""
    checkpoint_blocks: bool = False
    """Keep no activations inside the transformer blocks and compute them again in the backward
    pass: less memory, a quarter to a third more time, the same gradients."""
    compile: bool = False
    """Compile the image tower (torch.compile): a first step of minutes, then faster ones on a GPU.
    Needs a C++ compiler."""

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.steps is not None and self.steps_per_shot is not None:
            raise ValueError(
                f"steps {self.steps} and steps_per_shot {self.steps_per_shot} both say how long to "
                "train; leave one out"
            )
        return self

    def schedule_over(self, num_steps: int) -> ScheduleConfig:
        """The schedule of a training with every unset field filled in.

        Raises:
            ConfigError: if the warm-up is as long as the whole training.
        """
        shape, warmup = self.schedule.shape or "constant", self.schedule.warmup_steps
        if warmup is None:
            warmup = int(self.schedule.pct_start * num_steps) if shape == "one_cycle" else 0
        elif warmup >= num_steps:
            raise ConfigError(
                f"optim.schedule.warmup_steps: {warmup} is not below the {num_steps} optimiser "
                "steps of the training; lower it, or raise optim.epochs"
            )
        return self.schedule.model_copy(update={"shape": shape, "warmup_steps": warmup})


class StopConfig(Config):
    """When to stop before the last epoch."""

    patience: PositiveInt | None = 3
    """Stop after this many epochs in a row that are no better than the best so far; None (null in
    YAML) = run all epochs."""
    min_delta: NonNegativeFloat = 0.02
    """How much better than the best so far counts, 0 or more: nats of the validation loss, or
    share of the metric."""
    on: Literal["loss", "metric"] = "loss"
    """What is looked at: the loss on the validation rows, or their accuracy (mAP)."""
