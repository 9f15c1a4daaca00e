"""AdamW that only touches the rows of a parameter which a step has a gradient for.

A row is what the first axis counts: a class of (C, K, D) offsets. Where few classes have a gradient
in a step, the others cost neither time nor gradient memory. Moments can be held in bfloat16.

A row's moments are those of AdamW: the steps that passed it by had gradient 0, so that its moments
are multiplied by β^(steps since), and the correction for the zero start counts all steps. What is
left out is the momentum's own tail: AdamW would go on moving a row for some steps after its last
gradient, this moves it only in steps that touch it. Weight decay is made up for at the touch, as if
the rate had been that of this step all along. Where every step touches every row it is AdamW.

Reference: Kingma and Ba, Adam, 2015, algorithm 1; Loshchilov and Hutter, Decoupled Weight Decay
Regularization, 2019, algorithm 2; the lazy form departs from both as said above.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, overload

import torch
from torch import Tensor

StateDtype = Literal["float32", "bfloat16"]

_STEP_NUMBERS = 2**22
"""Numbers updated at a time: temporaries stay at 16 MiB each."""
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class LazyAdamW(torch.optim.Optimizer):
    """AdamW on the rows that have a gradient, dense or sparse over the first axis."""

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        state_dtype: StateDtype = "float32",
    ) -> None:
        """Moments are made at the first step.

        Args:
            params: parameters, or groups of them.
            lr: learning rate.
            betas: decay of the first and of the second moment, 0 to below 1.
            eps: added to the root of the second moment.
            weight_decay: decoupled weight decay.
            state_dtype: of both moments; bfloat16 is rounded at random up or down, or the second
                moment's steps of 0.1 % would be lost in its steps of 0.8 %.
        """
        self.state_dtype = _DTYPES[state_dtype]
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Updates every parameter that has a gradient, in place.

        Raises:
            ValueError: for a closure: the loss is not computed again.
        """
        if closure is not None:
            raise ValueError("LazyAdamW takes no closure")
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return None

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores a state; moments keep their type, which torch would make the parameter's."""
        super().load_state_dict(dict(state_dict))
        for state in self.state.values():
            state["last"] = state["last"].to(torch.int64)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = state[name].to(self.state_dtype)

    def _update(self, parameter: Tensor, group: Mapping[str, Any]) -> None:
        state = self.state[parameter]
        flat = parameter.view(_num_rows(parameter), -1)
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["last"] = torch.zeros(len(flat), dtype=torch.int64, device=flat.device)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(parameter, dtype=self.state_dtype)
        state["step"] += 1
        step = int(state["step"])
        gradient, rows = _touched(parameter)
        first = state["exp_avg"].view(len(flat), -1)
        second = state["exp_avg_sq"].view(len(flat), -1)
        size = max(1, _STEP_NUMBERS // flat.shape[1])
        for start in range(0, len(gradient), size):
            part = slice(start, start + size)
            which = part if rows is None else rows[part]
            self._update_rows(
                flat, first, second, state["last"], gradient[part], which, step, group
            )

    def _update_rows(
        self,
        flat: Tensor,
        first: Tensor,
        second: Tensor,
        last: Tensor,
        gradient: Tensor,
        which: Tensor | slice,
        step: int,
        group: Mapping[str, Any],
    ) -> None:
        """One step of some rows: `which` of (R, n) values, from an (r, n) gradient."""
        beta1, beta2 = group["betas"]
        elapsed = (step - last[which]).to(flat.dtype).unsqueeze(1)
        last[which] = step
        mean = first[which].float() * beta1**elapsed
        mean.add_(gradient, alpha=1 - beta1)
        square = second[which].float() * beta2**elapsed
        square.addcmul_(gradient, gradient, value=1 - beta2)
        first[which] = _stored(mean, first.dtype, gradient, 2 * step)
        second[which] = _stored(square, second.dtype, gradient, 2 * step + 1)
        values = flat[which]
        if group["weight_decay"] > 0.0:
            values = values * (1 - group["lr"] * group["weight_decay"]) ** elapsed
        denominator = square.div_(1 - beta2**step).sqrt_().add_(group["eps"])
        flat[which] = values.addcdiv(mean, denominator, value=-group["lr"] / (1 - beta1**step))


def _num_rows(parameter: Tensor) -> int:
    """Length of the first axis; a single number is one row."""
    return len(parameter) if parameter.ndim else 1


def _touched(parameter: Tensor) -> tuple[Tensor, Tensor | None]:
    """(r, n) gradient of the rows that have one, and their numbers (r,); None = all of them."""
    gradient = parameter.grad
    assert gradient is not None
    if gradient.is_sparse:
        rows = gradient._indices()[0]
        if not bool((rows[1:] > rows[:-1]).all()):  # autograd drops the mark of those that are
            gradient = gradient.coalesce()
            rows = gradient._indices()[0]
        values = gradient._values().flatten(1)
        return values, None if len(rows) == len(parameter) else rows
    flat = gradient.reshape(_num_rows(parameter), -1)
    rows = flat.any(dim=1).nonzero().squeeze(1)
    return (flat, None) if len(rows) == len(flat) else (flat[rows], rows)


def _stored(values: Tensor, dtype: torch.dtype, gradient: Tensor, salt: int) -> Tensor:
    """`values` as they are kept: float32, or bfloat16 rounded at random, right on average.

    The randomness comes out of the gradient's bits and `salt`: the same in a repeated training,
    and much faster than a generator.
    """
    if dtype == torch.float32:
        return values
    noise = gradient.float().contiguous().view(torch.int32) + salt * 0x61C88647 % 2**31
    noise = noise.mul_(0x3C6EF35F).bitwise_xor_(noise >> 15).mul_(0x2C1B3C6D)
    bits = values.view(torch.int32) + ((noise >> 12) & 0xFFFF)
    return (bits & -0x10000).view(torch.float32).to(dtype)
