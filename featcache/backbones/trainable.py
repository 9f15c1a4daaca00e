"""A backbone's towers opened for training: where gradients enter, and which weights are where.

`Backbone.encode_image` is for extraction: no gradients, any arithmetic. What is here runs the same
modules with gradients, in float32 weights (mixed precision is the caller's autocast), and says by
name where an adapter can hook in. Names of weights and modules count from `model`.

Shapes: B images, n texts, L tokens, W width of a block, P width of a feature.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from featcache.errors import BackboneError

TowerName = Literal["image", "text"]

SITES = ("q", "k", "v", "out", "fc1", "fc2")
"""Matrices of a transformer block: query, key, value and output of the attention, and its MLP."""


@dataclass(frozen=True)
class Site:
    """One matrix of a block: a whole weight, or rows of a weight that several are stacked in.

    Attributes:
        weight: dotted name of the parameter, (rows, columns) = (out, in).
        rows: first row and the one behind the last; None = all.
    """

    weight: str
    rows: tuple[int, int] | None = None


@dataclass(frozen=True)
class Block:
    """A transformer block of a tower.

    Attributes:
        name: dotted name of the module; "" for an attention that is no block of its own.
        sites: its matrices by name, see `SITES`; those it has.
    """

    name: str
    sites: Mapping[str, Site]


class TrainableTowers(nn.Module, ABC):
    """The towers of one backbone, sharing its weights.

    Attributes:
        model: the library's model; holds all weights.
        name: of the backbone, for messages.
        feature_dim: P, width of what `encode_image` returns.
        blocks: blocks of each tower from the input on; empty for towers without attention.
        prompt_entry: module whose input is the (B, L, W) sequence of the image tower before its
            first block, positions added; "" if there is none: then no prompts can be inserted.
        num_prefix_tokens: tokens in that sequence before the patches.
        width: W of the image tower; 0 without blocks.
        patch_size: side of a patch in pixels; 0 without patches.
    """

    model: nn.Module
    name: str
    feature_dim: int
    blocks: Mapping[TowerName, Sequence[Block]]
    prompt_entry: str = ""
    num_prefix_tokens: int = 0
    width: int = 0
    patch_size: int = 0

    @abstractmethod
    def encode_image(self, pixels: Tensor) -> Tensor:
        """(B, P) image features, not normalised: projected ones where the backbone has them.

        Args:
            pixels: (B, 3, H, W) uint8 in 0..255 or float32 normalised, any device.
        """

    @abstractmethod
    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """(n, L) int64 token ids on the CPU; texts that are too long keep their end token."""

    @abstractmethod
    def encode_text(self, tokens: Tensor) -> Tensor:
        """(n, P) text features, not normalised.

        Args:
            tokens: (n, L) of `tokenize`, on the towers' device.

        Raises:
            BackboneError: if there is no text tower.
        """

    @abstractmethod
    def tower_of(self, name: str) -> TowerName | None:
        """The tower that a parameter or buffer belongs to; None = both or neither."""

    @abstractmethod
    def tail(self, num_blocks: int) -> nn.Module:
        """See `Backbone.tail`: the last blocks, sharing weights with `model`."""

    def require_blocks(self, tower: TowerName) -> Sequence[Block]:
        """The blocks of a tower.

        Raises:
            BackboneError: if it has none that an adapter can change.
        """
        blocks = self.blocks.get(tower, ())
        if not blocks:
            raise BackboneError(
                f"{self.name}: its {tower} tower has no attention that an adapter can change; "
                "choose adapter full or linear, or another backbone"
            )
        return blocks
