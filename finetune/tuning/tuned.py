"""A backbone with adapter and head as one thing to train: its tensors, groups, and best state."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from featcache.adapters.base import Adapter, ReplacedWeights
from finetune.tuning.objective import Objective
from finetune.tuning.options import ClassifierConfig, TuningConfig

ADAPTER_LR, WEIGHTS_LR = 1e-4, 1e-5
"""Default peak learning rates: of tensors that an adapter adds, and of a backbone's own weights."""


class Tuned(nn.Module):
    """Adapter and objective; `parameters` are all that is trained, and nothing else.

    Attributes:
        adapter: attached to the towers.
        objective: head and loss.
    """

    def __init__(self, adapter: Adapter, objective: Objective) -> None:
        super().__init__()
        self._adapter = (adapter,)  # in a tuple: its towers' frozen weights are no part of this
        self.objective = objective
        own = adapter.trained_parameters()
        self.adapter_names = list(own)
        self.adapter_parameters = nn.ParameterList(own.values())

    @property
    def adapter(self) -> Adapter:
        """The adapter."""
        return self._adapter[0]

    def train(self, mode: bool = True) -> "Tuned":
        """Both go over to training, or to evaluation."""
        super().train(mode)
        self.adapter.train(mode)
        return self

    def state(self) -> dict[str, Tensor]:
        """Every tensor that training changes, live, by name: adapter and head together."""
        found = {f"adapter/{name}": tensor for name, tensor in self.adapter.state().items()}
        return found | {f"objective/{name}": p for name, p in self.objective.named_parameters()}

    def copied(self) -> dict[str, Tensor]:
        """A copy of `state` on the CPU, which later steps do not change."""
        return {name: tensor.detach().cpu().clone() for name, tensor in self.state().items()}

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Puts a copy back: adapter and head of the same moment."""
        own = self.state()
        assert own.keys() == state.keys()
        for name, tensor in own.items():
            tensor.copy_(state[name])

    def build_optimizer(self, optim: TuningConfig, head: ClassifierConfig) -> torch.optim.AdamW:
        """AdamW over adapter and head; matrices decay, vectors and scalars do not."""
        lr = optim.lr
        if lr is None:
            lr = WEIGHTS_LR if isinstance(self.adapter, ReplacedWeights) else ADAPTER_LR
        adapter, objective = [*self.adapter_parameters], [*self.objective.parameters()]
        groups: list[dict[str, Any]] = []
        for name, parameters, peak, decay in (
            ("adapter", adapter, lr, optim.weight_decay),
            ("head", objective, head.lr, head.weight_decay),
        ):
            for decays in (True, False):
                own = [p for p in parameters if (p.ndim > 1) == decays]
                if own:
                    groups.append(
                        {
                            "params": own,
                            "lr": peak,
                            "peak_lr": peak,
                            "weight_decay": decay if decays else 0.0,
                            "name": name,
                        }
                    )
        return torch.optim.AdamW(groups, betas=optim.betas, fused=True)
