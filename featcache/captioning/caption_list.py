"""A list of captions on disk: `path caption`, one line an image, appended to and never half.

Its record beside it (`<list>.json`) says which model and options wrote it, so that a list never
mixes two of them.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import RawIOBase
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from featcache.errors import CacheError, ConfigError
from featcache.identity import differences


class CaptionList:
    """A list opened for appending; see `open_list`.

    Attributes:
        path: the list.
        done: paths that have a caption.
    """

    def __init__(self, path: Path, file: RawIOBase, done: set[str]) -> None:
        self.path = path
        self.done = done
        self._file = file

    def append(self, paths: Sequence[str], captions: Sequence[str]) -> None:
        """Writes whole lines; they are in the file when this returns, or none of them.

        Raises:
            CacheError: if the disk is full.
        """
        lines = [f"{path} {caption}\n" for path, caption in zip(paths, captions, strict=True)]
        left = "".join(lines).encode()
        before = self._file.seek(0, os.SEEK_END)
        try:
            while left:
                left = left[self._file.write(left) or 0 :]
        except OSError as error:
            self._file.truncate(before)
            raise CacheError(
                f"{self.path}: cannot be written ({error.strerror}); what is there stays, the same "
                "command goes on"
            ) from error
        self.done.update(paths)


def record_of(path: Path) -> dict[str, Any] | None:
    """What wrote the list at `path`; None if there is no list.

    Raises:
        ConfigError: if there is a list that this tool did not write.
    """
    file = _record_file(path)
    if not path.exists():
        return None
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        record = None
    if not isinstance(record, dict):
        raise ConfigError(
            f"out {path}: is there, but {file.name} beside it, which says what wrote it, is not; "
            "choose another out, or delete it"
        )
    return record


@contextmanager
def open_list(path: Path, record: Mapping[str, Any]) -> Iterator[CaptionList]:
    """The list at `path`, created if it is not there; one process writes it at a time.

    A line without its end, which only a crash leaves behind, is cut off.

    Args:
        path: the list.
        record: model and options that write it, plain JSON values.

    Raises:
        ConfigError: if other options wrote it, naming the first one.
        CacheError: if another process writes it, or it cannot be written.
    """
    lock = FileLock(path.with_name(f"{path.name}.lock"), thread_local=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise CacheError(
            f"{path}: another process is writing it; wait until it is done, or stop it"
        ) from None
    except OSError as error:
        raise CacheError(f"{path}: cannot be written ({error.strerror})") from error
    try:
        found = record_of(path)
        for name, have, want in differences(found or record, record):
            raise ConfigError(
                f"out {path}: {name} differs: the list was written with {have!r}, this job wants "
                f"{want!r}; choose another out, or delete it to begin anew"
            )
        if found is None:
            _write_record(path, record)
        with open(path, "ab", buffering=0) as file:
            yield CaptionList(path, file, _done(path))
            os.fsync(file.fileno())
    finally:
        lock.release()


def _done(path: Path) -> set[str]:
    done: set[str] = set()
    whole = 0
    with open(path, "r+b") as file:
        for line in file:
            if not line.endswith(b"\n"):
                file.truncate(whole)
                break
            whole += len(line)
            done.add(line.split(b" ", 1)[0].decode())
    return done


def _write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Before the list itself: a list always has a record."""
    file = _record_file(path)
    partial = file.with_name(f"{file.name}.partial")
    partial.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    partial.replace(file)


def _record_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")
