"""ML-Decoder as its equations read, of torch's own layers: what the head is measured against."""

import torch
from torch import Tensor, nn


class PlainMlDecoder(nn.Module):
    """One query a group, repeated for every row; a product for each group."""

    def __init__(self, token_dim: int, num_classes: int, groups: int = 100) -> None:
        super().__init__()
        width, hidden = 768, 2048
        num_groups = min(num_classes, groups)
        self.num_classes, self.per_group = num_classes, -(-num_classes // num_groups)
        self.embed = nn.Linear(token_dim, width)
        self.queries = nn.Embedding(num_groups, width).requires_grad_(False)
        self.attention = nn.MultiheadAttention(width, 8, dropout=0.1)
        self.expand, self.contract = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.drops = nn.ModuleList(nn.Dropout(0.1) for _ in range(4))
        self.weight = nn.Parameter(torch.empty(num_groups, width, self.per_group))
        self.bias = nn.Parameter(torch.zeros(num_classes))
        nn.init.xavier_normal_(self.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, C) logits of (B, L, D) tokens."""
        memory = torch.relu(self.embed(tokens)).transpose(0, 1)
        asked = self.queries.weight.unsqueeze(1).expand(-1, len(tokens), -1)
        asked = self.norms[0](asked + self.drops[0](asked))
        attended = self.attention(asked, memory, memory)[0]
        found = self.norms[1](asked + self.drops[1](attended))
        inner = self.drops[3](torch.relu(self.expand(found)))
        found = self.norms[2](found + self.drops[2](self.contract(inner))).transpose(0, 1)
        logits = torch.zeros(*found.shape[:2], self.per_group)
        for group in range(found.shape[1]):
            logits[:, group] = found[:, group] @ self.weight[group]
        return logits.flatten(1)[:, : self.num_classes] + self.bias

    def copy_to(self, head: nn.Module) -> None:
        """Gives an `MlDecoder` without scaling the same queries and weights."""
        width = self.embed.out_features
        state: dict[str, Tensor] = {}
        for name, part in (
            ("embed", self.embed),
            ("expand", self.expand),
            ("contract", self.contract),
            ("out", self.attention.out_proj),
            ("norms", self.norms),
        ):
            state |= {f"decoder.{name}.{key}": value for key, value in part.state_dict().items()}
        for index, name in enumerate(("query", "key", "value")):
            own = slice(index * width, (index + 1) * width)
            state[f"decoder.{name}.weight"] = self.attention.in_proj_weight[own]
            if name != "key":
                state[f"decoder.{name}.bias"] = self.attention.in_proj_bias[own]
        used = len(head.queries)  # type: ignore[arg-type]
        state |= {
            "queries": self.queries.weight[:used],
            "weight": self.weight[:used],
            "bias": self.bias,
        }
        head.load_state_dict(state)
