"""Trained heads inside another one: recorded and copied, so that its run needs no other folder.

The record says what the run folder of such a member stated: kind, options, arrays. Its weights are
tensors of the head that holds it.
"""

import copy
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from pydantic import PrivateAttr
from torch import Tensor, nn

from featcache.config import Config
from featcache.errors import ConfigError
from heads.base import FeatureSpec, Head
from heads.mlp import present

if TYPE_CHECKING:
    from heads.run_folder import LoadedRun


class MemberConfig(Config):
    """A trained head inside another, as its run folder stated it; the training job fills it in."""

    run: Path
    """Run folder that it was copied from; it is not read again."""
    kind: str
    """Head kind."""
    options: dict[str, Any]
    """Options of the head."""
    arrays: dict[str, int]
    """Width of each array that it reads, by name, in its order."""
    prompt_shape: tuple[int, ...] | None = None
    """Templates, classes and width of the class text features it started from; unset = none."""
    templates: tuple[str, ...] = ()
    """Templates of these."""
    logit_scale: float
    """Multiplier of image-text cosines of its backbone."""
    weights: str
    """Hash of its tensors."""

    _head: Head | None = PrivateAttr(default=None)

    @classmethod
    def of(cls, run: "LoadedRun") -> Self:
        """The record of a loaded run; `build` then copies the trained head.

        Raises:
            ConfigError: if its head does not score all classes.
        """
        from heads.run_folder import read_tensors  # which imports all heads

        if run.head.scored_classes is not None:
            raise ConfigError(
                f"{run.path}: its head {run.config.kind} scores {len(run.head.scored_classes)} of "
                f"{len(run.classes)} classes; take a run that scores all"
            )
        shape = None
        if run.config.wants_prompts():
            prompts = read_tensors(run.path / "prompts.safetensors").tensors["prompts"]
            shape = tuple(prompts.shape)
        record = cls(
            run=run.path,
            kind=run.config.kind,
            options=run.config.record(),
            arrays=run.features,
            prompt_shape=shape,
            templates=tuple(run.record["templates"]),
            logit_scale=run.record["logit_scale"],
            weights=tensor_hash(run.head.state_dict()),
        )
        record._head = run.head
        return record

    def build(self, spec: FeatureSpec) -> "Member":
        """A copy of the trained head, or where the run that holds it is loaded, one to be filled.

        Args:
            spec: of the head that holds it, for the same classes.
        """
        if self._head is not None:
            return Member(copy.deepcopy(self._head), self.arrays)
        from heads.models import HEADS  # its members are heads, and some of them hold members

        own = replace(
            spec,
            feature_dim=next(iter(self.arrays.values())),
            feature_dims=self.arrays,
            prompts=None if self.prompt_shape is None else torch.ones(self.prompt_shape),
            templates=self.templates,
            logit_scale=self.logit_scale,
            mean=None,
            std=None,
            criterion=None,
            cooccurrence=None,
            support=None,
            text_tower=None,
        )
        return Member(HEADS[self.kind].model_validate(self.options).build(own), self.arrays)


class Member(nn.Module):
    """A trained head that no longer changes; it reads its own arrays among the holder's."""

    def __init__(self, head: Head, arrays: Iterable[str]) -> None:
        """Freezes the head.

        Args:
            head: trained.
            arrays: names of what it reads, in its order.
        """
        super().__init__()
        self.head, self.arrays = head.requires_grad_(False).eval(), tuple(arrays)

    def train(self, mode: bool = True) -> Self:
        """Stays in evaluation mode: dropout would make a frozen head noisy."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """(B, C) logits without gradient, from the holder's arrays by name."""
        logits: Tensor = self.head(*(features[name] for name in self.arrays))
        return logits

    def has_input(self, features: Mapping[str, Tensor]) -> Tensor:
        """(B,) bool: rows of which it can see anything, from the holder's arrays by name."""
        parts = [present(features[name]) for name in self.arrays if not name.endswith("_mask")]
        return torch.stack(parts).any(0)

    def state(self) -> dict[str, Tensor]:
        """All tensors needed to rebuild it, prepared class vectors among them."""
        return {**self.head.state_dict(), **self.head.trained_state()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Puts tensors of `state` back in place.

        Raises:
            ValueError: if names or shapes differ from this member's own.
        """
        trained = self.head.trained_state().keys()
        self.head.load_trained_state({name: state[name] for name in trained if name in state})
        held = self.head.state_dict().keys()
        if state.keys() != held | trained:
            different = sorted(state.keys() ^ (held | trained))
            raise ValueError(f"tensors {different} are not in both the file and the head")
        self.head.load_state_dict({name: state[name] for name in held})


def merged_arrays(members: Sequence[MemberConfig], *more: str) -> tuple[str, ...]:
    """Names of all arrays that members read, each once, in their order, and then `more`."""
    names = [name for member in members for name in member.arrays]
    return tuple(dict.fromkeys([*names, *more]))


def tensor_hash(tensors: Mapping[str, Tensor]) -> str:
    """First 16 hexadecimal digits of a hash over names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(
            tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()[:16]
