"""Zero-shot classifier: the class whose text feature is closest to the image feature.

Reference: Radford et al., Learning Transferable Visual Models From Natural Language Supervision,
2021, section 3.1.4 (prompt ensembling in embedding space): each template's feature is normalised,
the mean over templates is normalised again.
"""

import math
from typing import ClassVar, Literal, Self

import pandas as pd
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, model_validator
from torch import Tensor

from featcache.errors import BackboneError, ConfigError
from featcache.prompts import TEMPLATES, choose
from heads.base import FeatureSpec, Head, HeadConfig

NameType = Literal["common", "scientific", "both"]


class ZeroShotConfig(HeadConfig):
    """Nothing is trained: images are compared with the class names' text features."""

    needs_prompts: ClassVar[bool] = True

    kind: Literal["zero_shot"] = "zero_shot"
    """Head kind."""
    name_type: NameType | None = None
    """Names that prompts use: common (scientific where there is none), scientific, or the mean of
    both; unset = both if the class table has scientific and common names, otherwise `templates`."""
    templates: str | list[str] | None = None
    """Name of a template set, or templates such as "a photo of a {name}."; `biology` describes
    species, genus, family and order; unset = the set that suits the dataset."""
    scale: PositiveFloat | None = None
    """Multiplier of the cosines, > 0; unset = the backbone's own (100 for CLIP)."""
    cosine_threshold: float = Field(default=0.25, ge=-1, le=1)
    """Cosine that becomes probability 0.5 in a multi-label set, -1..1; rankings ignore it."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.name_type is not None and self.templates is not None:
            raise ValueError(
                f"name_type={self.name_type} and templates={self.templates!r} both choose the "
                "prompts; set one of the two"
            )
        return self

    def template_names(self, classes: pd.DataFrame, kind: str) -> list[str]:
        """The templates that the options mean for a class table.

        Raises:
            ConfigError: if `templates` names no known set.
        """
        if isinstance(self.templates, list):
            return list(self.templates)
        both = {"common_name", "scientific_name"} <= set(map(str, classes.columns))
        name = self.templates or self.name_type or ("both" if both else None)
        name = name or choose(kind, [str(column) for column in classes.columns])
        if name not in TEMPLATES:
            raise ConfigError(
                f"head.templates: no template set {name!r}; known: {', '.join(sorted(TEMPLATES))}, "
                "or give a list of templates"
            )
        return list(TEMPLATES[name])

    def build(self, spec: FeatureSpec) -> "ZeroShot":
        """The classifier over the text features of `spec`.

        Raises:
            BackboneError: if their width is not that of the image features.
        """
        if spec.prompts is None:
            raise ValueError("zero_shot needs class text features in FeatureSpec.prompts")
        if spec.prompts.shape[-1] != spec.feature_dim:
            raise BackboneError(
                f"text features have width {spec.prompts.shape[-1]}, image features "
                f"{spec.feature_dim}; zero_shot needs both in the shared space"
            )
        return ZeroShot(
            ensemble(spec.prompts),
            scale=self.scale or spec.logit_scale,
            cosine_threshold=self.cosine_threshold if spec.task == "multi_label" else 0.0,
        )


def ensemble(prompts: Tensor) -> Tensor:
    """(C, P) unit class vectors: templates normalised, averaged, normalised again.

    Args:
        prompts: (T, C, P) float32, not normalised.
    """
    return F.normalize(F.normalize(prompts, dim=-1).mean(0), dim=-1)


class ZeroShot(Head):
    """Scaled cosines between image features and class vectors."""

    trainable = False
    vectors: Tensor

    def __init__(self, vectors: Tensor, *, scale: float, cosine_threshold: float = 0.0) -> None:
        """Fixed class vectors.

        Args:
            vectors: (C, P) unit class vectors.
            scale: multiplier of the cosines.
            cosine_threshold: cosine that gives logit 0.
        """
        super().__init__()
        if not math.isfinite(scale):
            raise ValueError(f"scale is {scale}; expected a finite number")
        self.scale, self.cosine_threshold = scale, cosine_threshold
        self.register_buffer("vectors", vectors)

    def forward(self, features: Tensor) -> Tensor:
        """(B, C) scale × (cosine − threshold) from (B, P) features; see `Head.forward`."""
        cosines = F.linear(F.normalize(features, dim=-1), self.vectors)
        return self.scale * (cosines - self.cosine_threshold)
