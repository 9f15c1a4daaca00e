"""Full fine-tuning: every weight of a tower is trained and kept."""

from typing import Literal

from featcache.adapters.base import AdapterConfig, ReplacedWeights
from featcache.backbones.trainable import TrainableTowers


class FullConfig(AdapterConfig):
    """Train whole towers."""

    kind: Literal["full"] = "full"
    """Adapter kind."""
    towers: Literal["image", "text", "both"] = "image"
    """Which towers are trained."""

    def attach(self, towers: TrainableTowers) -> ReplacedWeights:
        """Frees the weights of the chosen towers; see `AdapterConfig.attach`."""
        chosen = ("image", "text") if self.towers == "both" else (self.towers,)
        return ReplacedWeights(
            towers, {name for name in towers.model.state_dict() if towers.tower_of(name) in chosen}
        )
