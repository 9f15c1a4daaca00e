"""Average of trained heads: of their probabilities or their logits, equal or as validation says.

With z_m the logits of member m and weights w_m ≥ 0 that sum to 1, `probabilities` gives
p = Σ_m w_m p_m with p_m the softmax (single label) or sigmoid (multi label) of z_m, `logits`
z = Σ_m w_m z_m. For a row, members that see none of their features (no caption) are left out, and
the other weights are scaled to sum to 1.

Reference: Dietterich, Ensemble Methods in Machine Learning, 2000 (averaging of probabilities);
weights chosen over a grid on the simplex, by the metric of the validation rows.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator
from pydantic_settings import CliSuppress
from torch import Tensor, nn

from featcache.errors import ConfigError
from heads.base import FeatureSpec, Head, HeadConfig
from heads.members import Member, MemberConfig, merged_arrays
from heads.models.router import fuse

if TYPE_CHECKING:
    from heads.run_folder import LoadedRun

Space = Literal["probabilities", "logits"]
_MOST_MIXTURES = 5000


class AverageConfig(HeadConfig):
    """Nothing is trained: finished runs' heads vote."""

    kind: Literal["average"] = "average"
    """Head kind."""
    runs: tuple[Path, ...] = Field(min_length=2)
    """Two or more run folders; read once, their weights become part of the new run."""
    space: Space = "probabilities"
    """What is averaged: probabilities, or logits (sharper; needs heads of one scale)."""
    weights: tuple[NonNegativeFloat, ...] | None = None
    """Shares of the runs in the order given, each 0 or more; need not sum to 1; unset = equal."""
    weigh: Literal["equal", "validation"] = "equal"
    """validation = the shares, in steps of 1/`weight_steps`, that score best on the validation
    rows; `by_candidate` in metrics.json lists all."""
    weight_steps: PositiveInt = 10
    """Steps from share 0 to share 1 that `weigh=validation` tries, 1 or more."""
    members: CliSuppress[tuple[MemberConfig, ...] | None] = None
    """What the run folders state; filled in by the training job."""

    @model_validator(mode="after")
    def _possible_weights(self) -> Self:
        if self.weigh == "validation":
            if self.weights is not None:
                raise ValueError(
                    f"weights={self.weights} and weigh=validation both weigh the runs; set one"
                )
            tried = math.comb(self.weight_steps + len(self.runs) - 1, len(self.runs) - 1)
            if tried > _MOST_MIXTURES:
                raise ValueError(
                    f"weight_steps={self.weight_steps} for {len(self.runs)} runs are {tried:,} "
                    f"mixtures, more than {_MOST_MIXTURES:,}; lower weight_steps"
                )
        if self.weights is None:
            return self
        if len(self.weights) != len(self.runs):
            raise ValueError(
                f"weights has {len(self.weights)} shares for {len(self.runs)} runs; give one each"
            )
        if not 0 < sum(self.weights) < math.inf:
            raise ValueError(
                f"weights={self.weights} sum to {sum(self.weights):g}; at least one has to be "
                "above 0, all finite"
            )
        return self

    def prepared(self, open_run: "Callable[[Path], LoadedRun]") -> Self:
        """This config with the runs' records in it."""
        members = tuple(MemberConfig.of(open_run(run)) for run in self.runs)
        return self.model_copy(update={"members": members})

    def arrays(self) -> tuple[str, ...]:
        """All arrays that the members read."""
        return merged_arrays(self.members) if self.members else self.needs

    def only(self, candidate: str) -> Self:
        """The config with those shares."""
        for weights in self.mixtures():
            if mixture_name(weights) == candidate:
                return self.model_copy(update={"weights": weights, "weigh": "equal"})
        raise KeyError(candidate)

    def mixtures(self) -> list[tuple[float, ...]]:
        """The shares to score: one tuple, or all on the grid over the simplex."""
        count = len(self.runs)
        if self.weigh == "equal":
            weights = self.weights or (1.0,) * count
            return [tuple(one / sum(weights) for one in weights)]
        steps, found = self.weight_steps, []
        for bars in itertools.combinations(range(steps + count - 1), count - 1):
            edges = (-1, *bars, steps + count - 1)
            parts = (right - left - 1 for left, right in itertools.pairwise(edges))
            found.append(tuple(part / steps for part in parts))
        return found

    def build(self, spec: FeatureSpec) -> "Average":
        """The members together.

        Raises:
            ConfigError: if one has no probabilities to average, or they were not read.
        """
        if self.members is None:
            raise ConfigError("head.runs were not read; build it by heads.train")
        members = [member.build(spec) for member in self.members]
        for member, run in zip(members, self.runs, strict=True):
            if self.space == "probabilities" and not member.head.has_probabilities:
                raise ConfigError(
                    f"{run}: its scores only rank, they are no probabilities; train it with "
                    "--head.cosine_threshold, or use --head.space logits"
                )
        return Average(
            members,
            names=self.arrays(),
            space=self.space,
            multi_label=spec.task == "multi_label",
            mixtures=self.mixtures(),
            titles=[f"member {place} ({run.name})" for place, run in enumerate(self.runs, 1)],
        )


def mixture_name(weights: tuple[float, ...]) -> str:
    """Name of a candidate."""
    return "shares " + " ".join(f"{weight:.4g}" for weight in weights)


class Average(Head):
    """Trained heads that vote; `forward` answers with the first shares."""

    trainable = False

    def __init__(
        self,
        members: list[Member],
        *,
        names: tuple[str, ...],
        space: Space,
        multi_label: bool,
        mixtures: list[tuple[float, ...]],
        titles: list[str],
    ) -> None:
        """A head over the arrays `names`.

        Args:
            members: M trained heads that read some of the arrays.
            names: names of the arrays, in the order in which `forward` takes them.
            space: what is averaged.
            multi_label: sigmoids instead of a softmax make probabilities of logits.
            mixtures: M shares each, ≥ 0 with sum 1; all are candidates.
            titles: M different names, for `monitors`.
        """
        super().__init__()
        self.members = nn.ModuleList(members)
        self.names, self.mixtures, self.titles = names, mixtures, titles
        self.space, self.multi_label = space, multi_label
        self.has_probabilities = all(member.head.has_probabilities for member in members)

    def _each(self) -> Iterator[Member]:
        for member in self.members:
            assert isinstance(member, Member)
            yield member

    def forward(self, *features: Tensor) -> Tensor:
        """(B, C) logits whose probabilities are the average; see `Head.forward`."""
        return self._mix(*self._members(features), self.mixtures[0])

    def candidates(self, *features: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Name and (B, C) logits of each mixture; the members are asked once."""
        logits, usable = self._members(features)
        for weights in self.mixtures:
            yield mixture_name(weights), self._mix(logits, usable, weights)

    def monitors(self, *features: Tensor) -> Iterator[tuple[str, Tensor]]:
        """(B, C) logits of each member alone, by its title."""
        yield from zip(self.titles, self._members(features)[0], strict=True)

    def trained_state(self, candidate: str = "") -> Mapping[str, Tensor]:
        """All that the members are made of; shares are options."""
        return {
            f"members.{number}.head.{name}": tensor.detach()
            for number, member in enumerate(self._each())
            for name, tensor in member.state().items()
        }

    def load_trained_state(self, state: Mapping[str, Tensor]) -> None:
        """Puts tensors of `trained_state` back in place.

        Raises:
            ValueError: if names or shapes differ from the members' own.
        """
        left = dict(state)
        for number, member in enumerate(self._each()):
            prefix = f"members.{number}.head."
            own = [name for name in state if name.startswith(prefix)]
            member.load_state({name.removeprefix(prefix): left.pop(name) for name in own})
        if left:
            raise ValueError(f"tensors {sorted(left)} are not in both the file and the head")

    def _members(self, features: tuple[Tensor, ...]) -> tuple[list[Tensor], Tensor]:
        """M times (B, C) float32 logits, and (B, M) bool: members that see anything of a row.

        Where none does, each gives what it makes of nothing.
        """
        by_name = dict(zip(self.names, features, strict=True))
        logits = [member(by_name).float() for member in self._each()]
        usable = torch.stack([member.has_input(by_name) for member in self._each()], 1)
        return logits, usable | ~usable.any(1, keepdim=True)

    def _mix(self, logits: list[Tensor], usable: Tensor, weights: tuple[float, ...]) -> Tensor:
        shares = torch.tensor(weights, device=usable.device) * usable
        # Where only members with share 0 see anything, they count alike.
        shares = torch.where(shares.any(1, keepdim=True), shares, usable.float())
        shares = shares / shares.sum(1, keepdim=True)
        if self.space == "logits":
            return fuse(logits, shares)
        if not self.multi_label:
            return log_mean([one.log_softmax(1) for one in logits], shares)
        there = log_mean([F.logsigmoid(one) for one in logits], shares)
        absent = log_mean([F.logsigmoid(-one) for one in logits], shares)
        return there - absent


def log_mean(parts: list[Tensor], shares: Tensor) -> Tensor:
    """(B, C) log Σ_m w_m exp x_m of M times (B, C) logarithms and (B, M) shares."""
    logs = shares.log()
    total = parts[0] + logs[:, :1]
    for index, part in enumerate(parts[1:], 1):
        total = torch.logaddexp(total, part + logs[:, index : index + 1])
    return total
