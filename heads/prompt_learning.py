"""What heads that learn class prompts share: scaled cosines, and the two losses that train them.

With x the unit image feature, t_c the unit vector of class c's prompt, s the backbone's own scale
(fixed) and θ a learned cosine from which on a class counts as present (multi-label sets only):

    z_c = s (⟨x, t_c⟩ − θ)
    L   = λ L_cls + (1 − λ) L_cse

L_cls is any loss on logits, L_cse the class-specific embedding loss over the rows' captions; λ = 1
leaves captions out. Each class is scored by itself: a sigmoid, never a softmax over classes, turns
z into the probability of one label among several.
"""

from abc import abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import Tensor, nn

from featcache.manifest import Task
from heads.base import Features, FeatureSpec, Head, HeadConfig
from heads.losses.base import Loss, LossConfig, at_least_float32
from heads.losses.class_specific_embedding import (
    ClassSpecificEmbedding,
    Distances,
    Variant,
)
from heads.losses.distribution_balanced import DistributionBalancedConfig


class PromptLearningConfig(HeadConfig):
    """Options of every head that learns class prompts."""

    classification_weight: float = Field(default=0.5, ge=0, le=1)
    """Share of the loss on logits (λ), 0..1; the class-specific embedding loss over captions has
    the rest. 1 = no captions are read."""
    cse: Variant = "softmargin"
    """Class-specific embedding loss: softmargin (wider margins and larger weights for rarer
    classes), weighted (one margin), hinge (no weights either), or nn_hinge (margin 1)."""
    cse_margin: PositiveFloat | None = None
    """Its margin, > 0, in units of 1 − cosine; unset = 1 for nn_hinge, otherwise 0.2."""
    count_power: NonNegativeFloat = 1.0
    """Weights of softmargin and weighted fall with this power of a class's rows, 0 or more."""
    scale: PositiveFloat | None = None
    """Multiplier of the cosines (s), > 0; unset = the backbone's own (100 for CLIP)."""
    threshold: bool = True
    """Learn the cosine from which on a class counts as present (multi-label sets only); without it
    every positive cosine does, and the sigmoids of CLIP's cosines are all close to 1."""

    def default_loss(self, task: Task) -> LossConfig | None:
        """Distribution-balanced for several labels a row."""
        return DistributionBalancedConfig() if task == "multi_label" else None

    def wants_statistics(self) -> bool:
        """True: the threshold starts where the mean logit says how common labels are."""
        return self.threshold

    def losses(self, spec: FeatureSpec) -> "PromptLosses":
        """What trains the prompts."""
        cse = None
        if self.classification_weight < 1:
            cse = ClassSpecificEmbedding(
                spec.class_counts,
                variant=self.cse,
                margin=self.cse_margin,
                count_power=self.count_power,
            )
        return PromptLosses(spec.criterion, cse, self.classification_weight)

    def first_threshold(self, spec: FeatureSpec, vectors: Tensor) -> Tensor | None:
        """0-d start of θ: the mean logit is then the log-odds of an average label; None = no θ.

        Args:
            spec: with the features' statistics, or of a trained head, which brings its own θ.
            vectors: (C, P) unit class vectors at the start.
        """
        if not self.threshold or spec.task == "single_label":
            return None
        if spec.mean is None or spec.std is None:
            return torch.zeros(())
        # E|x|² = |μ|² + Σσ², so this is the mean cosine, but for how much |x| varies.
        length = (spec.mean.square().sum() + spec.std.square().sum()).sqrt()
        cosine = (vectors.cpu() @ spec.mean).mean() / length
        share = float(spec.class_counts.mean()) / max(spec.num_rows, 1)
        odds = torch.logit(torch.tensor(share), eps=1e-4)
        return cosine - odds / self.multiplier(spec)

    def multiplier(self, spec: FeatureSpec) -> float:
        """What cosines are multiplied by."""
        return self.scale or spec.logit_scale


class PromptLosses(nn.Module):
    """λ L_cls + (1 − λ) L_cse."""

    def __init__(
        self, criterion: Loss | None, cse: ClassSpecificEmbedding | None, weight: float
    ) -> None:
        """The two losses.

        Args:
            criterion: on logits; None in a head that is not going to be trained.
            cse: over captions; None = left out.
            weight: λ, 0..1.
        """
        super().__init__()
        self.criterion, self.cse, self.weight = criterion, cse, weight

    def forward(
        self, logits: Tensor, distances: Distances | None, targets: Tensor
    ) -> dict[str, Tensor]:
        """The sum under "loss", and each part by itself.

        Args:
            logits: (B, C).
            distances: of captions and class prompts; None = λ is 1.
            targets: see `Head.loss`.
        """
        assert self.criterion is not None, "a head that was loaded is not trained further"
        classification = self.criterion(logits, targets)
        if self.cse is None:
            return {"loss": classification, "classification_loss": classification.detach()}
        assert distances is not None, "no captions"
        embedding = self.cse(distances, targets)
        return {
            "loss": self.weight * classification + (1 - self.weight) * embedding,
            "classification_loss": classification.detach(),
            "cse_loss": embedding.detach(),
        }


class PromptHead(Head):
    """Scaled cosines between image features and class vectors that training moves."""

    threshold: nn.Parameter | None

    def __init__(self, losses: PromptLosses, scale: float, threshold: Tensor | None) -> None:
        """The parts that do not depend on how class vectors come about.

        Args:
            losses: what trains it.
            scale: s.
            threshold: 0-d first θ; None = none.
        """
        super().__init__()
        self.losses, self.scale = losses, scale
        self.threshold = None if threshold is None else nn.Parameter(threshold.clone())

    @abstractmethod
    def class_vectors(self) -> Tensor:
        """(C, P) unit vectors, differentiable in what trains."""

    @abstractmethod
    def caption_distances(self, captions: Tensor, vectors: Tensor) -> Distances:
        """How far captions are from class prompts.

        Args:
            captions: the training array.
            vectors: (C, P) of `class_vectors`.
        """

    def forward(self, features: Tensor) -> Tensor:
        """(B, C) scaled cosines over the threshold from (B, P) features; see `Head.forward`."""
        return self.logits(features, self.class_vectors())

    def logits(self, features: Tensor, vectors: Tensor) -> Tensor:
        """(B, C) float32 z, from (B, P) features as stored and (C, P) unit class vectors."""
        # float32 before θ is taken off: half precision would round θ's small steps away.
        cosines = at_least_float32(F.linear(F.normalize(features, dim=-1), vectors))
        if self.threshold is not None:
            cosines = cosines - self.threshold
        return self.scale * cosines

    def loss(self, features: Features, targets: Tensor, progress: float) -> dict[str, Tensor]:
        """λ L_cls + (1 − λ) L_cse; see `Head.loss`."""
        image, *captions = features
        vectors = self.class_vectors()
        distances = self.caption_distances(captions[0], vectors) if captions else None
        parts: dict[str, Tensor] = self.losses(self.logits(image, vectors), distances, targets)
        return parts

    def param_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Prompts, and the threshold without weight decay."""
        rest = [p for p in self.parameters() if p.requires_grad and p is not self.threshold]
        groups = [{"name": "prompts", "params": rest, "lr": lr, "weight_decay": weight_decay}]
        if self.threshold is not None:
            alone = [self.threshold]
            groups.append({"name": "threshold", "params": alone, "lr": lr, "weight_decay": 0.0})
        return groups
