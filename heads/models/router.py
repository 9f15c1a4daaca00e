"""Router: one classifier a modality, weighted row by row by how far each is to be trusted.

With f_m the scaled vector of modality m, and for each modality two networks of the form
Linear(d→d), ReLU, Linear(d→·), head_m with C outputs and r_m with one:

    z = Σ_m w_m head_m(f_m),    w = softmax over modalities of r_m(f_m).

The weights of a row are ≥ 0 and sum to 1. A modality that a row does not have gets weight 0, so one
model serves rows with and without captions.

Reference: systems "MultiCLIP" (multi-label image and caption classification), its `clip` model.
Departures: r_m gives one scalar, read from its own modality; missing modalities are masked; joint
image-text vectors can be a third modality; training can hide modalities.
"""

from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from heads.base import Features, FeatureSpec, Head, HeadConfig, OptimDefaults
from heads.losses.base import Loss
from heads.mlp import OPTIM_DEFAULTS, Mlp, RowScale, present

Modality = Literal["image", "text", "multimodal"]


class RoutedConfig(HeadConfig):
    """Options that every head with a router shares."""

    takes_loss: ClassVar[bool] = True
    optim_defaults: ClassVar[OptimDefaults] = OPTIM_DEFAULTS

    modalities: tuple[Modality, ...] = Field(default=("image", "text"), min_length=2, max_length=3)
    """Two or three of image, text (the captions) and multimodal (the joint encoder's vector of
    image and caption, from blip)."""
    image_feature: Literal["projected", "pooled"] = "projected"
    """Image vectors: projected = in the space shared with text; pooled = the wider ones before."""
    hidden: PositiveInt | None = None
    """Hidden units of each network, 1 or more; unset = as many as its input is wide."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of hidden units dropped in training, 0 to below 1."""
    hide_share: float = Field(default=0.0, ge=0, lt=1)
    """Share of training rows of which one modality, drawn at random, is hidden, 0 to below 1;
    raises what rows without captions score. The last modality of a row is never hidden."""

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        if len(set(self.modalities)) < len(self.modalities):
            raise ValueError(f"modalities {', '.join(self.modalities)} name one twice")
        return self

    def arrays(self) -> tuple[str, ...]:
        """The array of each modality."""
        names: Mapping[Modality, str] = {
            "image": f"image/{self.image_feature}",
            "text": "text/projected",
            "multimodal": "image/multimodal_pooled",
        }
        return tuple(names[one] for one in self.modalities)

    def branches(self, spec: FeatureSpec, common_width: int | None = None) -> dict[str, "Branch"]:
        """A freshly initialised branch for each modality; see `Branch`."""
        return {
            name: Branch(
                spec.width(array), spec.num_classes, self.hidden, self.dropout, common_width
            )
            for name, array in zip(self.modalities, self.arrays(), strict=True)
        }


class RouterConfig(RoutedConfig):
    """Classifiers of image, caption and both, weighted by trained scalars."""

    kind: Literal["router"] = "router"
    """Head kind."""

    def build(self, spec: FeatureSpec) -> "Router":
        """The head; its loss is the one that `spec` brings."""
        return Router(self.branches(spec), spec.criterion, self.hide_share)


class Branch(nn.Module):
    """What one modality says, and how far it is to be trusted."""

    def __init__(
        self,
        width: int,
        num_classes: int,
        hidden: int | None = None,
        dropout: float = 0.0,
        common_width: int | None = None,
    ) -> None:
        """Two networks on the same input.

        Args:
            width: D of the modality's vectors.
            num_classes: C.
            hidden: units of each network; unset = as many as its input is wide.
            dropout: share of hidden units that training drops.
            common_width: brings vectors to this width first, by a trained linear map; unset = not.
        """
        super().__init__()
        self.scale = RowScale(width)
        self.project: nn.Module = nn.Linear(width, common_width) if common_width else nn.Identity()
        self.classifier = Mlp(common_width or width, num_classes, hidden, dropout)
        self.trust = Mlp(common_width or width, 1, hidden, dropout)

    def read(self, features: Tensor) -> Tensor:
        """(B, H) what both networks read, from (B, D) vectors as stored."""
        vectors: Tensor = self.project(self.scale(features))
        return vectors


class Router(Head):
    """Classifiers weighted row by row."""

    def __init__(
        self, branches: Mapping[str, Branch], criterion: Loss | None = None, hide_share: float = 0.0
    ) -> None:
        """A head over M modalities.

        Args:
            branches: by modality, in the order in which `forward` takes their vectors.
            criterion: the loss on logits; unset = the head only predicts.
            hide_share: share of training rows of which one modality is hidden.
        """
        super().__init__()
        self.branches = nn.ModuleDict(branches)
        self.criterion, self.hide_share = criterion, hide_share

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names of the M modalities, in the order of the columns of `weights`."""
        return tuple(self.branches)

    def _parts(self) -> Iterator[Branch]:
        for branch in self.branches.values():
            assert isinstance(branch, Branch)
            yield branch

    def forward(self, *features: Tensor) -> Tensor:
        """(B, C) logits from M times (B, D_m) vectors as stored; see `Head.forward`.

        A row that has none of the modalities gets logits 0.
        """
        vectors = self.read(features)
        return fuse(self.alone(vectors), self.routing(vectors, held(features)))

    def weights(self, *features: Tensor) -> Tensor:
        """(B, M) float32 weights of the modalities: 0 where one is missing, sum 1 where any is."""
        return self.routing(self.read(features), held(features))

    def monitors(self, *features: Tensor) -> Iterator[tuple[str, Tensor]]:
        """What each modality's classifier says alone, by its name."""
        yield from zip(self.modalities, self.alone(self.read(features)), strict=True)

    def loss(self, features: Features, targets: Tensor, progress: float) -> dict[str, Tensor]:
        """The chosen loss of the weighted logits, and the mean weight of each modality."""
        assert self.criterion is not None, "built without a loss"
        vectors = self.read(features)
        weights = self.routing(vectors, self._hide(held(features)))
        shares = dict(zip(self.modalities, weights.detach().mean(0), strict=True))
        return {
            "loss": self.criterion(fuse(self.alone(vectors), weights), targets),
            **{f"weight_{name}": share for name, share in shares.items()},
        }

    def read(self, features: Features) -> list[Tensor]:
        """M times (B, H): what the networks of each modality read."""
        return [branch.read(part) for branch, part in zip(self._parts(), features, strict=True)]

    def alone(self, vectors: list[Tensor]) -> list[Tensor]:
        """M times (B, C): the logits of each modality's classifier."""
        return [
            branch.classifier(part) for branch, part in zip(self._parts(), vectors, strict=True)
        ]

    def routing(self, vectors: list[Tensor], usable: Tensor) -> Tensor:
        """(B, M) weights over the modalities that are `usable`, (B, M) bool."""
        trust = [branch.trust(part) for branch, part in zip(self._parts(), vectors, strict=True)]
        return routing_weights(torch.cat(trust, 1), usable)

    def _hide(self, usable: Tensor) -> Tensor:
        """`usable` without one modality of the rows that are drawn and have several."""
        if not self.hide_share:
            return usable
        drawn = torch.rand(len(usable), device=usable.device) < self.hide_share
        drawn &= usable.sum(1) > 1
        ranks = torch.rand(usable.shape, device=usable.device).masked_fill_(~usable, -1.0)
        hidden = torch.zeros_like(usable).scatter_(1, ranks.argmax(1, keepdim=True), True)
        return usable & ~(hidden & drawn[:, None])


def held(features: Features) -> Tensor:
    """(B, M) bool: which modalities each row has."""
    return torch.stack([present(part) for part in features], 1)


def routing_weights(trust: Tensor, usable: Tensor) -> Tensor:
    """(B, M) float32 softmax over the usable modalities of a row; all 0 where none is.

    Args:
        trust: (B, M) scalars of the modalities.
        usable: (B, M) bool.
    """
    lowest = torch.finfo(torch.float32).min
    weights = trust.float().masked_fill(~usable, lowest).softmax(1)
    return weights * usable  # a row with nothing usable has equal weights before this


def fuse(logits: list[Tensor], weights: Tensor) -> Tensor:
    """(B, C) float32 Σ_m w_m z_m of M times (B, C) logits and (B, M) weights."""
    total = logits[0].float() * weights[:, :1]
    for index, one in enumerate(logits[1:], 1):
        total = torch.addcmul(total, one.float(), weights[:, index : index + 1])
    return total
