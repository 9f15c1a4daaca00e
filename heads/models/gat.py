"""Classifiers that learn from each other along a graph of labels that occur together.

Each label has a vector; two layers of attention over the label graph (see `heads.label_graph`) mix
it with those of the labels in its company, and the result U′ classifies: with m = proj(f), a
two-layer network on the row's scaled vector, z_c = <m, U′_c> + b_c. A label with few training
rows so borrows from the frequent ones that it is seen with.

Reference: systems "MultiCLIP", its `gat` model as intended; Veličković et al., Graph Attention
Networks, 2018; Chen et al., Multi-Label Image Recognition with Graph Convolutional Networks, 2019.
Departures: nodes are labels, never the rows of a batch, and edges are always given; attention
starts from the observed frequency (log A_ij); the product is divided by the root of its width.
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

import pandas as pd
import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from featcache.class_text import ensemble
from featcache.errors import ConfigError
from featcache.prompts import choose_zero_shot, expand
from heads.base import Features, FeatureSpec, Head, HeadConfig, OptimDefaults
from heads.label_graph import GraphAttention, adjacency
from heads.losses.base import Loss
from heads.mlp import Mlp, RowScale, RowScaling
from heads.models.naive import ARRAYS, Feature


class GatConfig(HeadConfig):
    """Attention over the graph of labels that occur together in training rows."""

    takes_loss: ClassVar[bool] = True
    optim_defaults: ClassVar[OptimDefaults] = OptimDefaults(
        lr=1e-3, weight_decay=0.01, epochs=100, batch_size=1024
    )

    kind: Literal["gat"] = "gat"
    """Head kind."""
    feature: Feature = "projected"
    """projected = image features in the space shared with text; pooled = the wider ones before it;
    multimodal = the joint encoder's of image and caption (blip); text = the captions' own."""
    scaling: RowScaling = "standard"
    """standard = each column to mean 0 and deviation 1 over the training rows; l2 = each row to
    norm 1, times the root of the width; none = as stored."""
    nodes: Literal["learned", "text"] = "learned"
    """What labels start from: learned = vectors of their own; text = the text features of their
    names, fixed."""
    threshold: float = Field(default=0.05, ge=0, le=1)
    """Edges below this share of a label's company are left out, 0..1."""
    width: PositiveInt = 256
    """Width of label vectors and of what rows are brought to, a multiple of num_heads."""
    num_heads: PositiveInt = 4
    """Attention heads, 1 or more."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Share of attention weights and of hidden units dropped in training, 0 to below 1."""
    templates: str | list[str] | None = None
    """Prompt templates of nodes=text, one or several; unset = the set that suits the dataset."""

    @model_validator(mode="after")
    def _heads_share_the_width(self) -> Self:
        if self.width % self.num_heads:
            raise ValueError(
                f"width {self.width} is no multiple of num_heads {self.num_heads}; change one"
            )
        return self

    def arrays(self) -> tuple[str, ...]:
        """The array that `feature` names."""
        return (ARRAYS[self.feature],)

    def wants_statistics(self) -> bool:
        """True for `scaling=standard`."""
        return self.scaling == "standard"

    def wants_cooccurrence(self) -> bool:
        """True: it is the graph."""
        return True

    def wants_prompts(self) -> bool:
        """True for `nodes=text`."""
        return self.nodes == "text"

    def template_names(self, classes: pd.DataFrame, kind: str) -> list[str]:
        """The templates asked for, or the set that suits the dataset.

        Raises:
            ConfigError: if `templates` names no known set.
        """
        columns = [str(column) for column in classes.columns]
        return expand(self.templates or choose_zero_shot(kind, columns), "head.templates")

    def build(self, spec: FeatureSpec) -> "Gat":
        """The head over the label graph of `spec`.

        Raises:
            ConfigError: for one label a row, or if no two labels ever meet.
        """
        if spec.task != "multi_label":
            raise ConfigError(
                f"head gat: the cache's task is {spec.task}, expected multi_label; with one label "
                "a row no two labels occur together, choose another head"
            )
        graph = None
        if spec.cooccurrence is not None:
            edges = adjacency(spec.cooccurrence, self.threshold)
            if spec.num_classes > 1 and not (edges > 0).sum() > spec.num_classes:
                raise ConfigError(
                    "head gat: no two labels of the training rows have an edge (threshold "
                    f"{self.threshold:g}); lower head.threshold, or choose another head"
                )
            graph = torch.from_numpy(edges).float()
        if self.nodes == "text" and spec.prompts is None:
            raise ValueError("nodes=text needs class text features in FeatureSpec.prompts")
        width = spec.width(ARRAYS[self.feature])
        text = ensemble(spec.prompts) if self.nodes == "text" and spec.prompts is not None else None
        return Gat(
            RowScale(width, self.scaling, spec.mean, spec.std),
            Mlp(width, self.width, dropout=self.dropout),
            spec.num_classes,
            self.width,
            num_heads=self.num_heads,
            dropout=self.dropout,
            graph=graph,
            text=text,
            criterion=spec.criterion,
        )


class Gat(Head):
    """Inner products of rows with label vectors that went through two layers of attention."""

    edges: Tensor
    text: Tensor

    def __init__(
        self,
        scale: RowScale,
        project: Mlp,
        num_classes: int,
        width: int,
        *,
        num_heads: int = 4,
        dropout: float = 0.0,
        graph: Tensor | None = None,
        text: Tensor | None = None,
        criterion: Loss | None = None,
    ) -> None:
        """Standard-normal label vectors, Xavier weights, zero offsets.

        Args:
            scale: what rows go through first.
            project: D → width.
            num_classes: C.
            width: of label vectors.
            num_heads: attention heads.
            dropout: share of attention weights dropped in training.
            graph: (C, C) A with ones on the diagonal; unset = to be loaded.
            text: (C, E) unit text features that labels start from; unset = learned vectors.
            criterion: the loss on logits; unset = the head only predicts.
        """
        super().__init__()
        self.scale, self.project, self.criterion = scale, project, criterion
        self.register_buffer("edges", torch.eye(num_classes) if graph is None else graph.clone())
        if text is None:
            self.labels: nn.Parameter | None = nn.Parameter(torch.randn(num_classes, width))
        else:
            self.labels = None
            centred = F.normalize(text - text.mean(0), dim=1) * math.sqrt(text.shape[1])
            self.register_buffer("text", centred)
        inner = width if text is None else text.shape[1]
        self.first = GraphAttention(inner, width, num_heads, dropout=dropout)
        self.second = GraphAttention(width, width, num_heads, average=True, dropout=dropout)
        self.bias = nn.Parameter(torch.zeros(num_classes))

    def forward(self, features: Tensor) -> Tensor:
        """(B, C) logits from (B, D) features as stored; see `Head.forward`."""
        rows: Tensor = self.project(self.scale(features))
        labels = self.label_vectors().to(rows.dtype)
        return (rows @ labels.t()).float() / math.sqrt(rows.shape[1]) + self.bias

    def label_vectors(self) -> Tensor:
        """(C, width) U′: what the graph made of the labels' own vectors."""
        nodes = self.text if self.labels is None else self.labels
        log_adjacency = self.edges.log()
        inner = F.elu(self.first(nodes, log_adjacency))
        result: Tensor = self.second(inner, log_adjacency)
        return result

    def label_graph(self) -> Tensor:
        """(C, C) float32 A, 0 = no edge: which labels a label listens to, by share of company."""
        return self.edges

    def loss(self, features: Features, targets: Tensor, progress: float) -> dict[str, Tensor]:
        """The chosen loss of the logits."""
        assert self.criterion is not None, "built without a loss"
        return {"loss": self.criterion(self(*features), targets)}

    def param_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Two groups: matrices, and offsets without weight decay."""
        decayed = [p for p in self.parameters() if p.requires_grad and p.ndim > 1]
        others = [p for p in self.parameters() if p.requires_grad and p.ndim <= 1]
        return [
            {"params": decayed, "lr": lr, "weight_decay": weight_decay},
            {"params": others, "lr": lr, "weight_decay": 0.0},
        ]

    def trained_state(self, candidate: str = "") -> Mapping[str, Tensor]:
        """All tensors: graph and scaling decide as much as the weights."""
        return {name: tensor.detach() for name, tensor in self.state_dict().items()}
