"""Low-rank changes of frozen matrices: what they add in training, and the weight they amount to.

Reference: Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2021, section 4.1:
h = W0 x + b0 + s B (A x), with W0 and b0 frozen.

W0 + s B A is never built while gradients are on: two thin products per weight are added to the
frozen one's output, and no dense weight gradient exists. Weights that several matrices are stacked
in (query, key and value) share one product with all their A. Where neither gradients nor dropout
are on, the layer runs as the library wrote it on W0 + s B A: with B = 0 that is the base bit for
bit, whatever kernel the library chooses.

The layers here take the place of a library's, hold its tensors under the same names, and leave
those of the low-rank change to their owner, so that a model's state dict stays what it was.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import dropout, linear, scaled_dot_product_attention


class LowRank(nn.Module):
    """s B A for one weight, or for some of the matrices stacked in its rows.

    Attributes:
        a: (k·r, columns) A of each of the k matrices, in the order of their rows.
        b: (sum of their rows, r) B of each, in the same order.
    """

    def __init__(
        self,
        weight: Tensor,
        rows: Sequence[tuple[int, int]],
        rank: int,
        scale: float,
        dropout: float = 0.0,
    ) -> None:
        """A at random, Kaiming-uniform with a = √5 (±1/√columns), from the global generator; B 0.

        Args:
            weight: (out, columns), what is changed; taken for its size, type and device.
            rows: first row and the one behind the last of each matrix, ascending, not overlapping.
            rank: r.
            scale: s.
            dropout: share of A's inputs that training drops; one draw for all k matrices.
        """
        super().__init__()
        self.scale, self.dropout, self.num_rows = scale, dropout, len(weight)
        self._rows = tuple(rows)
        self.a = nn.Parameter(weight.new_empty(len(rows) * rank, weight.shape[1]))
        self.b = nn.Parameter(weight.new_zeros(sum(e - s for s, e in rows), rank))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def up(self) -> Tensor:
        """(out, k·r): the B on a diagonal of blocks, 0 in rows that are not changed."""
        if self._rows == ((0, self.num_rows),):
            return self.b
        parts = torch.split(self.b, [stop - start for start, stop in self._rows])
        blocks, done = [], 0
        for (start, stop), part in zip(self._rows, parts, strict=True):
            blocks += [part.new_zeros(start - done, 0), part] if start > done else [part]
            done = stop
        if done < self.num_rows:
            blocks.append(self.b.new_zeros(self.num_rows - done, 0))
        stacked: Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
        return stacked

    def merged(self, weight: Tensor) -> Tensor:
        """(out, columns): the weight plus s B A, in its own precision; itself where B is 0."""
        with torch.autocast(weight.device.type, enabled=False):
            return torch.addmm(weight, self.up(), self.a, alpha=self.scale)

    @property
    def as_merged(self) -> bool:
        """Whether nothing asks for the two thin products: no gradient, no dropout."""
        return not (torch.is_grad_enabled() or self.training)

    def project(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(n, out) output of the changed layer for (n, columns)."""
        if self.as_merged:
            return linear(x, self.merged(weight), bias)
        if torch.is_autocast_enabled(x.device.type):  # once, not in each of the two products
            x = x.to(torch.get_autocast_dtype(x.device.type))
        y = linear(x, weight, bias)
        dropped = dropout(x, self.dropout, self.training) if self.dropout else x
        inner = linear(dropped, self.a)
        # In place: the frozen layer's output is needed by no gradient.
        return y.addmm_(inner, self.up().to(inner.dtype).t(), alpha=self.scale)


class LowRankLinear(nn.Module):
    """A linear layer with a low-rank change."""

    def __init__(self, layer: nn.Linear, change: LowRank) -> None:
        """Takes the layer's tensors.

        Args:
            layer: frozen.
            change: of its weight; belongs to the caller.
        """
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        self.training = layer.training
        self._change = (change,)

    def forward(self, x: Tensor) -> Tensor:
        """(…, out) from (…, columns)."""
        flat = x.reshape(-1, x.shape[-1])
        return self._change[0].project(flat, self.weight, self.bias).view(*x.shape[:-1], -1)


class _LowRankHost(nn.Module):
    """A module that hands its weights to a fused function, with low-rank changes of them."""

    def __init__(self, host: nn.Module, changes: Mapping[str, LowRank]) -> None:
        """Takes the host's tensors and parts.

        Args:
            host: frozen.
            changes: by the weights' names in it; they belong to the caller.
        """
        super().__init__()
        for name, parameter in host.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, part in host.named_children():
            self.add_module(name, part)
        self.training = host.training
        self._held = (host, dict(changes))

    @property
    def _merges(self) -> bool:
        return all(change.as_merged for change in self._held[1].values())

    def _merged(self, *inputs: Tensor, **options: Any) -> Any:
        """What the host itself returns on merged weights."""
        host, changes = self._held
        host.training = self.training
        weights: dict[str, Tensor] = dict(self.named_parameters())
        weights |= {name: change.merged(weights[name]) for name, change in changes.items()}
        return functional_call(host, weights, inputs, options)

    def _project(self, x: Tensor, layer: str, weight: Tensor, bias: Tensor | None) -> Tensor:
        change = self._held[1].get(layer)
        return linear(x, weight, bias) if change is None else change.project(x, weight, bias)


class LowRankAttention(_LowRankHost):
    """`nn.MultiheadAttention` as self-attention, with changes of `in_proj_weight` or `out_proj`.

    In training it keeps images in the first dimension throughout, where torch's own turns the
    sequence there and back; its kernels then see rows in another order, so that results differ
    from torch's in the last bit now and then.
    """

    in_proj_weight: nn.Parameter
    in_proj_bias: nn.Parameter | None
    out_proj: nn.Linear

    def __init__(self, host: nn.MultiheadAttention, changes: Mapping[str, LowRank]) -> None:
        """See `_LowRankHost`."""
        super().__init__(host, changes)
        if host.in_proj_weight is None or host.bias_k is not None or host.add_zero_attn:
            raise ValueError("only a self-attention with stacked weights and no extra key is known")
        self.num_heads, self.dropout = host.num_heads, host.dropout
        self.batch_first = host.batch_first

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """(B, L, W) from (B, L, W), and no attention weights; (L, B, W) unless `batch_first`.

        Args:
            query: the sequence.
            key: the same object.
            value: the same object.
            need_weights: must be false.
            attn_mask: added to the scores, (L, L) or (B·heads, L, L), or bool, True = masked.
        """
        assert key is query, "self-attention only"
        assert value is query, "self-attention only"
        assert not need_weights, "attention weights are not kept"
        if self._merges:
            merged: tuple[Tensor, None] = self._merged(
                query, query, query, need_weights=False, attn_mask=attn_mask
            )
            return merged
        x = query if self.batch_first else query.transpose(0, 1)
        batch, length, width = x.shape
        if attn_mask is not None:
            attn_mask = ~attn_mask if attn_mask.dtype == torch.bool else attn_mask
            if attn_mask.ndim == 3:
                attn_mask = attn_mask.view(batch, self.num_heads, length, length)
        stacked = self._project(
            x.reshape(-1, width), "in_proj_weight", self.in_proj_weight, self.in_proj_bias
        )
        q, k, v = stacked.view(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(
            q, k, v, attn_mask, self.dropout if self.training else 0.0
        )
        flat = mixed.transpose(1, 2).reshape(-1, width)
        out = self._project(flat, "out_proj.weight", self.out_proj.weight, self.out_proj.bias)
        out = out.view(batch, length, width)
        return (out if self.batch_first else out.transpose(0, 1)), None


class LowRankPool(_LowRankHost):
    """CLIP's attention pooling over a ResNet's cells, with changes of its four matrices.

    In training only the query that is kept is computed: that of the mean over all cells.
    """

    positional_embedding: nn.Parameter
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    c_proj: nn.Linear

    def __init__(self, host: nn.Module, changes: Mapping[str, LowRank]) -> None:
        """See `_LowRankHost`.

        Args:
            host: open_clip.modified_resnet.AttentionPool2d.
            changes: of `q_proj.weight` and so on.
        """
        super().__init__(host, changes)
        self.num_heads = int(host.num_heads)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """(B, P) from cells (B, W, rows, columns)."""
        if self._merges:
            merged: Tensor = self._merged(x)
            return merged
        batch, width = x.shape[:2]
        cells = x.flatten(2).transpose(1, 2)
        tokens = torch.cat([cells.mean(1, keepdim=True), cells], 1)
        tokens = tokens + self.positional_embedding.to(x.dtype)
        flat = tokens.reshape(-1, width)
        parts = [self._layer(tokens[:, 0], "q_proj")]
        parts += [self._layer(flat, name) for name in ("k_proj", "v_proj")]
        q, k, v = (
            part.view(batch, -1, self.num_heads, width // self.num_heads).transpose(1, 2)
            for part in parts
        )
        mixed = scaled_dot_product_attention(q, k, v)
        return self._layer(mixed.transpose(1, 2).reshape(batch, width), "c_proj")

    def _layer(self, x: Tensor, name: str) -> Tensor:
        layer = self.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        return self._project(x, f"{name}.weight", layer.weight, layer.bias)
