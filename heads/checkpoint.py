"""The state of a training: its best model so far, and what an interrupted one goes on from."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from heads import run_folder
from heads.base import Head
from heads.run_folder import Checkpoint, RunError

CHECKPOINT = "last.safetensors"
"""State of an unfinished training, in its run folder."""


@dataclass(frozen=True)
class Best:
    """The best model so far, by validation.

    Attributes:
        value: main metric, 0..1. epoch: counted from 1. candidate: see `Head.candidates`.
        by_candidate: best value of each candidate. state: its trained tensors.
    """

    value: float
    epoch: int
    candidate: str
    by_candidate: dict[str, float]
    state: Mapping[str, Tensor]


NOTHING = Best(-math.inf, 0, "", {}, {})
"""Before the first validation."""


def better(best: Best, values: Mapping[str, float], head: Head, epoch: int) -> Best:
    """`best`, or a copy of the candidate that beats it; equal values keep the earlier one."""
    by_candidate = {
        name: max(value, best.by_candidate.get(name, -math.inf)) for name, value in values.items()
    }
    name = max(values, key=lambda key: values[key])
    if values[name] <= best.value:
        return Best(best.value, best.epoch, best.candidate, by_candidate, best.state)
    state = {key: t.detach().cpu().clone() for key, t in head.trained_state(name).items()}
    return Best(values[name], epoch, name, by_candidate, state)


def save_state(
    path: Path,
    head: Head,
    optimizer: torch.optim.Optimizer,
    best: Best,
    history: list[dict[str, Any]],
    cache_fingerprint: str,
) -> None:
    """Writes all that a training needs to go on, atomically, without pickle.

    Args:
        path: file to write.
        head: its parameters and buffers.
        optimizer: its state by parameter.
        best: the best model so far.
        history: one record an epoch.
        cache_fingerprint: cache that is trained on.
    """
    state = optimizer.state_dict()["state"]
    tensors = {f"head/{name}": tensor for name, tensor in head.state_dict().items()}
    tensors |= {f"best/{name}": tensor for name, tensor in best.state.items()}
    for index, values in state.items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer/{index}/{name}"] = value
    record = {
        "cache": cache_fingerprint,
        "history": history,
        "best": {
            "value": best.value,
            "epoch": best.epoch,
            "candidate": best.candidate,
            "by_candidate": best.by_candidate,
        },
        "versions": run_folder.versions(),
    }
    run_folder.write_tensors(path, tensors, record)


def restore_state(
    saved: Checkpoint, head: Head, optimizer: torch.optim.Optimizer, cache_fingerprint: str
) -> tuple[Best, list[dict[str, Any]]]:
    """Puts a saved state into head and optimiser; returns the best model and the history.

    Raises:
        RunError: if it belongs to a training on another cache.
    """
    record = saved.record
    if record["cache"] != cache_fingerprint:
        raise RunError(
            f"the interrupted training read cache {record['cache']}, this one is "
            f"{cache_fingerprint}; use --restart, or the other cache"
        )
    groups: dict[str, dict[str, Tensor]] = {"head": {}, "best": {}, "optimizer": {}}
    for name, tensor in saved.tensors.items():
        kind, rest = name.split("/", 1)
        groups[kind][rest] = tensor
    head.load_state_dict(groups["head"])
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in groups["optimizer"].items():
        index, key = name.split("/", 1)
        state.setdefault(int(index), {})[key] = tensor
    current = optimizer.state_dict()
    optimizer.load_state_dict({"state": state, "param_groups": current["param_groups"]})
    best = Best(**record["best"], state=groups["best"])
    return best, list(record["history"])
