"""What an interrupted training of towers goes on from: one file, written atomically, no pickle.

It holds tensors in named groups (weights, the best adapter so far, averages), the optimizer's
moments, the loss scaler and plain JSON values (counters, history). Random numbers are no part of
it: a training draws them from its seed and the number of the epoch or step, by `seed_all`, so that
a resumed run repeats an uninterrupted one bit for bit, with any number of processes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finetune.parallel import laid_out, put, whole
from heads.run_folder import RunError, read_tensors, write_tensors

LAST = "last.safetensors"
"""State of an unfinished training, in its folder."""

_OPTIMIZER = "optimizer"


@dataclass(frozen=True)
class SavedState:
    """A state read back.

    Attributes:
        path: the file.
        tensors: group to name to tensor, on the CPU.
        values: plain JSON values that were given to `save_state`.
    """

    path: Path
    tensors: dict[str, dict[str, Tensor]]
    values: dict[str, Any]
    _moments: dict[int, dict[str, Tensor]]
    _scaler: dict[str, Any]

    def restore(
        self,
        targets: Mapping[str, Mapping[str, Tensor]],
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        """Puts groups of tensors into live ones, in place, and the optimizer's state back.

        Args:
            targets: groups to fill, such as {"model": model.state_dict(keep_vars=True)}; groups of
                the file that are not named here stay in `tensors`.
            optimizer: over the same parameters in the same order; learning rates stay as they are.
            scaler: of the loss.

        Raises:
            RunError: if names or shapes differ.
        """
        for group, live in targets.items():
            self._check(group, live)
        shapes = [p.shape for part in optimizer.param_groups for p in part["params"]]
        for index, moments in self._moments.items():
            for name, moment in moments.items():
                if moment.ndim and (index >= len(shapes) or moment.shape != shapes[index]):
                    expected = tuple(shapes[index]) if index < len(shapes) else "no such parameter"
                    raise self._unfit(
                        f"{name} of optimizer parameter {index}", tuple(moment.shape), expected
                    )
        with torch.no_grad():
            for group, live in targets.items():
                for name, tensor in live.items():
                    put(tensor, self.tensors[group][name])
        parameters = [p.detach() for part in optimizer.param_groups for p in part["params"]]
        moments_there = {
            index: {n: _like(m, parameters[index]) if m.ndim else m for n, m in moments.items()}
            for index, moments in self._moments.items()
        }
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": moments_there, "param_groups": groups})
        if scaler is not None and self._scaler:
            scaler.load_state_dict(self._scaler)

    def _check(self, group: str, live: Mapping[str, Tensor]) -> None:
        held = self.tensors.get(group, {})
        if differing := sorted(held.keys() ^ live.keys()):
            there = "there" if differing[0] in held else "missing"
            raise self._unfit(f"{group}/{differing[0]}", there, "the opposite")
        for name, tensor in live.items():
            if held[name].shape != tensor.shape:
                raise self._unfit(f"{group}/{name}", tuple(held[name].shape), tuple(tensor.shape))

    def _unfit(self, name: str, found: object, expected: object) -> RunError:
        return RunError(
            f"{self.path}: does not fit this training: {name} is {found}, expected {expected}; "
            "train anew with --restart"
        )


def _like(moment: Tensor, parameter: Tensor) -> Tensor:
    """A moment as its parameter is: sharded if that is, and in its order in memory.

    Fused kernels go through parameter, gradient and moments side by side in memory: in another
    order (channels_last) a moment would be another element's.
    """
    moment = laid_out(moment, parameter)
    if moment.stride() == parameter.stride():
        return moment
    return torch.empty_like(parameter, dtype=moment.dtype).copy_(moment)


def save_state(
    path: Path,
    *,
    tensors: Mapping[str, Mapping[str, Tensor]],
    optimizer: torch.optim.Optimizer,
    values: Mapping[str, Any],
    scaler: torch.amp.GradScaler | None = None,
    writes: bool = True,
) -> None:
    """Writes a state; the file holds the old one or the new one, whatever happens.

    Weights that are sharded over processes are put together: then every process must call it.

    Args:
        path: file.
        tensors: group to name to tensor, on any device; groups must not be called "optimizer", nor
            have a slash in their names.
        optimizer: its state is kept by parameter.
        values: plain JSON values.
        scaler: of the loss, for float16.
        writes: whether this process is the one that writes.
    """
    flat: dict[str, Tensor] = {}
    for group, named in tensors.items():
        assert group != _OPTIMIZER, group
        assert "/" not in group, group
        flat |= {f"{group}/{name}": tensor for name, tensor in named.items()}
    for index, moments in optimizer.state_dict()["state"].items():
        for name, moment in moments.items():
            held = moment if isinstance(moment, Tensor) else torch.as_tensor(moment)
            flat[f"{_OPTIMIZER}/{index}/{name}"] = held
    state = scaler.state_dict() if scaler is not None else {}
    # A tensor may be named in two groups: each is a copy of its own in the file.
    copies = {name: whole(tensor.detach()).to("cpu", copy=True) for name, tensor in flat.items()}
    if not writes:
        return
    write_tensors(path, copies, {"values": dict(values), "scaler": state, "groups": list(tensors)})


def read_state(path: Path) -> SavedState:
    """What `save_state` wrote.

    Raises:
        RunError: if the file is damaged.
    """
    read = read_tensors(path)
    try:
        groups: dict[str, dict[str, Tensor]] = {name: {} for name in read.record["groups"]}
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in read.tensors.items():
            group, rest = name.split("/", 1)
            if group == _OPTIMIZER:
                index, key = rest.split("/", 1)
                moments.setdefault(int(index), {})[key] = tensor
            else:
                groups[group][rest] = tensor
        return SavedState(path, groups, read.record["values"], moments, read.record["scaler"])
    except (KeyError, ValueError):
        raise RunError(f"{path}: no state of a training; train anew with --restart") from None


def seed_all(*numbers: int) -> None:
    """Seeds torch's generators, of the CPU and of GPUs, from several numbers.

    Args:
        numbers: such as (seed, epoch, rank); neighbouring ones share nothing.
    """
    mixed = np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1
    torch.manual_seed(int(mixed))
