"""Checkpoints of pretraining: folders that open_clip opens and that training goes on from.

checkpoint_{epoch}_{step}/
    open_clip_config.json, open_clip_model.safetensors   as in the result: `local-dir:` opens it
    training.safetensors                                 optimizer, loss scaler, counters, history
"""

import re
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import load
from torch import Tensor

from featcache.backbones.base import PixelSpec
from featcache.backbones.local_dir import save_local_dir
from finetune.checkpoint import read_state, save_state
from finetune.contrastive.loop import Progress, Training
from finetune.contrastive.text import UsedVocabulary
from finetune.parallel import put, whole
from heads.run_folder import RunError

STATE = "training.safetensors"
WEIGHTS = "open_clip_model.safetensors"
_NAME = re.compile(r"checkpoint_(\d+)_(\d+)")


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first; those that a killed run left half-written are not.

    Args:
        folder: of a run, finished or not.
    """
    found = [path for path in folder.glob("checkpoint_*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=_step)


def forget_half_written(folder: Path) -> None:
    """Deletes what a run left that was killed while it wrote a checkpoint."""
    for path in folder.glob(".checkpoint_*"):
        shutil.rmtree(path)


def weights_of(training: Training, vocabulary: UsedVocabulary | None) -> dict[str, Tensor]:
    """The model's tensors by name, whole, on the CPU; every process must call it."""
    state = {}
    for name, tensor in training.model.state_dict().items():
        value = whole(tensor)
        if vocabulary is not None and name == vocabulary.name:
            value = vocabulary.expanded(value)
        state[name] = value.detach().to("cpu", copy=True).contiguous()
    return state


def write_checkpoint(
    folder: Path,
    training: Training,
    vocabulary: UsedVocabulary | None,
    progress: Progress,
    architecture: dict[str, Any],
    spec: PixelSpec,
    keep: int,
    problems: Mapping[str, str],
) -> None:
    """Writes a checkpoint in one piece, then deletes all but the latest; every process calls it.

    Args:
        folder: of the run.
        training: its state.
        vocabulary: what its embedding is cut to, if it is.
        progress: its counters.
        architecture: open_clip model configuration.
        spec: preprocessing.
        keep: number of checkpoints that stay.
        problems: images found unreadable, with the reason.
    """
    state = weights_of(training, vocabulary)
    name = f"checkpoint_{progress.epoch}_{progress.step}"
    partial = folder / f".{name}.{secrets.token_hex(4)}"
    values = {
        "progress": asdict(progress),
        "strategy": training.strategy,
        "problems": dict(problems),
    }
    if training.group.leads:
        partial.mkdir()
        save_local_dir(partial, state, architecture, spec)
    save_state(
        partial / STATE,
        tensors={},
        optimizer=training.optimizer,
        scaler=training.scaler,
        values=values,
        writes=training.group.leads,
    )
    if training.group.leads:
        final = folder / name
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for old in checkpoints(folder)[:-keep]:
            shutil.rmtree(old)


def read_checkpoint(
    folder: Path, training: Training, vocabulary: UsedVocabulary | None
) -> tuple[Progress, dict[str, str]]:
    """Puts a checkpoint into a training; its progress, and the unreadable images known then.

    Raises:
        RunError: if it is damaged or of another training.
    """
    saved = read_state(folder / STATE)
    if saved.values["strategy"] != training.strategy:
        raise RunError(
            f"{folder}: was trained with strategy {saved.values['strategy']}, this run has "
            f"{training.strategy}; give the same, or --restart"
        )
    weights = load((folder / WEIGHTS).read_bytes())
    for name, tensor in training.model.state_dict(keep_vars=True).items():
        value = weights[name]
        if vocabulary is not None and name == vocabulary.name:
            value = vocabulary.cut(value)
        put(tensor, value)
    saved.restore({}, training.optimizer, training.scaler)
    return Progress(**saved.values["progress"]), saved.values["problems"]


def _step(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[2])
