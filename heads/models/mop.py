"""Mixture of prompts: K trained sub-prompts a class around its text feature; the best one scores.

Reference: systems "Mixture-of-Prompts CLIP" for fine-grained classes. Departures: offsets never
start at zero (all prompts of a class would stay one), the text features live on the head's device,
and neither scoring nor the loss holds B x C x K cosines.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, Self

import pandas as pd
import torch
from pydantic import (
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    model_validator,
)
from torch import Tensor, nn
from torch.nn import functional as F

from featcache.errors import ConfigError
from featcache.prompts import choose, expand
from heads.base import Features, FeatureSpec, Head, HeadConfig, OptimDefaults
from heads.losses.mixture_of_prompts import (
    PenaltyReduction,
    max_cosines,
    mixture_of_prompts_loss,
)
from heads.losses.prompt_collapse import NO_COLLAPSE, Collapse
from heads.losses.prompt_scores import Method

logger = logging.getLogger(__name__)

Preset = Literal["default", "seed"]

_PRESETS: Mapping[str, Mapping[str, Any]] = {
    "default": {
        "scale": 50.0,
        "classification_temperature": 1.0,
        "mixture_weight": 0.1,
        "offset_penalty": 200.0,
        "penalty_reduction": "per_row",
        "init": "small_noise",
    },
    "seed": {
        "scale": 50.0,
        "classification_temperature": 0.07,
        "mixture_weight": 0.5,
        "offset_penalty": 0.001,
        "penalty_reduction": "mean",
        "init": "semantic",
        "num_prompts": 32,
    },
}
_SEED_LR = 5e-4
"""Learning rate of preset `seed`."""
_MOST_PROMPTS = 32
_ROWS_A_PROMPT = 16
_INIT_STD = {"semantic": 0.01, "small_noise": 0.001}
# Above this product a cosine lead of 0.05, common between sibling species, already is 10 nats.
_SATURATING = 200.0


class MopConfig(HeadConfig):
    """K trained sub-prompts a class around its text feature."""

    needs: ClassVar[tuple[str, ...]] = ("image/projected",)
    needs_prompts: ClassVar[bool] = True
    optim_defaults: ClassVar[OptimDefaults] = OptimDefaults(
        lr=1e-3, weight_decay=0.0, epochs=30, batch_size=4096
    )

    kind: Literal["mop"] = "mop"
    """Head kind."""
    preset: Preset = "default"
    """Values of the fields that are not given: `default` is this project's choice, `seed` the
    original system's (scale 50, temperature 0.07, mean penalty, 32 prompts; and where `optim.lr` is
    not given, 5e-4)."""
    num_prompts: PositiveInt | None = None
    """Sub-prompts a class (K), 1 or more; unset = one for every 16 training rows of the average
    class, 1 to 32."""
    scale: PositiveFloat = 50.0
    """What cosines are multiplied by (κ), > 0."""
    classification_temperature: PositiveFloat = 1.0
    """What scaled cosines are divided by inside the classification loss (T_cls), > 0."""
    mixture_weight: float = Field(default=0.1, ge=0.0, le=1.0)
    """Share of the mixture loss (λ), 0..1; the classification loss has the rest."""
    offset_penalty: NonNegativeFloat = 200.0
    """Weight of the squared offsets, >= 0."""
    penalty_reduction: PenaltyReduction | Literal["per_row"] = "per_row"
    """`per_row`: sum of the squared lengths of all offsets over the number of training rows, as of
    a prior, so that text counts less the more rows there are, however many classes; under
    `sum_per_prompt`, their mean over prompts, and `mean`, over all entries, each offset is held
    less the more classes there are."""
    assignment: Literal["soft", "hard"] = "soft"
    """How rows are shared among their class's prompts in the mixture loss."""
    tau_start: PositiveFloat = 1.0
    """Assignment temperature (τ) at the first step, > 0."""
    tau_end: PositiveFloat = 0.05
    """Assignment temperature at the last step, > 0; lower is sharper."""
    anneal_tau: bool = True
    """Go from tau_start to tau_end, linearly in the steps; otherwise stay at tau_start."""
    init: Literal["semantic", "small_noise"] = "small_noise"
    """First offsets: normal with standard deviation 0.01, or 0.001."""
    init_std: PositiveFloat | None = None
    """Standard deviation of the first offsets, > 0; unset: what `init` says."""
    diversity_weight: NonNegativeFloat = 0.0
    """Weight of the squared cosines between prompts of one class, >= 0."""
    entropy_weight: NonNegativeFloat = 0.0
    """Weight of the negative entropy of prompt usage within a class, >= 0."""
    min_usage_weight: NonNegativeFloat = 0.0
    """Weight of the shortfall of each prompt's usage below min_usage, >= 0."""
    min_usage: float = Field(default=0.05, ge=0.0, le=1.0)
    """Share of a class's rows that each prompt should get, 0..1/num_prompts."""
    templates: str | list[str] | None = None
    """Prompt templates: names of sets, or format strings over the class table's columns, one or
    several; unset: chosen by the dataset."""
    touched_share: float = Field(default=1e-4, ge=0.0, lt=1.0)
    """With `optim.optimizer=lazy_adamw`: softmax weight from which on a row updates a class that is
    not its own, 0 to below 1; not read otherwise."""
    method: Method = "auto"
    """How the loss is computed; `auto` fits the machine and the temperatures."""

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, values: Any) -> Any:
        """Puts the preset's values where none is given, so that the record shows what was used."""
        if not isinstance(values, Mapping):
            return values
        return {**_PRESETS.get(str(values.get("preset", "default")), {}), **values}

    @model_validator(mode="after")
    def _possible_usage(self) -> Self:
        most = self.num_prompts or _MOST_PROMPTS
        if self.min_usage_weight > 0.0 and self.min_usage * most > 1.0:
            raise ValueError(
                f"min_usage {self.min_usage:g} for each of up to {most} prompts (num_prompts) is "
                f"more than all rows; set min_usage to at most {1.0 / most:g}"
            )
        return self

    def own_optim(self) -> OptimDefaults:
        """The preset's own learning rate."""
        if self.preset == "seed":
            return replace(self.optim_defaults, lr=_SEED_LR)
        return self.optim_defaults

    def template_names(self, classes: pd.DataFrame, kind: str) -> list[str]:
        """The templates asked for, or the set that fits the dataset.

        Raises:
            ConfigError: if `templates` names no known set.
        """
        names = self.templates or choose(kind, [str(column) for column in classes.columns])
        return expand(names, "head.templates")

    def build(self, spec: FeatureSpec) -> "Mop":
        """The head around the class text features of `spec`.

        Raises:
            ConfigError: for a multi-label task.
            ValueError: if `spec` has no class text features.
        """
        if spec.task != "single_label":
            raise ConfigError(
                f"head mop: the cache's task is {spec.task}, expected single_label; "
                "choose another head"
            )
        if spec.prompts is None:
            raise ValueError("head mop needs class text features in FeatureSpec.prompts")
        product = self.scale / self.classification_temperature
        if product > _SATURATING:
            logger.warning(
                "head mop: scale %g / classification_temperature %g multiplies cosines by %.0f, so "
                "the classification loss saturates; raise the temperature, or use preset=default",
                self.scale,
                self.classification_temperature,
                product,
            )
        num_rows = int(spec.class_counts.sum())
        num_prompts = self.num_prompts or _fitting_prompts(num_rows, spec.num_classes)
        penalty, reduction = self.offset_penalty, self.penalty_reduction
        if reduction == "per_row":  # as a mean over prompts
            penalty *= spec.num_classes * num_prompts / max(1, num_rows)
            reduction = "sum_per_prompt"
        return Mop(
            base_prompts(spec.prompts),
            num_prompts=num_prompts,
            scale=self.scale,
            classification_temperature=self.classification_temperature,
            mixture_weight=self.mixture_weight,
            offset_penalty=penalty,
            penalty_reduction=reduction,
            hard=self.assignment == "hard",
            tau_start=self.tau_start,
            tau_end=self.tau_end if self.anneal_tau else self.tau_start,
            init_std=self.init_std or _INIT_STD[self.init],
            collapse=Collapse(
                diversity=self.diversity_weight,
                entropy=self.entropy_weight,
                min_usage=self.min_usage_weight,
                usage_threshold=self.min_usage,
            ),
            touched_share=self.touched_share,
            method=self.method,
        )


def _fitting_prompts(num_rows: int, num_classes: int) -> int:
    """K for the training rows there are: more prompts than kinds of pictures only blur the text."""
    return min(_MOST_PROMPTS, max(1, num_rows // (_ROWS_A_PROMPT * num_classes)))


def base_prompts(prompts: Tensor) -> Tensor:
    """(C, D) unit text feature of each class: templates normalised, averaged, normalised again.

    Args:
        prompts: (T, C, D) float32 per-template text features of any length.
    """
    return F.normalize(F.normalize(prompts, dim=-1, eps=1e-6).mean(dim=0), dim=-1, eps=1e-6)


class Mop(Head):
    """Scores a class by the best of its K prompts, norm(base + offset); only offsets train.

    Args:
        base: (C, D) float32 of unit length, kept as a buffer.
        num_prompts: K; scale: κ; the rest as in `MopConfig` and `mixture_of_prompts_loss`.
    """

    base: Tensor

    def __init__(
        self,
        base: Tensor,
        num_prompts: int = 32,
        scale: float = 50.0,
        classification_temperature: float = 1.0,
        mixture_weight: float = 0.1,
        offset_penalty: float = 3.0,
        penalty_reduction: PenaltyReduction = "sum_per_prompt",
        hard: bool = False,
        tau_start: float = 1.0,
        tau_end: float = 0.05,
        init_std: float = 0.01,
        collapse: Collapse = NO_COLLAPSE,
        touched_share: float = 1e-4,
        method: Method = "auto",
    ) -> None:
        super().__init__()
        num_classes, dim = base.shape
        self.register_buffer("base", base.detach().clone().float())
        self.offsets = nn.Parameter(torch.randn(num_classes, num_prompts, dim).mul_(init_std))
        self.scale = scale
        self.classification_temperature = classification_temperature
        self.mixture_weight = mixture_weight
        self.offset_penalty = offset_penalty
        self.penalty_reduction: PenaltyReduction = penalty_reduction
        self.hard = hard
        self.tau_start, self.tau_end = tau_start, tau_end
        self.collapse = collapse
        self.touched_share, self.sparse_gradients = touched_share, False
        self.method: Method = method

    @property
    def batch_options(self) -> Sequence[str]:
        """The penalties that have weight: they are means over the classes of a batch."""
        names = ("diversity", "entropy", "min_usage")
        return [f"{name}_weight" for name in names if getattr(self.collapse, name) > 0.0]

    def tau(self, progress: float) -> float:
        """Assignment temperature after the share `progress` (0..1) of all steps."""
        return self.tau_end + (self.tau_start - self.tau_end) * (1.0 - min(1.0, progress))

    def forward(self, features: Tensor) -> Tensor:
        """κ times the cosine with the best prompt of each class.

        A softmax of these logits, at temperature 1, gives the probabilities reported; the
        classification temperature sharpens the training loss only.

        Args:
            features: (B, D) float32, as stored.

        Returns:
            (B, C) float32 in -κ..κ, computed in class chunks, never B x C x K at once.
        """
        return self.scale * max_cosines(_unit(features), self.base, self.offsets)

    def loss(self, features: Features, targets: Tensor, progress: float) -> dict[str, Tensor]:
        """Mixture, classification and offset losses, and the anti-collapse terms that have weight.

        Args:
            features: the image features alone, (B, D) float32, as stored.
            targets: (B,) int64 class indices.
            progress: share of all optimiser steps already taken, 0..1; τ follows it.
        """
        tau = self.tau(progress)
        parts = mixture_of_prompts_loss(
            _unit(*features),
            self.base,
            self.offsets,
            targets,
            scale=self.scale,
            tau=tau,
            classification_temperature=self.classification_temperature,
            mixture_weight=self.mixture_weight,
            offset_penalty=self.offset_penalty,
            penalty_reduction=self.penalty_reduction,
            hard=self.hard,
            collapse=self.collapse,
            touched_share=self.touched_share if self.sparse_gradients else None,
            method=self.method,
        )
        result = {
            "loss": parts.loss,
            "loss_mixture": parts.mixture,
            "loss_cls": parts.classification,
            "loss_reg": parts.penalty,
            "tau": parts.loss.new_tensor(tau),
        }
        for name in ("diversity", "entropy", "min_usage"):
            if getattr(self.collapse, name) > 0.0:
                result[f"loss_{name}"] = getattr(parts, name)
        return result

    def give_sparse_gradients(self) -> None:
        """From now on `loss` leaves out the gradient of classes that a batch does not touch.

        The batch's own classes and those that `touched_share` names have one, as far as the
        softmax is sharp; the offsets' penalty then pulls only at them.
        """
        self.sparse_gradients = True

    @torch.no_grad()
    def assignments(self, features: Tensor, class_index: int, temperature: float) -> Tensor:
        """(n, K) share γ of each prompt of one class in each row, summing to 1 over prompts.

        Args:
            features: (n, D) float32, as stored.
            class_index: class whose prompts are compared, 0..C-1.
            temperature: τ > 0; about 5 shows a graded picture, the trained end value is one-hot.
        """
        prompts = F.normalize(self.base[class_index] + self.offsets[class_index], dim=-1)
        return torch.softmax(self.scale * (_unit(features) @ prompts.t()) / temperature, dim=1)


def _unit(features: Tensor) -> Tensor:
    return F.normalize(features.float(), dim=-1, eps=1e-6)
