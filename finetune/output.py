"""A result folder that is written in one piece, and recognised when it is already there."""

import json
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from featcache.errors import ConfigError
from featcache.identity import differences

RECORD = "pretrain.json"
"""What a finished folder was made from."""


def is_finished(out: Path, record: dict[str, Any], restart: bool) -> bool:
    """Whether `out` already holds the result that `record` describes.

    Args:
        out: result folder.
        record: JSON values that a run with the same result has in common.
        restart: whether a result of this job may be replaced.

    Raises:
        ConfigError: if the folder holds something else.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not (out / RECORD).is_file():
        raise ConfigError(
            f"out: {out} exists and was not written by this job; choose another folder"
        )
    if restart:
        return False
    found = read_json(out / RECORD)
    found.pop("versions", None)
    for name, have, want in differences(found, record):
        raise ConfigError(
            f"out: {out} holds a result with {name} = {have!r}, this run has {want!r}; choose "
            "another folder, or --restart to replace it"
        )
    return True


@contextmanager
def written_at_once(out: Path) -> Iterator[Path]:
    """A scratch folder beside `out` that takes its place if the block ends well, or vanishes."""
    partial = out.with_name(f"{out.name}.partial-{secrets.token_hex(4)}")
    partial.mkdir(parents=True)
    try:
        yield partial
        old = out.with_name(f"{out.name}.old-{secrets.token_hex(4)}")
        if out.exists():
            out.rename(old)
        partial.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file."""
    value: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return value


def write_json(file: Path, value: dict[str, Any]) -> None:
    """Writes a JSON object, indented."""
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
