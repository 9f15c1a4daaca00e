"""Queries that read a row's tokens: one transformer decoder layer without self-attention.

With M = ReLU(tokens·E + e) and queries Q, the same G for all rows:
Q ← LN(Q + drop(Q)); Q ← LN(Q + drop(attention(Q, M, M))); Q ← LN(Q + drop(W₂ drop(ReLU(W₁ Q)))).

Nothing of a query depends on the row before the attention, so the first norm and the query
projection are computed once for a batch. For the same reason keys need not exist: q·(W_k m) is
(W_kᵀq)·m, one product of the tokens with G·heads vectors. And where a row has fewer tokens than
there are queries, values go through the output projection before they are summed, not after. Each
form is taken where it needs clearly fewer multiplications; results are the same.

Reference: Ridnik et al., ML-Decoder: Scalable and Versatile Classification Head, 2021, section 3
(decoder without self-attention, group queries); Vaswani et al., Attention Is All You Need, 2017
(attention). Departures: dropout of the queries in the first norm is drawn once for all rows of a
batch; keys have no offset, which the softmax over tokens cancels.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heads.dropout import dropout, relu_dropout


class QueryDecoder(nn.Module):
    """G queries that attend to each row's tokens."""

    def __init__(
        self,
        token_dim: int,
        width: int = 768,
        num_heads: int = 8,
        hidden: int = 2048,
        dropout: float = 0.1,
    ) -> None:
        """Torch's own initial values of a decoder layer.

        Args:
            token_dim: D, width of a token.
            width: W, width of queries and memory; a multiple of `num_heads`.
            num_heads: attention heads.
            hidden: units of the feed-forward part.
            dropout: share dropped after each part, inside the feed-forward one, and of the
                attention weights.
        """
        super().__init__()
        if width % num_heads:
            raise ValueError(f"width {width} is no multiple of num_heads {num_heads}")
        self.num_heads, self.dropout = num_heads, dropout
        self.embed = nn.Linear(token_dim, width)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.expand = nn.Linear(width, hidden)
        self.contract = nn.Linear(hidden, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        for part in (self.query, self.key, self.value):  # as one (W, 3W) matrix, like torch's
            nn.init.uniform_(part.weight, -math.sqrt(1.5 / width), math.sqrt(1.5 / width))
        for part in (self.query, self.value, self.out):
            nn.init.zeros_(part.bias)

    def forward(self, queries: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """What each query found in each row.

        Args:
            queries: (G, W) float32.
            tokens: (B, L, D) float32.
            mask: (B, L) bool, True where there is a token; None = everywhere. A row without any
                attends to all its places, so that its result is finite.

        Returns:
            (B, G, W) float32, or of the type that autocast computes in.
        """
        share = self.dropout if self.training else 0.0
        queries = self.norms[0](queries + dropout(queries, share))
        memory = F.relu(self.embed(tokens))
        attended = self._attend(queries, memory, mask, share)
        found = self.norms[1](queries + dropout(attended, share))
        inner = relu_dropout(self.expand(found), share)
        result: Tensor = self.norms[2](found + dropout(self.contract(inner), share))
        return result

    def _attend(self, queries: Tensor, memory: Tensor, mask: Tensor | None, share: float) -> Tensor:
        """(B, G, W) multi-head attention of (G, W) queries to (B, L, W) memory."""
        (num_rows, num_tokens, width), num_queries = memory.shape, len(queries)
        heads, head_dim = self.num_heads, width // self.num_heads
        asked = self.query(queries).view(num_queries, heads, head_dim) / math.sqrt(head_dim)
        if heads * num_queries <= width + num_queries:
            keys = self.key.weight.view(heads, head_dim, width)
            asked = torch.einsum("ghd,hdw->ghw", asked, keys).flatten(0, 1)
            scores = F.linear(memory, asked).view(num_rows, num_tokens, num_queries, heads)
        else:
            keys = self.key(memory).view(num_rows, num_tokens, heads, head_dim)
            scores = torch.einsum("blhd,ghd->blgh", keys, asked)
        scores = scores.permute(0, 3, 2, 1)  # (B, heads, G, L)
        if mask is not None:
            seen = mask | ~mask.any(1, keepdim=True)
            scores = scores.masked_fill(~seen[:, None, None, :], -math.inf)
        weights = dropout(scores.softmax(-1), share)
        values: Tensor = self.value(memory).view(num_rows, num_tokens, heads, head_dim)
        weights = weights.to(values.dtype)
        late = num_queries * (num_tokens + width)
        early = num_tokens * width + num_queries * heads * num_tokens
        if late <= 2 * early:  # products of many small matrices are slower than their count says
            summed = weights @ values.transpose(1, 2)  # (B, heads, G, head_dim)
            result: Tensor = self.out(summed.transpose(1, 2).flatten(2))
            return result
        # One matrix product for each head: a broadcast `@` would copy its weights for each row.
        outs = self.out.weight.t().reshape(heads, head_dim, width)
        ready = torch.bmm(values.flatten(0, 1).transpose(0, 1), outs)  # (heads, B · L, W)
        ready = ready.view(heads, num_rows, num_tokens, width).transpose(0, 1).flatten(1, 2)
        joined = weights.transpose(1, 2).flatten(2)  # (B, G, heads · L)
        return torch.bmm(joined, ready) + self.out.bias
