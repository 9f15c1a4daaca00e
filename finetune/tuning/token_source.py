"""Inputs of fine-tuning out of a cache: what enters the last blocks, with no image in sight."""

import time
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from featcache.backbones.base import Backbone
from featcache.backbones.trainable import TrainableTowers
from featcache.errors import CacheError
from featcache.reader import Cache
from heads.data import FeatureTable
from heads.parts import Part

IntArray = npt.NDArray[np.int64]

TOKENS = "image/tokens"


class TokenSource:
    """Cached `before_last` tokens; see `finetune.tuning.sources.Source`.

    Training takes any of the views that the cache holds, measuring the plain one. Held on the
    device where they fit into half of its memory, otherwise in host memory, otherwise read batch by
    batch; see `heads.data.FeatureTable`.

    Attributes:
        num_blocks: blocks that run on the tokens; those that are trained are among them.
        num_views: views of each row in the cache.
        waited: seconds that training has waited for inputs so far.
    """

    def __init__(
        self, towers: TrainableTowers, cache: Cache, train: Part, device: torch.device
    ) -> None:
        """Reads the tokens of the training rows.

        Args:
            towers: run the last blocks; see `require_tokens` for whether they fit.
            cache: holds the tokens.
            train: rows trained on.
            device: where inputs go.

        Raises:
            CacheError: if the cache has no such tokens, or a row holds NaN or infinity.
            BackboneError: if the towers cannot be cut there.
        """
        self.num_blocks = require_tokens(cache)
        self._tail = towers.tail(self.num_blocks)
        self._cache, self._device = cache, device
        self._train = FeatureTable(cache.array(TOKENS), train.rows, device)
        self._plain: dict[str, FeatureTable] = {train.name: self._train}
        self.num_views = self._train.num_views
        self.waited = 0.0

    @property
    def problems(self) -> dict[str, str]:
        """None: a cache's valid rows were readable."""
        return {}

    def augmented(
        self, plan: Sequence[IntArray], seed: int, epoch: int, spares: IntArray | None = None
    ) -> Iterator[tuple[Tensor, IntArray]]:
        """(B, L, W) float32 tokens, a random view of each row; see `Source.augmented`."""
        for number, which in enumerate(plan):
            before = time.perf_counter()
            views = None
            if self.num_views > 1:
                drawn = np.random.default_rng([seed, epoch, number]).integers(
                    self.num_views, size=len(which)
                )
                views = torch.from_numpy(drawn)
            tokens = self._train.batch(torch.from_numpy(which), views)
            self.waited += time.perf_counter() - before
            yield tokens, which

    def plain(self, part: Part, batch_size: int) -> Iterator[tuple[Tensor, IntArray]]:
        """(B, L, W) float32 tokens of the plain view; see `Source.plain`."""
        table = self._plain.get(part.name)
        if table is None or not np.array_equal(table.rows, part.rows):
            array = self._cache.array(TOKENS)
            table = self._plain[part.name] = FeatureTable(array, part.rows, self._device)
        for start in range(0, len(part), batch_size):
            which = np.arange(start, min(start + batch_size, len(part)), dtype=np.int64)
            yield table.slice(start, start + batch_size), which

    def encode(self, inputs: Tensor) -> Tensor:
        """(B, P) features with gradients; see `Source.encode`."""
        features: Tensor = self._tail(inputs)
        return features

    def encode_finished(self, backbone: Backbone, inputs: Tensor) -> Tensor:
        """See `Source.encode_finished`."""
        return backbone.finish_from(inputs, self.num_blocks)

    def close(self) -> None:
        """Nothing runs in the background."""


def require_tokens(cache: Cache, num_blocks: int = 1) -> int:
    """The number of last blocks that a cache's tokens stand before.

    Args:
        cache: any.
        num_blocks: blocks that are to be trained.

    Raises:
        CacheError: if it has no such tokens, or they stand behind one of those blocks.
    """
    features = cache.identity.features
    held = features.before_last
    if not held:
        raise CacheError(
            f"{cache.path}: features.tokens is {features.tokens}; training the last {num_blocks} "
            f"blocks needs what enters them: extract with --features.tokens "
            f"before_last:{num_blocks}"
        )
    if held < num_blocks:
        raise CacheError(
            f"{cache.path}: its tokens enter the last {held} blocks, adapter.num_blocks is "
            f"{num_blocks}; lower that, or extract with --features.tokens before_last:{num_blocks}"
        )
    return held
