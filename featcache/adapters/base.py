"""What an adapter must offer: attach to a backbone's towers, give its trained tensors, take them.

Adding one is one new file in this folder: subclass `AdapterConfig` and `Adapter`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from featcache.backbones.base import Backbone
from featcache.backbones.trainable import TrainableTowers
from featcache.config import Config
from featcache.errors import BackboneError


class Adapter(nn.Module, ABC):
    """An adapter attached to one backbone's towers; all other weights of them are frozen.

    Attributes:
        towers: what it is attached to.
        mergeable: whether `fold` leaves a model whose ordinary weights say it all.
    """

    mergeable: ClassVar[bool] = True

    def __init__(self, towers: TrainableTowers) -> None:
        """Freezes the towers; a subclass then adds or frees what it trains."""
        super().__init__()
        # In a tuple: the towers are no part of this module.
        self._towers = (towers,)
        towers.model.requires_grad_(False)

    @property
    def towers(self) -> TrainableTowers:
        """What it is attached to."""
        return self._towers[0]

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """The trained tensors by name, live: parameters, and buffers that training changes."""

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Those of them that get gradients."""
        return {name: t for name, t in self.state().items() if isinstance(t, nn.Parameter)}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Takes tensors that `state` gave.

        Raises:
            BackboneError: if names or shapes differ.
        """
        own = self.state()
        if missing := sorted(own.keys() ^ state.keys()):
            raise BackboneError(
                f"adapter tensors do not fit {self.towers.name}: {len(missing)} are missing or "
                f"unknown, the first {missing[0]}; the folder was written for another backbone"
            )
        for name, tensor in own.items():
            if tensor.shape != state[name].shape:
                raise BackboneError(
                    f"adapter tensor {name} has shape {tuple(state[name].shape)}, "
                    f"{self.towers.name} needs {tuple(tensor.shape)}"
                )
            tensor.copy_(state[name])

    @abstractmethod
    def fold(self) -> None:
        """Goes over to inference: into the weights where that is possible, for good."""

    def finish(self, backbone: Backbone) -> Backbone:
        """The backbone as extraction uses it, after `fold`; sizes that changed are stated here."""
        return backbone


class AdapterConfig(Config):
    """Options that every adapter shares."""

    trains_on: ClassVar[Literal["pixels", "tokens", "features"]] = "pixels"
    """What training reads: images, or a cache's tokens or features."""

    kind: str
    """Adapter kind."""

    @property
    def trains_text(self) -> bool:
        """Whether text features change in training; an option `towers` says so where there is."""
        return getattr(self, "towers", "image") != "image"

    @abstractmethod
    def attach(self, towers: TrainableTowers) -> Adapter:
        """A fresh adapter on the towers; random numbers come from torch's global generator.

        Raises:
            BackboneError: if the backbone has nothing that it could change.
        """


class ReplacedWeights(Adapter):
    """Weights of the backbone itself, trained and kept by their own names."""

    def __init__(self, towers: TrainableTowers, names: set[str]) -> None:
        """Frees some parameters; buffers among the names are kept with them.

        Args:
            towers: attached to.
            names: of parameters and buffers of `towers.model`.
        """
        super().__init__(towers)
        self._names = sorted(names)
        for name, parameter in towers.model.named_parameters():
            if name in names:
                parameter.requires_grad_(True)

    def train(self, mode: bool = True) -> Self:
        """Modules whose weights are all trained go over to training; the others stay as they are.

        Batch norms of frozen weights keep their statistics, and dropout there stays off.
        """
        super().train(mode)
        model, names = self.towers.model, set(self._names)
        model.eval()
        for prefix, module in model.named_modules() if mode else ():
            own = [f"{prefix}.{name}".lstrip(".") for name, _ in module.named_parameters()]
            if own and names.issuperset(own):
                module.train()
        return self

    def state(self) -> dict[str, Tensor]:
        """The tensors by their names in the model."""
        held = dict(self.towers.model.named_parameters()) | dict(self.towers.model.named_buffers())
        return {name: held[name] for name in self._names}

    def fold(self) -> None:
        """Freezes them; they are in their places."""
        self.towers.model.requires_grad_(False)


def without_tail(backbone: Backbone) -> Backbone:
    """For adapters after which the last blocks cannot be run from cached tokens any more."""
    backbone.spec = replace(backbone.spec, can_finish=False)
    return backbone
