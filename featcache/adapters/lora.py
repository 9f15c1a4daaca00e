"""LoRA: low-rank changes of the matrices of chosen transformer blocks.

Reference: Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2021, section 4.1;
Kalajdzievski, A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA, 2023 (rslora);
Zanella and Ben Ayed, Low-Rank Few-Shot Adaptation of Vision-Language Models, 2024, section 3
(CLIP-LoRA: which matrices, which blocks).

Each changed weight has two trained tensors in the adapter's state, `<weight>.lora_A` (k·r, columns)
and `<weight>.lora_B` (rows, r): where query, key and value are stacked in one weight, those of the
k chosen ones are stacked likewise.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator
from torch import Tensor, nn

from featcache.adapters.base import Adapter, AdapterConfig
from featcache.backbones.trainable import Block, TrainableTowers
from featcache.errors import BackboneError
from featcache.low_rank import LowRank, LowRankAttention, LowRankLinear, LowRankPool

SiteName = Literal["q", "k", "v", "out", "fc1", "fc2"]
Positions = Literal["all", "top3", "bottom", "mid", "up", "half-bottom", "half-up"]


class LoraConfig(AdapterConfig):
    """Train low-rank changes of a tower's matrices."""

    kind: Literal["lora"] = "lora"
    """Adapter kind."""
    rank: PositiveInt = 8
    """Rank r of each change."""
    alpha: PositiveFloat = 16.0
    """Changes are multiplied by alpha / rank; see `scaling`."""
    scaling: Literal["standard", "rslora"] = "standard"
    """standard = alpha / rank; rslora = alpha / √rank, whose size does not fall with the rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of a change's inputs dropped in training, 0 to below 1."""
    sites: tuple[SiteName, ...] = ("q", "k", "v", "out")
    """Matrices changed in each block: q, k, v, out of the attention, fc1, fc2 of the MLP."""
    towers: Literal["image", "text", "both"] = "image"
    """Towers that are changed."""
    positions: Positions | tuple[PositiveInt, ...] = "all"
    """Blocks that are changed: all, the last three (top3), a third (bottom, mid, up) or a half
    (half-bottom, half-up) of them counted from the input, or their numbers, 1 = the first."""

    @field_validator("positions", mode="before")
    @classmethod
    def _one_name(cls, value: Any) -> Any:
        """A name; the command line, where numbers are possible too, gives a list of one."""
        if isinstance(value, list | tuple) and len(value) == 1 and value[0] in get_args(Positions):
            return value[0]
        return value

    @model_validator(mode="after")
    def _distinct(self) -> "LoraConfig":
        for name in ("sites", "positions"):
            values = getattr(self, name)
            if not values or (isinstance(values, tuple) and len(set(values)) < len(values)):
                raise ValueError(f"{name} {values!r}: expected each once, and at least one")
        return self

    @property
    def scale(self) -> float:
        """What the products B A are multiplied by."""
        return self.alpha / (self.rank if self.scaling == "standard" else math.sqrt(self.rank))

    def attach(self, towers: TrainableTowers) -> "Lora":
        """Changes that are 0 yet, on all chosen matrices; see `AdapterConfig.attach`."""
        blocks: list[Block] = []
        for tower in ("image", "text"):
            if self.towers in (tower, "both"):
                found = towers.require_blocks(tower)
                blocks += [found[i] for i in chosen_blocks(self.positions, len(found))]
        return Lora(towers, blocks, self.sites, self.rank, self.scale, self.dropout)


def chosen_blocks(positions: Positions | Sequence[int], num_blocks: int) -> list[int]:
    """Indices of blocks, from 0.

    CLIP-LoRA's names for its 12 blocks, carried over to N: `top3` is the last three (all, if there
    are fewer), `bottom`, `mid` and `up` are the thirds between 0, N/3, 2N/3 and N, rounded, and the
    halves meet at N/2, rounded down.

    Raises:
        BackboneError: if a name means no block, or a number none of them.
    """
    n = num_blocks
    if isinstance(positions, str):
        third, two_thirds = (2 * n + 3) // 6, (4 * n + 3) // 6
        start, stop = {
            "all": (0, n),
            "top3": (max(0, n - 3), n),
            "bottom": (0, third),
            "mid": (third, two_thirds),
            "up": (two_thirds, n),
            "half-bottom": (0, n // 2),
            "half-up": (n // 2, n),
        }[positions]
        if start == stop:
            raise BackboneError(
                f"adapter.positions {positions} means no block of {n}; choose all, or numbers"
            )
        return list(range(start, stop))
    if beyond := [number for number in positions if number > n]:
        raise BackboneError(
            f"adapter.positions {beyond[0]} does not exist; the tower has blocks 1..{n}"
        )
    return sorted(number - 1 for number in positions)


class Lora(Adapter):
    """Low-rank changes attached to a backbone's towers.

    Attributes:
        changes: one a weight.
    """

    def __init__(
        self,
        towers: TrainableTowers,
        blocks: Sequence[Block],
        sites: Sequence[str],
        rank: int,
        scale: float,
        dropout: float,
    ) -> None:
        """Puts layers with changes into the model.

        Args:
            towers: attached to.
            blocks: of any tower.
            sites: matrices of each block.
            rank: r.
            scale: s.
            dropout: share of inputs dropped in training.

        Raises:
            BackboneError: if a block does not have one of the sites, or a matrix of one has fewer
                rows or columns than `rank`.
        """
        super().__init__(towers)
        rows = _stacked_rows(towers, blocks, sites)
        model = towers.model
        self._weights = {name: model.get_parameter(name) for name in rows}
        _require_low(rank, self._weights, rows)
        self.changes = nn.ModuleList(
            LowRank(weight, rows[name], rank, scale, dropout)
            for name, weight in self._weights.items()
        )
        by_host: dict[str, dict[str, LowRank]] = defaultdict(dict)
        for name, change in zip(self._weights, self.changes, strict=True):
            assert isinstance(change, LowRank)
            host = _host_of(model, name)
            by_host[host][name.removeprefix(f"{host}.")] = change
        self._originals = {host: model.get_submodule(host) for host in by_host}
        self._layers = {
            host: _changed(self._originals[host], changes) for host, changes in by_host.items()
        }
        self._merged = False
        self._unmerged: dict[str, Tensor] | None = None
        self._put(self._layers)

    def state(self) -> dict[str, Tensor]:
        """`<weight>.lora_A` and `<weight>.lora_B` of every changed weight."""
        found: dict[str, Tensor] = {}
        for name, change in zip(self._weights, self.changes, strict=True):
            found |= {f"{name}.lora_A": change.a, f"{name}.lora_B": change.b}  # type: ignore
        return found

    def merge(self) -> None:
        """Adds the changes to the weights and puts the library's own layers back."""
        kept = {name: weight.detach().clone() for name, weight in self._weights.items()}
        self.fold()
        self._unmerged = kept

    @torch.no_grad()
    def unmerge(self) -> None:
        """Undoes `merge`: the weights are what they were, bit for bit, as they were kept."""
        assert self._unmerged is not None, "not merged, or folded"
        for name, weight in self._unmerged.items():
            self._weights[name].copy_(weight)
        self._merged, self._unmerged = False, None
        self._put(self._layers)

    @torch.no_grad()
    def fold(self) -> None:
        """`merge` for good: the weights before it are not kept."""
        assert not self._merged, "already merged"
        for weight, change in zip(self._weights.values(), self.changes, strict=True):
            assert isinstance(change, LowRank)
            weight.copy_(change.merged(weight))
        self._merged = True
        self._put(self._originals)

    def _put(self, modules: dict[str, nn.Module]) -> None:
        for name, module in modules.items():
            self.towers.model.set_submodule(name, module)


def _stacked_rows(
    towers: TrainableTowers, blocks: Sequence[Block], sites: Sequence[str]
) -> dict[str, list[tuple[int, int]]]:
    """Changed row ranges of every changed weight, ascending."""
    rows: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for block in blocks:
        for name in sites:
            if name not in block.sites:
                raise BackboneError(
                    f"{towers.name}: block {block.name} has no matrix {name}; set adapter.sites "
                    f"to some of {', '.join(block.sites)}"
                )
            site = block.sites[name]
            everything = (0, len(towers.model.get_parameter(site.weight)))
            rows[site.weight].append(site.rows or everything)
    return {name: sorted(ranges) for name, ranges in rows.items()}


def _require_low(
    rank: int, weights: Mapping[str, Tensor], rows: Mapping[str, list[tuple[int, int]]]
) -> None:
    """Refuses a product of more numbers than the matrix that it changes has directions."""
    for name, weight in weights.items():
        for start, stop in rows[name]:
            if rank > min(stop - start, weight.shape[1]):
                raise BackboneError(
                    f"adapter.rank {rank}: {name} changes by matrices of {stop - start} x "
                    f"{weight.shape[1]}, whose rank is no higher than "
                    f"{min(stop - start, weight.shape[1])}; lower it, or take adapter full"
                )


def _host_of(model: nn.Module, weight: str) -> str:
    """Name of the module that has to change for a weight to change: the one whose forward reads it.

    That is the layer itself, but for attentions that hand their layers' weights to a function.
    """
    layer = weight.rpartition(".")[0]
    above = layer.rpartition(".")[0]
    return above if isinstance(model.get_submodule(above), _readers()) else layer


def _changed(host: nn.Module, changes: dict[str, LowRank]) -> nn.Module:
    attention, pool = _readers()
    if isinstance(host, attention):
        return LowRankAttention(host, changes)
    if isinstance(host, pool):
        return LowRankPool(host, changes)
    assert isinstance(host, nn.Linear), f"no low-rank form of {type(host).__name__}"
    return LowRankLinear(host, changes["weight"])


def _readers() -> tuple[type[nn.MultiheadAttention], type[nn.Module]]:
    from open_clip.modified_resnet import AttentionPool2d

    return nn.MultiheadAttention, AttentionPool2d
