"""Router in two stages: each modality's classifier alone until it stops gaining, then the weights.

Stage 1 trains head_m of each modality on its own loss, until an epoch raises the classifier's
validation metric by less than `min_gain` over its best so far, `stage_patience` times in a row; it
is left as it is from then on. When all are done, stage 2 trains the scalars r_m on the loss of

    z = Σ_m w_m head_m(f_m),    w = softmax over modalities of r_m(f_m),

with the classifiers frozen or at a lower learning rate. Both stages are one training: its one
optimiser takes one step a batch, and only epochs of stage 2 can be picked as the best.

Reference: systems "MultiCLIP" (multi-label image and caption classification), its `clip_two_step`.
Departures: the validation metric decides, never a training one; each row's modalities train their
own classifier alone, in one step; three epochs without a gain end stage 1, not one, or its longest
duration does, so that stage 2 always comes.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import Tensor

from heads.base import Features, FeatureSpec
from heads.losses.base import Loss
from heads.models.router import Branch, RoutedConfig, Router, fuse, held

ROUTER = "router"
"""Name of the parameter group of the scalars; those of the classifiers are the modalities'."""


class TwoStepConfig(RoutedConfig):
    """Classifiers of image, caption and both; when they are trained, their weights."""

    kind: Literal["two_step"] = "two_step"
    """Head kind."""
    min_gain: NonNegativeFloat = 0.01
    """Gain of a classifier's validation metric (top-1 or mAP, 0..1) below which an epoch counts as
    without progress, 0 or more."""
    stage_patience: PositiveInt = 3
    """Epochs without progress in a row after which a classifier is done, 1 or more; 1, as in the
    paper, leaves classifiers half trained where an epoch is few steps."""
    longest_first_stage: float = Field(default=0.5, gt=0, lt=1)
    """Share of all epochs after which stage 2 begins in any case, 0..1."""
    head_lr_factor: NonNegativeFloat = 0.0
    """What the classifiers' learning rate is multiplied by in stage 2, 0 or more; 0 = frozen."""

    def build(self, spec: FeatureSpec) -> "TwoStep":
        """The head, in stage 1; its loss is the one that `spec` brings."""
        return TwoStep(
            self.branches(spec),
            spec.criterion,
            self.hide_share,
            min_gain=self.min_gain,
            patience=self.stage_patience,
            longest_first_stage=self.longest_first_stage,
            head_lr_factor=self.head_lr_factor,
        )


class TwoStep(Router):
    """A router whose classifiers are trained before its weights.

    Attributes:
        learning: (M,) bool, classifiers still in stage 1; all False is stage 2.
        best: (M,) float64 best validation metric of each so far.
        stale: (M,) int64 epochs without progress in a row.
        epochs: int64 epochs done.
        progress: float64 share of all optimiser steps taken before the last one.
    """

    learning: Tensor
    best: Tensor
    stale: Tensor
    epochs: Tensor
    progress: Tensor

    def __init__(
        self,
        branches: Mapping[str, Branch],
        criterion: Loss | None = None,
        hide_share: float = 0.0,
        *,
        min_gain: float = 0.01,
        patience: int = 1,
        longest_first_stage: float = 0.5,
        head_lr_factor: float = 0.0,
    ) -> None:
        """A head over M modalities in stage 1; see `Router` and the fields of `TwoStepConfig`."""
        super().__init__(branches, criterion, hide_share)
        self.min_gain, self.patience = min_gain, patience
        self.longest_first_stage, self.head_lr_factor = longest_first_stage, head_lr_factor
        count = len(branches)
        self.register_buffer("learning", torch.ones(count, dtype=torch.bool))
        self.register_buffer("best", torch.full((count,), -math.inf, dtype=torch.float64))
        self.register_buffer("stale", torch.zeros(count, dtype=torch.int64))
        self.register_buffer("epochs", torch.zeros((), dtype=torch.int64))
        self.register_buffer("progress", torch.zeros((), dtype=torch.float64))
        # On the CPU, so that a step does not wait for the device to tell its stage.
        self._learning = [True] * count
        self.register_load_state_dict_post_hook(  # type: ignore[no-untyped-call]
            lambda head, _: head._look()
        )

    def _look(self) -> None:
        self._learning = [bool(one) for one in self.learning.tolist()]

    @property
    def selectable(self) -> bool:
        """False in stage 1, whose weights mean nothing yet."""
        return not any(self._learning)

    def param_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """A group for each classifier, by its modality, and one of all scalars."""
        branches = zip(self.modalities, self._parts(), strict=True)
        parts = {name: [*branch.classifier.parameters()] for name, branch in branches}
        parts[ROUTER] = [p for branch in self._parts() for p in branch.trust.parameters()]
        return [
            {"params": parameters, "lr": lr, "weight_decay": weight_decay, "name": name}
            for name, parameters in parts.items()
        ]

    def lr_factors(self) -> Mapping[str, float]:
        """0 for what the stage leaves as it is."""
        if self.selectable:
            return {ROUTER: 1.0, **dict.fromkeys(self.modalities, self.head_lr_factor)}
        learning = zip(self.modalities, self._learning, strict=True)
        return {ROUTER: 0.0, **{name: float(one) for name, one in learning}}

    def loss(self, features: Features, targets: Tensor, progress: float) -> dict[str, Tensor]:
        """The sum of the classifiers' own losses in stage 1, of the weighted logits in stage 2.

        Both stages report the same parts: each classifier's own loss, and the mean weights.
        """
        assert self.criterion is not None, "built without a loss"
        self.progress.fill_(progress)
        usable, vectors = held(features), self.read(features)
        with torch.set_grad_enabled(not self.selectable or self.head_lr_factor > 0):
            logits = self.alone(vectors)
        own = {
            name: self._own_loss(one, usable[:, index], targets)
            for index, (name, one) in enumerate(zip(self.modalities, logits, strict=True))
        }
        with torch.set_grad_enabled(self.selectable):
            weights = self.routing(vectors, self._hide(usable))
        if self.selectable:
            total = self.criterion(fuse(logits, weights), targets)
        else:
            parts = zip(own.values(), self._learning, strict=True)
            total = torch.stack([loss for loss, learning in parts if learning]).sum()
        shares = dict(zip(self.modalities, weights.detach().mean(0), strict=True))
        return {
            "loss": total,
            **{f"loss_{name}": value.detach() for name, value in own.items()},
            **{f"weight_{name}": share for name, share in shares.items()},
        }

    def after_epoch(self, scores: Mapping[str, float]) -> None:
        """Ends stage 1 of the classifiers that stopped gaining on the validation rows."""
        self.epochs += 1
        for index, name in enumerate(self.modalities):
            if not self._learning[index]:
                continue
            gained = scores[name] - float(self.best[index]) >= self.min_gain
            if gained:
                self.best[index] = scores[name]
            self.stale[index] = 0 if gained else self.stale[index] + 1
            self.learning[index] = bool(self.stale[index] < self.patience)
        if self._share_done() >= self.longest_first_stage:
            self.learning.fill_(False)
        self._look()

    def _share_done(self) -> float:
        """Share of all epochs that are done; too low rather than too high in a short training."""
        done, before_last_step = int(self.epochs), float(self.progress)
        if before_last_step <= 0:
            return 0.0
        return done / math.floor(done / before_last_step + 1e-9)

    def _own_loss(self, logits: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
        """The loss of one classifier; rows without its modality count as 0 in the mean or sum."""
        assert self.criterion is not None, "built without a loss"
        terms = self.criterion.terms(logits, targets).reshape(len(logits), -1)
        terms = torch.where(rows[:, None], terms, 0.0)
        return terms.sum() if self.criterion.reduction == "sum" else terms.mean()
