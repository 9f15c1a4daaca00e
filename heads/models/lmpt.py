"""LMPT on features: class text features, each moved by an offset that training finds.

With b_c the class's zero-shot text feature (mean over templates) and o_c its offset:
t_c = (b_c + o_c) / |b_c + o_c|; see `heads.prompt_learning` for logits and losses.

No text tower takes part: a step costs one product of the image features with the class vectors, and
one of the caption features with them, so that batches hold thousands of rows.

Reference: Xia et al., LMPT: Prompt Tuning with Class-Specific Embedding Loss for Long-tailed
Multi-Label Visual Recognition, 2023. Departures: offsets in the space shared by images and text
take the place of context tokens (`lmpt_token` has those), the embedding loss compares caption
features with class vectors, and classes are scored by sigmoids with a learned threshold.
"""

from typing import ClassVar, Literal

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featcache.class_text import ensemble
from featcache.errors import BackboneError
from featcache.prompts import choose_zero_shot, expand
from heads.base import FeatureSpec, OptimDefaults
from heads.losses.class_specific_embedding import Distances, sentence_distances
from heads.prompt_learning import PromptHead, PromptLearningConfig, PromptLosses


class LmptConfig(PromptLearningConfig):
    """Class text features moved by offsets; captions and class counts guide rare classes."""

    takes_loss: ClassVar[bool] = True
    needs_prompts: ClassVar[bool] = True
    optim_defaults: ClassVar[OptimDefaults] = OptimDefaults(
        # Decay keeps rare classes near their text features; Adam moves all classes as far.
        lr=3e-3,
        weight_decay=2.0,
        epochs=50,
        batch_size=4096,
    )

    kind: Literal["lmpt"] = "lmpt"
    """Head kind."""
    csc: bool = True
    """An offset for each class; otherwise one that all classes share."""
    templates: str | list[str] | None = None
    """Prompt templates to start from: names of sets, or format strings over the class table's
    columns, one or several; unset = the set that suits the dataset."""

    def training_arrays(self) -> tuple[str, ...]:
        """Caption features, unless `classification_weight` is 1."""
        return () if self.classification_weight == 1 else ("text/projected",)

    def template_names(self, classes: pd.DataFrame, kind: str) -> list[str]:
        """The templates that the options mean for a class table.

        Raises:
            ConfigError: if `templates` names no known set.
        """
        columns = [str(column) for column in classes.columns]
        return expand(self.templates or choose_zero_shot(kind, columns), "head.templates")

    def build(self, spec: FeatureSpec) -> "Lmpt":
        """Offsets of zero: training starts from the zero-shot classifier.

        Raises:
            BackboneError: if text features have another width than image features.
        """
        if spec.prompts is None:
            raise ValueError("lmpt needs class text features in FeatureSpec.prompts")
        if spec.prompts.shape[-1] != spec.feature_dim:
            raise BackboneError(
                f"text features have width {spec.prompts.shape[-1]}, image features "
                f"{spec.feature_dim}; lmpt needs both in the shared space"
            )
        base = ensemble(spec.prompts)
        return Lmpt(
            base,
            self.losses(spec),
            scale=self.multiplier(spec),
            threshold=self.first_threshold(spec, base),
            csc=self.csc,
        )


class Lmpt(PromptHead):
    """Text features with offsets."""

    base: Tensor

    def __init__(
        self,
        base: Tensor,
        losses: PromptLosses,
        *,
        scale: float,
        threshold: Tensor | None = None,
        csc: bool = True,
    ) -> None:
        """Zero offsets.

        Args:
            base: (C, P) unit class vectors to start from.
            losses: what trains it.
            scale: s.
            threshold: 0-d first θ; None = none.
            csc: an offset for each class.
        """
        super().__init__(losses, scale, threshold)
        self.register_buffer("base", base)
        self.offsets = nn.Parameter(torch.zeros_like(base if csc else base[:1]))

    def class_vectors(self) -> Tensor:
        """(C, P) t_c."""
        return F.normalize(self.base + self.offsets, dim=-1)

    def caption_distances(self, captions: Tensor, vectors: Tensor) -> Distances:
        """1 − cosine of (B, P) caption features and class vectors."""
        return sentence_distances(captions, vectors)
