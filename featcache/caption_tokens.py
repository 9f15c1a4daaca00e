"""Captions of a cache as token ids, for heads that read them word by word."""

from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.backbones.prompt_tower import PromptTower
from featcache.batches import Rows
from featcache.errors import CacheMismatchError
from featcache.layout.feature_array import ComputedArray, checked_rows
from featcache.reader import Cache
from featcache.text_input import TextPolicy, open_policy

CAPTION_TOKENS = "text/token_ids"
"""Name under which heads read them; no cache holds them, its captions are tokenised when read."""

_BLOCK = 4096
"""Rows tokenised at a time."""


class CaptionTokens(ComputedArray):
    """Token ids plus 1 of each row's captions, one behind the other; 0 at padding.

    Several captions are joined by a blank, and cut to the tower's length with the end token kept. A
    row without a caption is all padding. Captions become text by the policy that the cache's text
    features were made with.

    Attributes:
        name: `text/token_ids`.
        shape: (N, L), L the longest text that the tower takes.
        dtype: int32.
    """

    def __init__(self, cache: Cache, tower: PromptTower) -> None:
        """Nothing is tokenised yet.

        Args:
            cache: with captions.
            tower: its backbone's text tower.

        Raises:
            CacheMismatchError: if the function that made its texts has changed since.
        """
        self._tower, self._policy = tower, _policy_of(cache)
        self._offsets, self._captions = cache.captions
        self.name, self.num_views = CAPTION_TOKENS, 1
        self.shape = (cache.num_rows, tower.context_length)
        self.dtype = np.dtype(np.int32)
        self.view, self.blocks = None, None

    @property
    def chunk_rows(self) -> int:
        """Rows that are tokenised together."""
        return _BLOCK

    def take(
        self, rows: Rows, out: npt.NDArray[Any] | None = None, view: int | None = None
    ) -> npt.NDArray[Any]:
        """Tokens of rows in any order; see `FeatureArray.read`."""
        rows = checked_rows(rows, len(self), self.name)
        out = self._output(out, (len(rows), *self.shape[1:]))
        for start in range(0, len(rows), _BLOCK):
            block = rows[start : start + _BLOCK]
            out[start : start + _BLOCK] = self._tokens(block)
        return out

    def _tokens(self, rows: Rows) -> npt.NDArray[np.int32]:
        first, stop = self._offsets[rows], self._offsets[rows + 1]
        own = [[self._captions[i] for i in range(*span)] for span in zip(first, stop, strict=True)]
        texts = self._policy([caption for captions in own for caption in captions])
        ends = np.cumsum([len(captions) for captions in own])
        joined = [
            " ".join(texts[end - len(captions) : end])
            for captions, end in zip(own, ends, strict=True)
        ]
        tokens = self._tower.tokenize(joined)
        ids = tokens.ids.numpy() + 1
        captioned = (stop > first)[:, None]
        return np.where(tokens.mask.numpy() & captioned, ids, 0).astype(np.int32)


def _policy_of(cache: Cache) -> TextPolicy:
    recorded = cache.identity.features.text_policy
    policy = open_policy(recorded.partition("#")[0])
    if policy.name != recorded:
        raise CacheMismatchError(
            f"{cache.path}: its captions became text by {recorded}, this installation has "
            f"{policy.name}; put the original function back, or extract anew"
        )
    return policy
