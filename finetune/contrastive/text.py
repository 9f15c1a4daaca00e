"""Captions as token ids, and the cheap way through a CLIP text tower.

Three savings, none of which changes a result: each distinct caption is tokenized and encoded once,
a batch is cut to its longest caption (a causal tower cannot see what follows the end token), and
the optimiser sees only the embedding rows of words that occur.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt
import open_clip
import torch
from torch import Tensor, nn

from finetune.contrastive.architectures import Tokenizer


@dataclass(frozen=True)
class TokenTable:
    """Distinct texts as token ids.

    Attributes:
        ids: (U, context length) int32, padded with zeros.
        lengths: (U,) int64, tokens up to and including the end token.
    """

    ids: npt.NDArray[np.int32]
    lengths: npt.NDArray[np.int64]

    @classmethod
    def of(cls, texts: Sequence[str], tokenizer: Tokenizer) -> "TokenTable":
        """The table of `texts`, row by row; a text that is too long is cut but keeps its end."""
        ids = tokenizer(list(texts)).numpy().astype(np.int32)
        # CLIP's end token has the highest id of all, so the first maximum of a row is its end.
        return cls(ids, ids.argmax(axis=1).astype(np.int64) + 1)

    def rows(self, which: npt.NDArray[np.int64]) -> Tensor:
        """(n, longest of them) int64 token ids."""
        return torch.from_numpy(self.ids[which, : int(self.lengths[which].max())].astype(np.int64))


def can_shorten(model: nn.Module) -> bool:
    """Whether the text tower is CLIP's own: causal, read at the end token, learned positions."""
    return (
        isinstance(model, open_clip.CLIP)
        and model.text_pool_type == "argmax"
        and model.attn_mask is not None
    )


def encode_text(model: nn.Module, tokens: Tensor) -> Tensor:
    """(n, P) text features, not normalised: what `model.encode_text` returns for padded tokens.

    Args:
        model: open_clip model.
        tokens: (n, L) int64; L up to the context length, each row with its end token.
    """
    if not can_shorten(model):
        missing = int(model.context_length) - tokens.shape[1]  # type: ignore[arg-type]
        features: Tensor = model.encode_text(nn.functional.pad(tokens, (0, missing)))  # type: ignore[operator]
        return features
    assert isinstance(model, open_clip.CLIP)
    length = tokens.shape[1]
    x = model.token_embedding(tokens) + model.positional_embedding[:length]
    x = model.transformer(x, attn_mask=model.attn_mask[:length, :length])
    x = model.ln_final(x[torch.arange(len(x), device=x.device), tokens.argmax(dim=-1)])
    projection = model.text_projection
    if projection is not None:
        x = projection(x) if isinstance(projection, nn.Linear) else x @ projection
    return cast(Tensor, x)


class UsedVocabulary:
    """A model's token embedding cut to the ids that occur, until `restore` puts it back.

    A dense optimiser step over all 49,408 rows costs more than the rest of a small text tower. Rows
    of ids that never occur get no gradient; here they also get no weight decay, so they stay at
    their initial values. Ids keep their order: the end token stays the highest, which is how CLIP
    finds it.
    """

    def __init__(self, model: nn.Module, used: npt.NDArray[np.int32]) -> None:
        """Cuts the embedding of `model`, in place.

        Args:
            model: open_clip model for which `can_shorten` holds.
            used: token ids that may be asked for, any order, repeats allowed.
        """
        assert isinstance(model, open_clip.CLIP)
        self._model = model
        self._full: Tensor = model.token_embedding.weight.detach().clone()
        self._used = np.unique(used)
        model.token_embedding = _embedding(self.cut(self._full))

    def compact(self, table: TokenTable) -> TokenTable:
        """The same table with ids that count into the cut embedding.

        Raises:
            KeyError: if an id is not among the used ones.
        """
        ids = np.searchsorted(self._used, table.ids)
        if not np.array_equal(self._used[ids.clip(max=len(self._used) - 1)], table.ids):
            raise KeyError("token id outside the used vocabulary")
        return TokenTable(ids.astype(np.int32), table.lengths)

    name = "token_embedding.weight"
    """Of the embedding in the model's state."""

    def cut(self, weight: Tensor) -> Tensor:
        """The rows of a full (vocabulary, width) embedding that occur."""
        return weight[torch.from_numpy(self._used).to(weight.device, torch.int64)]

    def expanded(self, weight: Tensor) -> Tensor:
        """The full embedding with the rows of a cut one in their places; others as at the start."""
        full = self._full.to(weight.device, copy=True)
        rows = torch.from_numpy(self._used).to(weight.device, torch.int64)
        full[rows] = weight.detach().to(full.dtype)
        return full

    def restore(self) -> None:
        """Gives the model its full embedding back, with the trained rows in their places."""
        self._model.token_embedding = _embedding(self.expanded(self._model.token_embedding.weight))


def _embedding(rows: Tensor) -> nn.Embedding:
    count, width = rows.shape
    return nn.Embedding(count, width, _weight=rows)
