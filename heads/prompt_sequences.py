"""Where context vectors, class names and the fixed tokens of a prompt stand in its sequence.

With M context vectors V and the name's own tokens, between start and end token:

    end      V name .
    middle   V[:M//2] name V[M//2:] .
    front    name V .

Positions only permute the same tokens: the end token stands at the same place in all three.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from featcache.backbones.prompt_tower import PromptTower
from featcache.errors import ConfigError

Position = Literal["end", "middle", "front"]


@dataclass(frozen=True)
class PromptSequences:
    """Prompts of C classes, with holes where context vectors go.

    Attributes:
        ids: (C, T) int64 token ids; 0 in the holes and behind the end, T the longest prompt.
        places: (C, M) int64 position of each context vector.
        lengths: (C,) int64 tokens of each prompt, start, context and end included.
    """

    ids: Tensor
    places: Tensor
    lengths: Tensor

    @property
    def mask(self) -> Tensor:
        """(C, T) bool, False at padding."""
        return torch.arange(self.ids.shape[1], device=self.ids.device) < self.lengths[:, None]


def prompt_sequences(
    tower: PromptTower, names: Sequence[str], num_context: int, position: Position
) -> PromptSequences:
    """The prompts of class names, cut to the longest of them.

    Args:
        tower: tokenises the names; each keeps all of its tokens, however many.
        names: C class names.
        num_context: M.
        position: of the name; see the module's text.

    Raises:
        ConfigError: if a prompt does not fit into the tower, naming the class.
    """
    # With the full stop, so that a name that ends in one gives the tokens of the whole sentence.
    ids, lengths = tower.tokenize([f"{name}." for name in names])
    longest = int(lengths.max()) + num_context
    if longest > tower.context_length:
        worst = names[int(lengths.argmax())]
        raise ConfigError(
            f"head.n_ctx: {num_context} context vectors and the tokens of class {worst!r} make "
            f"{longest} or more, the text tower takes {tower.context_length}; lower n_ctx, shorten "
            "ctx_init, or take a shorter head.class_name"
        )
    before = {"end": num_context, "middle": num_context // 2, "front": 0}[position]
    rows = torch.zeros(len(names), longest, dtype=torch.int64)
    places = torch.empty(len(names), num_context, dtype=torch.int64)
    for index, length in enumerate(lengths.tolist()):
        name = length - 3  # tokens without start, full stop and end
        context = torch.arange(num_context)
        places[index] = 1 + context + name * (context >= before)
        own = torch.arange(length)
        own[1 : 1 + name] += before
        own[1 + name :] += num_context
        rows[index, own] = ids[index, :length]
    return PromptSequences(rows, places, lengths + num_context)
