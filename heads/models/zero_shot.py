"""Zero-shot classifier: the class whose text feature is closest to the image feature.

Reference: Radford et al., Learning Transferable Visual Models From Natural Language Supervision,
2021, section 3.1.4 (prompt ensembling in embedding space): each template's feature is normalised,
the mean over templates is normalised again.
"""

import math
from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal, Self

import pandas as pd
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator
from torch import Tensor

from featcache.class_text import ensemble
from featcache.errors import BackboneError, ConfigError
from featcache.prompts import choose_zero_shot, expand
from heads.base import FeatureSpec, Head, HeadConfig

NameType = Literal["common", "scientific", "both"]
_GUESS = 0.25
"""Cosine of a class that is there, about, for CLIP; it differs from one backbone to the next."""


class ZeroShotConfig(HeadConfig):
    """Nothing is trained: images are compared with the class names' text features."""

    needs_prompts: ClassVar[bool] = True

    kind: Literal["zero_shot"] = "zero_shot"
    """Head kind."""
    name_type: NameType | None = None
    """Names that prompts use: common (scientific where there is none), scientific, or the mean of
    both; unset = both if the class table has scientific and common names, otherwise `templates`."""
    templates: str | list[str] | None = None
    """Names of template sets and templates such as "a photo of a {name}.", one or several (with a
    comma inside as a JSON list); `biology` describes species, genus, family and order, `imagenet`
    and `cifar10` are the published ensembles; unset = the set that suits the dataset."""
    template_weights: list[NonNegativeFloat] | None = Field(default=None, min_length=1)
    """Shares of the templates in the class vector, one for each template in the order given, each 0
    or more; they need not sum to 1; unset = equal. Changing them encodes no text."""
    weigh_templates: Literal["equal", "validation"] = "equal"
    """validation = the mean of all templates or one alone (one set alone where several are named),
    whichever scores best on the validation rows; `by_candidate` in metrics.json lists all."""
    scale: PositiveFloat | None = None
    """Multiplier of the cosines, > 0; unset = the backbone's own (100 for CLIP)."""
    cosine_threshold: float | None = Field(default=None, ge=-1, le=1)
    """Cosine that becomes probability 0.5 in a multi-label set, -1..1; rankings ignore it. Unset =
    0.25 in probabilities, a guess: metrics that need a threshold (precision, recall, F1) are left
    out then, and predictions only rank."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.name_type is not None and self.templates is not None:
            raise ValueError(
                f"name_type={self.name_type} and templates={self.templates!r} both choose the "
                "prompts; set one of the two"
            )
        return self

    @model_validator(mode="after")
    def _possible_weights(self) -> Self:
        if self.template_weights is None:
            return self
        if self.weigh_templates == "validation":
            raise ValueError(
                f"template_weights={self.template_weights} and weigh_templates=validation both "
                "weigh the templates; set one of the two"
            )
        if not 0 < sum(self.template_weights) < math.inf:
            raise ValueError(
                f"template_weights={self.template_weights} sum to {sum(self.template_weights):g}; "
                "at least one has to be above 0, all finite"
            )
        return self

    def template_names(self, classes: pd.DataFrame, kind: str) -> list[str]:
        """The templates that the options mean for a class table.

        Raises:
            ConfigError: if `templates` names no known set, or weights are not one for each.
        """
        columns = [str(column) for column in classes.columns]
        names = self.templates or self.name_type or choose_zero_shot(kind, columns)
        found = expand(names, "head.templates")
        self._require_weights(len(found))
        return found

    def only(self, candidate: str) -> Self:
        """The config that uses just that template or set; "" = all of them."""
        update: dict[str, object] = {"weigh_templates": "equal"}
        if candidate:
            update |= {"templates": [candidate], "name_type": None}
        return self.model_copy(update=update)

    def build(self, spec: FeatureSpec) -> "ZeroShot":
        """The classifier over the text features of `spec`, or of those that `templates` names.

        Raises:
            BackboneError: if their width is not that of the image features.
            ConfigError: if there is not one weight for each template.
        """
        if spec.prompts is None:
            raise ValueError("zero_shot needs class text features in FeatureSpec.prompts")
        if spec.prompts.shape[-1] != spec.feature_dim:
            raise BackboneError(
                f"text features have width {spec.prompts.shape[-1]}, image features "
                f"{spec.feature_dim}; zero_shot needs both in the shared space"
            )
        place = {template: index for index, template in enumerate(spec.templates)}
        prompts = spec.prompts
        if place and self.templates is not None:
            prompts = prompts[[place[t] for t in expand(self.templates) if t in place]]
        self._require_weights(len(prompts))
        alternatives = {}
        if self.weigh_templates == "validation" and place:
            several = isinstance(self.templates, list) and len(self.templates) > 1
            for name in self.templates if several and self.templates else spec.templates:
                alternatives[name] = ensemble(spec.prompts[[place[t] for t in expand(name)]])
        threshold = 0.0
        if spec.task == "multi_label":
            threshold = _GUESS if self.cosine_threshold is None else self.cosine_threshold
        head = ZeroShot(
            ensemble(prompts, self.template_weights),
            scale=self.scale or spec.logit_scale,
            cosine_threshold=threshold,
            alternatives=alternatives,
        )
        head.has_probabilities = spec.task != "multi_label" or self.cosine_threshold is not None
        return head

    def _require_weights(self, num_templates: int) -> None:
        if self.template_weights is not None and len(self.template_weights) != num_templates:
            raise ConfigError(
                f"head.template_weights: found {len(self.template_weights)} weights for "
                f"{num_templates} templates; give one for each"
            )


class ZeroShot(Head):
    """Scaled cosines between image features and class vectors."""

    trainable = False
    vectors: Tensor

    def __init__(
        self,
        vectors: Tensor,
        *,
        scale: float,
        cosine_threshold: float = 0.0,
        alternatives: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Fixed class vectors.

        Args:
            vectors: (C, P) unit class vectors.
            scale: multiplier of the cosines.
            cosine_threshold: cosine that gives logit 0.
            alternatives: further (C, P) unit vectors by name, for `candidates`.
        """
        super().__init__()
        if not math.isfinite(scale):
            raise ValueError(f"scale is {scale}; expected a finite number")
        self.scale, self.cosine_threshold = scale, cosine_threshold
        self.register_buffer("vectors", vectors)
        self.names = list(alternatives or {})
        for index, other in enumerate((alternatives or {}).values()):
            self.register_buffer(f"alternative_{index}", other, persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        """(B, C) scale × (cosine − threshold) from (B, P) features; see `Head.forward`."""
        return self._scores(F.normalize(features, dim=-1), self.vectors)

    def candidates(self, *features: Tensor) -> Iterator[tuple[str, Tensor]]:
        """(B, C) logits of all templates together, under "", and of each alternative."""
        (image,) = features
        unit = F.normalize(image, dim=-1)
        yield "", self._scores(unit, self.vectors)
        for index, name in enumerate(self.names):
            yield name, self._scores(unit, self.get_buffer(f"alternative_{index}"))

    def _scores(self, unit: Tensor, vectors: Tensor) -> Tensor:
        return self.scale * (F.linear(unit, vectors) - self.cosine_threshold)
