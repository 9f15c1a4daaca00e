"""The state of a training: its best model so far, and what an interrupted one goes on from."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from heads import run_folder
from heads.averaging import WeightAverage
from heads.base import Head
from heads.run_folder import Checkpoint, RunError
from heads.watch import EarlyStop, Plateau

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
    return Best(values[name], epoch, name, by_candidate, copied_state(head, name))


def copied_state(head: Head, candidate: str) -> dict[str, Tensor]:
    """A copy of a candidate's trained tensors on the CPU; later steps do not change it."""
    return {key: t.detach().cpu().clone() for key, t in head.trained_state(candidate).items()}


@dataclass
class Training:
    """All that changes while a head is trained; what a checkpoint holds.

    Attributes:
        head: its parameters and buffers.
        optimizer: its state by parameter.
        scaler: of the loss, for float16; otherwise it does nothing.
        average: of the weights, if one is asked for.
        stop: counts epochs towards stopping early; plateau: towards lowering the rate.
        best: the best model so far.
        history: one record an epoch.
    """

    head: Head
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: WeightAverage | None
    stop: EarlyStop
    plateau: Plateau
    best: Best = NOTHING
    history: list[dict[str, Any]] = field(default_factory=list)


def save_state(path: Path, training: Training, cache_fingerprint: str) -> None:
    """Writes all that a training needs to go on, atomically, without pickle.

    Args:
        path: file to write.
        training: its state between two epochs.
        cache_fingerprint: cache that is trained on.
    """
    best = training.best
    tensors = {f"head/{name}": tensor for name, tensor in training.head.state_dict().items()}
    tensors |= {f"best/{name}": tensor for name, tensor in best.state.items()}
    if training.average is not None:
        tensors |= {f"average/{name}": t for name, t in training.average.values.items()}
    for index, values in training.optimizer.state_dict()["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer/{index}/{name}"] = value
    record = {
        "cache": cache_fingerprint,
        "history": training.history,
        "best": {
            "value": None if best is NOTHING else best.value,
            "epoch": best.epoch,
            "candidate": best.candidate,
            "by_candidate": best.by_candidate,
        },
        "stop": training.stop.record(),
        "plateau": training.plateau.record(),
        "scaler": training.scaler.state_dict(),
        "versions": run_folder.versions(),
    }
    run_folder.write_tensors(path, tensors, record)


def restore_state(saved: Checkpoint, training: Training, cache_fingerprint: str) -> None:
    """Puts a saved state into a training.

    Raises:
        RunError: if it belongs to a training on another cache.
    """
    record = saved.record
    if record["cache"] != cache_fingerprint:
        raise RunError(
            f"the interrupted training read cache {record['cache']}, this one is "
            f"{cache_fingerprint}; use --restart, or the other cache"
        )
    groups: dict[str, dict[str, Tensor]] = {
        kind: {} for kind in ("head", "best", "average", "optimizer")
    }
    for name, tensor in saved.tensors.items():
        kind, rest = name.split("/", 1)
        groups[kind][rest] = tensor
    training.head.load_state_dict(groups["head"])
    if training.average is not None:
        for name, value in training.average.values.items():
            value.copy_(groups["average"][name])
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in groups["optimizer"].items():
        index, key = name.split("/", 1)
        state.setdefault(int(index), {})[key] = tensor
    current = training.optimizer.state_dict()
    training.optimizer.load_state_dict({"state": state, "param_groups": current["param_groups"]})
    training.stop.restore(record["stop"])
    training.plateau.restore(record["plateau"])
    if record["scaler"]:
        training.scaler.load_state_dict(record["scaler"])
    if record["best"]["value"] is not None:
        training.best = Best(**record["best"], state=groups["best"])
    training.history = list(record["history"])
