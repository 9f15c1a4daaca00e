"""Visual prompt tuning: learned tokens beside the patches of a frozen vision transformer.

Shapes: B images, P prompts, L tokens before them, W width of a block, K blocks with own prompts.
"""

import functools
import math
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from featcache.adapters.base import Adapter, AdapterConfig, without_tail
from featcache.backbones.base import Backbone
from featcache.backbones.trainable import TrainableTowers
from featcache.errors import BackboneError

_NAME = "inserted_prompts"


class VptConfig(AdapterConfig):
    """Train prompts, and nothing of the backbone."""

    kind: Literal["vpt"] = "vpt"
    """Adapter kind."""
    num_tokens: PositiveInt = 10
    """Prompts P, in tokens."""
    deep: bool = False
    """Give every block prompts of its own; otherwise the first block's are carried through all."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of prompt entries set to zero in training, 0..1, drawn for each image."""

    def attach(self, towers: TrainableTowers) -> "Vpt":
        """Fresh prompts in the image tower; see `AdapterConfig.attach`."""
        return Vpt(towers, self.num_tokens, self.deep, self.dropout)


class Vpt(Adapter):
    """Prompts between the class token and the patches of the image tower.

    The tower's sequence becomes [CLS], P prompts, patches before the norm in front of the first
    block (CLIP's pre-LN), which so applies to the prompts too; prompts get no position embedding.
    Deep: before every further block its own prompts take the place of what the block before made of
    the prompts. Behind the last block they are taken out, so that norm, pooling and projection see
    the tokens they were trained on.

    Reference: Jia et al., Visual Prompt Tuning, ECCV 2022, equations 3-6. Their ViT has no pre-LN.
    """

    mergeable: ClassVar[bool] = False

    def __init__(
        self, towers: TrainableTowers, num_tokens: int, deep: bool, dropout: float
    ) -> None:
        """Inserts the prompts; see `VptConfig`.

        Raises:
            BackboneError: if the image tower is no vision transformer.
        """
        super().__init__(towers)
        if not towers.prompt_entry:
            raise BackboneError(
                f"{towers.name}: its image tower is no plain vision transformer, prompts cannot be "
                "inserted; choose adapter lora, full or linear"
            )
        names = [block.name for block in towers.require_blocks("image")]
        prompts = Prompts(
            len(names) if deep else 1,
            num_tokens,
            towers.width,
            towers.num_prefix_tokens,
            towers.patch_size,
            dropout,
        )
        entry = towers.model.get_submodule(towers.prompt_entry)
        weight = next(towers.model.get_submodule(names[0]).parameters())
        prompts.to(weight.device).train(towers.model.training)
        # Inside the model: it then moves, casts and copies its prompts with its other weights.
        parent = towers.model.get_submodule(towers.prompt_entry.rpartition(".")[0])
        if hasattr(parent, _NAME):
            raise BackboneError(f"{towers.name} already has prompts; open the base itself")
        parent.add_module(_NAME, prompts)
        entry.register_forward_pre_hook(prompts.insert)
        for layer in range(1, len(prompts.values)):
            block = towers.model.get_submodule(names[layer])
            block.register_forward_pre_hook(functools.partial(prompts.replace, layer))
        towers.model.get_submodule(names[-1]).register_forward_hook(prompts.remove)
        self._prompts = (prompts,)

    def state(self) -> dict[str, Tensor]:
        """(K, P, W) float32 prompts; K is 1 unless deep."""
        return {"prompts": self._prompts[0].values}

    def train(self, mode: bool = True) -> Self:
        """The prompts go over to training or evaluation too: they are modules of the tower."""
        super().train(mode)
        self._prompts[0].train(mode)
        return self

    def fold(self) -> None:
        """Freezes the prompts. They stay tokens: no weight of the tower could say the same."""
        self._prompts[0].requires_grad_(False).eval()

    def finish(self, backbone: Backbone) -> Backbone:
        """The backbone without `before_last` tokens: prompts are no part of what a cache holds."""
        return without_tail(backbone)


class Prompts(nn.Module):
    """Prompts, and the hooks that put them into a sequence and take them out.

    Attributes:
        values: (K, P, W) the prompts of each block.
    """

    def __init__(
        self, layers: int, num_tokens: int, width: int, prefix: int, patch_size: int, dropout: float
    ) -> None:
        """Draws the prompts from U(-v, v), v = sqrt(6 / (3·patch² + W)).

        Args:
            layers: K.
            num_tokens: P.
            width: W.
            prefix: tokens in front of the prompts.
            patch_size: side of a patch in pixels.
            dropout: share of entries set to zero in training.
        """
        super().__init__()
        limit = math.sqrt(6 / (3 * patch_size**2 + width))
        self.values = nn.Parameter(torch.empty(layers, num_tokens, width).uniform_(-limit, limit))
        self.dropout = nn.Dropout(dropout)
        self._prefix = prefix

    def _of(self, layer: int, x: Tensor) -> Tensor:
        own = self.values[layer].to(x.dtype).expand(len(x), -1, -1)
        return own if self.dropout.p == 0 else self.dropout(own)

    def insert(self, _: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """(B, L + patches, W) becomes (B, L + P + patches, W)."""
        x = arguments[0]
        parts = (x[:, : self._prefix], self._of(0, x), x[:, self._prefix :])
        return (torch.cat(parts, 1), *arguments[1:])

    def replace(self, layer: int, _: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """The prompts' places get those of a block."""
        x, behind = arguments[0], self._prefix + self.values.shape[1]
        parts = (x[:, : self._prefix], self._of(layer, x), x[:, behind:])
        return (torch.cat(parts, 1), *arguments[1:])

    def remove(self, _: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor:
        """(B, L + P + patches, W) becomes (B, L + patches, W)."""
        behind = self._prefix + self.values.shape[1]
        return torch.cat((output[:, : self._prefix], output[:, behind:]), 1)
