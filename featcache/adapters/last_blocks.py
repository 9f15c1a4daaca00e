"""The last blocks of the image tower trained, everything below them frozen.

What enters them never changes, so a cache that holds it (`features.tokens before_last:n`) replaces
the images: training runs the last blocks only, without decoding, stem or the blocks below.
"""

from typing import ClassVar, Literal

from pydantic import PositiveInt

from featcache.adapters.base import AdapterConfig, ReplacedWeights
from featcache.backbones.trainable import TrainableTowers


class LastBlocksConfig(AdapterConfig):
    """Train the last blocks of a vision transformer, from cached tokens."""

    trains_on: ClassVar[Literal["pixels", "tokens", "features"]] = "tokens"

    kind: Literal["last_blocks"] = "last_blocks"
    """Adapter kind."""
    num_blocks: PositiveInt = 1
    """Blocks from the end; final norm, pooling and projection are trained with them."""

    def attach(self, towers: TrainableTowers) -> ReplacedWeights:
        """Frees the weights of `Backbone.tail`; see `AdapterConfig.attach`."""
        tail = towers.tail(self.num_blocks)
        shared = {id(tensor) for tensor in (*tail.parameters(), *tail.buffers())}
        held = (*towers.model.named_parameters(), *towers.model.named_buffers())
        return ReplacedWeights(towers, {name for name, tensor in held if id(tensor) in shared})
