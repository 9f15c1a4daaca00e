"""Class queries read an image's tokens: a decoder for many labels that small things do not escape.

A fixed random query stands for each group of classes and attends to the tokens (`QueryDecoder`
holds the layer); with h_k what query k found, g = ceil(C/G) and W_k (W, g), class c = k·g + j has
z_c = (h_k W_k)_j + b_c. With text queries there is one query a class, made of its text feature, and
one vector w for all: z_c = <h_c, w> + b, so that classes which were never trained on can be asked
for.

Reference: Ridnik et al., ML-Decoder: Scalable and Versatile Classification Head, 2021, sections 3.2
(group decoding) and 3.4 (zero-shot, with text queries). Departures: tokens are scaled by column
first; groups behind the last class do not exist; text queries come from the cache's own text tower
in place of word vectors, centred on the mean of the trained classes; see also `QueryDecoder`.
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

import pandas as pd
import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator
from torch import Tensor, nn

from featcache.class_text import ensemble
from featcache.prompts import choose_zero_shot, expand
from heads.base import Features, FeatureSpec, Head, HeadConfig, OptimDefaults
from heads.losses.base import Loss
from heads.mlp import RowScale, RowScaling
from heads.query_decoder import QueryDecoder

_ELEMENTS = 2**25
"""Most numbers of one kind that predicting holds at a time (128 MiB of float32)."""


class MlDecoderConfig(HeadConfig):
    """Queries of (groups of) classes attend to each image's tokens."""

    takes_loss: ClassVar[bool] = True
    optim_defaults: ClassVar[OptimDefaults] = OptimDefaults(
        lr=3e-4,
        weight_decay=1e-2,
        epochs=40,
        batch_size=512,
        schedule="one_cycle",
        ema_decay=0.99,
    )

    kind: Literal["ml_decoder"] = "ml_decoder"
    """Head kind."""
    feature: Literal["tokens", "multimodal"] = "tokens"
    """tokens = the image's own; multimodal = the joint encoder's of each image and its first
    caption (blip), padding masked."""
    queries: Literal["random", "text"] = "random"
    """random = one fixed random query for each group of classes; text = one query for each class,
    made of its text feature: classes unseen in training can be asked for (`heads.evaluate --cache`
    of a cache with other classes)."""
    groups: int = Field(default=-1, ge=-1)
    """Groups that the classes are shared among, each with a query, 1 or more; at most one a class;
    -1 = 100. Not read by text queries."""
    width: PositiveInt = 768
    """Width of queries and memory (W), a multiple of num_heads."""
    num_heads: PositiveInt = 8
    """Attention heads, 1 or more."""
    hidden: PositiveInt = 2048
    """Units of the feed-forward part, 1 or more."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Share dropped in training, 0 to below 1."""
    scaling: RowScaling = "standard"
    """standard = each token column to mean 0 and deviation 1 over the training rows; l2 = each
    token to norm 1, times the root of the width; none = as stored."""
    query_noise: NonNegativeFloat = 0.0
    """Normal noise on text queries in training, as a share of their length, 0 or more."""
    templates: str | list[str] | None = None
    """Prompt templates of text queries, one or several; unset = the set that suits the dataset."""

    @model_validator(mode="after")
    def _possible_shape(self) -> Self:
        if self.groups == 0:
            raise ValueError("groups is 0; expected 1 or more, or -1 for 100")
        if self.width % self.num_heads:
            raise ValueError(
                f"width {self.width} is no multiple of num_heads {self.num_heads}; change one"
            )
        if self.query_noise and self.queries != "text":
            raise ValueError(
                f"query_noise {self.query_noise:g} needs queries=text, found {self.queries}"
            )
        return self

    def arrays(self) -> tuple[str, ...]:
        """Tokens, and the mask that says which are padding."""
        if self.feature == "tokens":
            return ("image/tokens",)
        return ("image/multimodal", "image/multimodal_mask")

    def wants_statistics(self) -> bool:
        """True for `scaling=standard`."""
        return self.scaling == "standard"

    def wants_prompts(self) -> bool:
        """True for text queries."""
        return self.queries == "text"

    def template_names(self, classes: pd.DataFrame, kind: str) -> list[str]:
        """The templates asked for, or the set that suits the dataset.

        Raises:
            ConfigError: if `templates` names no known set.
        """
        columns = [str(column) for column in classes.columns]
        return expand(self.templates or choose_zero_shot(kind, columns), "head.templates")

    def build(self, spec: FeatureSpec) -> "MlDecoder":
        """The decoder; its loss is the one that `spec` brings."""
        token_dim = spec.width(self.arrays()[0])
        text = None
        if self.queries == "text":
            if spec.prompts is None:
                raise ValueError("text queries need class text features in FeatureSpec.prompts")
            text = ensemble(spec.prompts)
        return MlDecoder(
            QueryDecoder(token_dim, self.width, self.num_heads, self.hidden, self.dropout),
            spec.num_classes,
            groups=100 if self.groups == -1 else self.groups,
            text=text,
            query_noise=self.query_noise,
            scale=RowScale(token_dim, self.scaling, spec.mean, spec.std),
            criterion=spec.criterion,
        )


class MlDecoder(Head):
    """Group decoding, or one text query a class."""

    queries: Tensor
    text: Tensor
    text_center: Tensor

    def __init__(
        self,
        decoder: QueryDecoder,
        num_classes: int,
        *,
        groups: int = 100,
        text: Tensor | None = None,
        query_noise: float = 0.0,
        scale: RowScale | None = None,
        criterion: Loss | None = None,
    ) -> None:
        """Fixed standard-normal queries, Xavier-normal class weights, zero offsets.

        Args:
            decoder: the layer that reads tokens.
            num_classes: C.
            groups: most groups; G = min(C, groups), less those that would hold no class.
            text: (C, E) class text features for text queries; None = random queries.
            query_noise: see `MlDecoderConfig.query_noise`.
            scale: what tokens go through first; unset = nothing.
            criterion: the loss on logits; unset = the head only predicts.
        """
        super().__init__()
        width = decoder.embed.out_features
        self.decoder, self.scale, self.criterion = decoder, scale, criterion
        self.num_classes, self.query_noise = num_classes, query_noise
        if text is not None:
            self.register_buffer("text", text.clone())
            self.register_buffer("text_center", text.mean(0))
            self.from_text: nn.Linear | None = nn.Linear(text.shape[1], width)
            self.weight = nn.Parameter(torch.empty(width, 1))
            self.bias = nn.Parameter(torch.zeros(1))
        else:
            per_group = -(-num_classes // min(num_classes, groups))  # integer ceil
            num_groups = -(-num_classes // per_group)
            self.register_buffer("queries", torch.randn(num_groups, width))
            self.from_text = None
            self.weight = nn.Parameter(torch.empty(num_groups, width, per_group))
            self.bias = nn.Parameter(torch.zeros(num_classes))
        nn.init.xavier_normal_(self.weight)

    @property
    def any_classes(self) -> bool:
        """Whether `replace_classes` works: text queries stand for classes by their names alone."""
        return self.from_text is not None

    def replace_classes(self, text: Tensor) -> None:
        """Text queries of other classes; see `Head.replace_classes`."""
        if self.from_text is None:
            raise TypeError("random queries stand for the trained classes only; use queries=text")
        self.text = ensemble(text.to(self.text))
        self.num_classes = len(self.text)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, C) logits.

        Args:
            tokens: (B, L, D) float32 as stored; L may differ between calls.
            mask: (B, L) bool, True where there is a token; None = everywhere.

        Returns:
            (B, C) float32, unbounded.
        """
        if torch.is_grad_enabled():
            return self._logits(tokens, mask)
        # Without gradients the intermediate results of few rows are enough.
        inner = max(self.decoder.expand.out_features, self.decoder.num_heads * tokens.shape[1])
        step = max(1, _ELEMENTS // (inner * self._num_queries))
        parts = [
            self._logits(
                tokens[start : start + step], None if mask is None else mask[start:][:step]
            )
            for start in range(0, len(tokens), step)
        ]
        return torch.cat(parts) if parts else tokens.new_zeros(0, self.num_classes)

    def loss(self, features: Features, targets: Tensor, progress: float) -> dict[str, Tensor]:
        """The chosen loss of the logits."""
        assert self.criterion is not None, "built without a loss"
        return {"loss": self.criterion(self(*features), targets)}

    def trained_state(self, candidate: str = "") -> Mapping[str, Tensor]:
        """All tensors: the random queries and the scaling decide as much as the weights."""
        return {name: tensor.detach() for name, tensor in self.state_dict().items()}

    def param_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Two groups: matrices, and offsets and norms without weight decay."""
        decayed = [p for p in self.parameters() if p.requires_grad and p.ndim > 1]
        others = [p for p in self.parameters() if p.requires_grad and p.ndim <= 1]
        return [
            {"params": decayed, "lr": lr, "weight_decay": weight_decay},
            {"params": others, "lr": lr, "weight_decay": 0.0},
        ]

    @property
    def _num_queries(self) -> int:
        return len(self.text) if self.from_text is not None else len(self.queries)

    def _logits(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        if self.scale is not None:
            tokens = self.scale(tokens)
        if self.from_text is None:
            found = self.decoder(self.queries, tokens, mask)
            logits = torch.einsum("bgw,gwk->bgk", found, self.weight).flatten(1)
            return logits[:, : self.num_classes].float() + self.bias
        text = self.text - self.text_center
        if self.training and self.query_noise:
            lengths = text.norm(dim=1, keepdim=True) / math.sqrt(text.shape[1])
            text = text + self.query_noise * lengths * torch.randn_like(text)
        # Unit vectors of a few hundred entries have small ones: bring them to size one.
        text = F.normalize(text, dim=1) * math.sqrt(text.shape[1])
        found = self.decoder(F.relu(self.from_text(text)), tokens, mask)
        scores: Tensor = (found @ self.weight.to(found.dtype)).squeeze(2)
        return scores.float() + self.bias
