"""No adapter: the backbone stays as it is, and only a head on it is trained."""

from typing import Literal

from featcache.adapters.base import AdapterConfig, ReplacedWeights
from featcache.backbones.trainable import TrainableTowers


class LinearConfig(AdapterConfig):
    """Train a head on the frozen backbone, on pixels: the yardstick of the others."""

    kind: Literal["linear"] = "linear"
    """Adapter kind."""

    def attach(self, towers: TrainableTowers) -> ReplacedWeights:
        """Freezes everything; see `AdapterConfig.attach`."""
        return ReplacedWeights(towers, set())
