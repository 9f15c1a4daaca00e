"""A result folder that appears in one piece, and the folder beside it that a run goes on from."""

import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from featcache.errors import ConfigError
from featcache.identity import differences
from finetune.checkpoint import LAST
from heads.run_folder import RunError, read_json, write_json

RECORD = "pretrain.json"
"""What a folder was made from: of pretraining; other jobs name their own file."""

CHECKPOINTS = "checkpoint_*"
"""Saved states with a folder of their own."""

_LOCK = ".lock"


def is_finished(out: Path, record: dict[str, Any], restart: bool, file: str = RECORD) -> bool:
    """Whether `out` already holds the result that `record` describes.

    Args:
        out: result folder.
        record: JSON values that a run with the same result has in common.
        restart: whether a result of this job may be replaced.
        file: name of the job's record in the folder.

    Raises:
        ConfigError: if the folder holds something else.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not (out / file).is_file():
        raise ConfigError(
            f"out: {out} exists and was not written by this job; choose another folder"
        )
    if restart:
        return False
    _check_same(out, out / file, record, "a result")
    return True


@contextmanager
def resumable(
    out: Path, record: dict[str, Any], restart: bool, file: str = RECORD
) -> Iterator[Path]:
    """The folder `OUT.partial`, this process's alone; it becomes `out` if the block ends well.

    After an error it stays if it holds a saved state (`last.safetensors` or `checkpoint_*`): the
    same run finds it again and goes on.

    Args:
        out: result folder; see `is_finished` first.
        record: JSON values that a run with the same result has in common.
        restart: whether to begin anew instead of going on.
        file: name of the job's record in the folder.

    Raises:
        RunError: if another process is at work there, or has just finished.
        ConfigError: if what was interrupted there was another run, or nothing of this job.
    """
    partial = out.with_name(f"{out.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    if any(partial.iterdir()) and not any((partial / name).is_file() for name in (_LOCK, file)):
        raise ConfigError(f"out: {partial} is in the way and was not written by this job; move it")
    lock = FileLock(partial / _LOCK, thread_local=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RunError(
            f"{partial}: another process is at work there; wait for it, or choose another --out"
        ) from None
    try:
        if not restart and (out / file).is_file():
            raise RunError(f"{out}: another process has just finished it; start again to read it")
        if restart:
            _clear(partial)
        if _has_state(partial):
            _check_same(partial, partial / file, record, "an interrupted run")
        else:
            _clear(partial)
            write_json(partial / file, record)
        try:
            yield partial
        except BaseException:
            if not _has_state(partial):
                shutil.rmtree(partial, ignore_errors=True)
            raise
        (partial / _LOCK).unlink(missing_ok=True)
        _replace(out, partial)
    finally:
        lock.release()


def _check_same(folder: Path, file: Path, record: dict[str, Any], what: str) -> None:
    found = read_json(file)
    found.pop("versions", None)
    for name, have, want in differences(found, record):
        raise ConfigError(
            f"out: {folder} holds {what} with {name} = {have!r}, this run has {want!r}; choose "
            "another folder, or --restart to replace it"
        )


def _has_state(folder: Path) -> bool:
    return (folder / LAST).is_file() or any(folder.glob(CHECKPOINTS))


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != _LOCK:
            path.unlink()


def _replace(out: Path, partial: Path) -> None:
    old = out.with_name(f"{out.name}.old-{secrets.token_hex(4)}")
    if out.exists():
        out.rename(old)
    partial.rename(out)
    shutil.rmtree(old, ignore_errors=True)
