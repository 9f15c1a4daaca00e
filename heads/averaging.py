"""The exponential moving average of a head's weights, which often scores better than the last ones.

Reference: Polyak and Juditsky, Acceleration of Stochastic Approximation by Averaging, 1992; the
exponential form of Tarvainen and Valpola, Mean teachers are better role models, 2017, section 3.
The decay grows with the steps, min(decay, (1 + n) / (10 + n)), so that the random start is
forgotten in short trainings too.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """A second copy of all trained parameters that follows them slowly.

    Attributes:
        values: the average by parameter name.
    """

    def __init__(self, head: nn.Module, decay: float) -> None:
        """Begins at the head's weights; `decay` 0 to below 1."""
        self.decay = decay
        self.parameters = {name: p for name, p in head.named_parameters() if p.requires_grad}
        self.values = {name: p.detach().clone() for name, p in self.parameters.items()}

    def update(self, num_steps: int) -> None:
        """Moves towards the weights after the `num_steps`-th optimiser step."""
        decay = min(self.decay, (1 + num_steps) / (10 + num_steps))
        own, new = list(self.values.values()), [p.detach() for p in self.parameters.values()]
        torch._foreach_lerp_(own, new, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The head computes with the average inside."""
        trained = {name: p.detach().clone() for name, p in self.parameters.items()}
        self._put(self.values)
        try:
            yield
        finally:
            self._put(trained)

    @torch.no_grad()
    def _put(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])
