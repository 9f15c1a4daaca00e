"""A text tower small enough to be written out: characters are tokens."""

from collections.abc import Sequence

import torch
from torch import Tensor

from featcache.backbones.prompt_tower import PromptTower, TokenIds

START, END = 1, 2


class ToyTower(PromptTower):
    """Features depend on all tokens up to the end one, and on where they stand."""

    device = torch.device("cpu")
    num_layers = 1

    def __init__(self, dim: int, width: int = 6, context_length: int = 40) -> None:
        generator = torch.Generator().manual_seed(11)
        self.width, self.context_length = width, context_length
        self.table = torch.randn(200, width, generator=generator)
        self.positions = torch.randn(context_length, width, generator=generator)
        self.projection = torch.randn(width, dim, generator=generator)
        self.calls = 0

    def tokenize(self, texts: Sequence[str]) -> TokenIds:
        rows = [[START, *(ord(c) for c in text if c != " "), END] for text in texts]
        limit = self.context_length
        rows = [row if len(row) <= limit else [*row[: limit - 1], END] for row in rows]
        ids = torch.zeros(len(rows), self.context_length, dtype=torch.int64)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = torch.tensor(row)
        return TokenIds(ids, torch.tensor([len(row) for row in rows]))

    def embed(self, ids: Tensor) -> Tensor:
        return self.table[ids]

    def encode(self, embeddings: Tensor, lengths: Tensor) -> Tensor:
        self.calls += 1
        mask = torch.arange(embeddings.shape[1]) < lengths[:, None]
        states = torch.tanh(embeddings + self.positions[: embeddings.shape[1]])
        return (states * mask[..., None]).sum(1) @ self.projection
