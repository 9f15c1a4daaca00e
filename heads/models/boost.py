"""Boost: a second network adds to the logits of a trained head, which no longer changes.

With z_base the logits of a finished run's head and f the scaled vector of one modality:

    z = sg(z_base) + z_residual,    z_residual = W₂ ReLU(W₁ f + b₁) + b₂,

where sg stops the gradient. The loss is that of z, so the second network learns what the first one
gets wrong; it may read another modality. A row that lacks this modality keeps z_base.

Reference: systems "MultiCLIP" (multi-label image and caption classification), its `clip_boost` and
`blip_boost`. Departures: the sum is taken in logit space, the second network begins near zero, so
that training begins at the base, and the base is copied into the new run, whose metrics are
reported with and without the second network.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, Self

import torch
from pydantic import Field, PositiveInt
from pydantic_settings import CliSuppress
from torch import Tensor

from featcache.errors import ConfigError
from heads.base import Features, FeatureSpec, Head, HeadConfig, OptimDefaults
from heads.losses.base import Loss
from heads.members import Member, MemberConfig, merged_arrays
from heads.mlp import OPTIM_DEFAULTS, Mlp, RowScale, present
from heads.models.naive import ARRAYS, Feature

if TYPE_CHECKING:
    from heads.run_folder import LoadedRun

_BASE = "base.head."
_FIRST_SHARE = 0.01
"""What the second network's first outputs are multiplied by; at 0, its first layer would wait."""


class BoostConfig(HeadConfig):
    """A trained head, frozen, and a network that adds to its logits."""

    takes_loss: ClassVar[bool] = True
    optim_defaults: ClassVar[OptimDefaults] = OPTIM_DEFAULTS

    kind: Literal["boost"] = "boost"
    """Head kind."""
    base: Path
    """Run folder of the trained head; read once, its weights become part of the new run."""
    feature: Feature = "projected"
    """What the second network reads: projected or pooled image vectors, multimodal ones of image
    and caption (blip), or those of the captions (text)."""
    hidden: PositiveInt | None = None
    """Hidden units of the second network, 1 or more; unset = as many as the vector is wide."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of hidden units dropped in training, 0 to below 1."""
    member: CliSuppress[MemberConfig | None] = None
    """What the base's run folder states; filled in by the training job."""

    def prepared(self, open_run: "Callable[[Path], LoadedRun]") -> Self:
        """This config with the base's record in it."""
        return self.model_copy(update={"member": MemberConfig.of(open_run(self.base))})

    def arrays(self) -> tuple[str, ...]:
        """The base's arrays, and the one that the second network reads."""
        return merged_arrays([self.member] if self.member else [], ARRAYS[self.feature])

    def build(self, spec: FeatureSpec) -> "Boost":
        """The head; its loss is the one that `spec` brings.

        Raises:
            ConfigError: if the base was not read.
        """
        if self.member is None:
            raise ConfigError(f"head.base={self.base} was not read; build it by heads.train")
        width = spec.width(ARRAYS[self.feature])
        residual = Mlp(width, spec.num_classes, self.hidden, self.dropout)
        with torch.no_grad():
            for parameter in residual[-1].parameters():
                parameter.mul_(_FIRST_SHARE)
        return Boost(
            self.member.build(spec),
            residual,
            RowScale(width),
            names=self.arrays(),
            feature=ARRAYS[self.feature],
            criterion=spec.criterion,
        )


class Boost(Head):
    """A frozen head and a network that adds to its logits."""

    def __init__(
        self,
        base: Member,
        residual: Mlp,
        scale: RowScale,
        *,
        names: tuple[str, ...],
        feature: str,
        criterion: Loss | None = None,
    ) -> None:
        """A head over the arrays `names`.

        Args:
            base: trained, reads some of the arrays.
            residual: D → C.
            scale: what its vectors go through first.
            names: names of the arrays, in the order in which `forward` takes them.
            feature: the one that the residual reads.
            criterion: the loss on logits; unset = the head only predicts.
        """
        super().__init__()
        self.base, self.residual, self.scale = base, residual, scale
        self.names, self.feature, self.criterion = names, feature, criterion

    def forward(self, *features: Tensor) -> Tensor:
        """(B, C) logits z_base + z_residual; see `Head.forward`."""
        by_name = dict(zip(self.names, features, strict=True))
        own = by_name[self.feature]
        residual: Tensor = self.residual(self.scale(own))
        added = residual.float() * present(own)[:, None]
        logits: Tensor = self.base(by_name).float() + added
        return logits

    def monitors(self, *features: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The base's own logits, under "base": what the head scores without its addition."""
        yield "base", self.base(dict(zip(self.names, features, strict=True)))

    def loss(self, features: Features, targets: Tensor, progress: float) -> dict[str, Tensor]:
        """The chosen loss of the sum; the base gets no gradient."""
        assert self.criterion is not None, "built without a loss"
        return {"loss": self.criterion(self(*features), targets)}

    def trained_state(self, candidate: str = "") -> Mapping[str, Tensor]:
        """The second network, and all that the base is made of."""
        base = {_BASE + name: tensor.detach() for name, tensor in self.base.state().items()}
        return {**super().trained_state(), **base}

    def load_trained_state(self, state: Mapping[str, Tensor]) -> None:
        """Puts tensors of `trained_state` back in place; see `Head.load_trained_state`."""
        base = {n.removeprefix(_BASE): t for n, t in state.items() if n.startswith(_BASE)}
        self.base.load_state(base)
        super().load_trained_state(state)
