"""The bytes of an image, wherever it lies: the one place that reads a row's path.

A path is relative to the dataset's root and takes one of these forms:

    train/oak/17.jpg                      a file
    train-0000.tar@1536+48211/0042.jpg    48211 bytes at offset 1536 of an uncompressed tar
    train/data-00000.arrow@17/image       column `image` of row 17 of an Arrow stream file

The root may be a folder or `s3://bucket/prefix`. Other containers add a line to `CONTAINERS`.
"""

import contextlib
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import xxhash

from featcache.formats.arrow_cells import read_cell
from featcache.storage import Where, is_url, locate

_CUT_OFF = "the tar ends before this member does"


@dataclass(frozen=True)
class Container:
    """Files that hold several images.

    Attributes:
        pattern: matches the paths of such images as a whole; they have an `@`.
        read: bytes of an image, from the root and the match; raises OSError or ValueError.
        stamp: see `stamp`; 0 = unknown; raises OSError.
    """

    pattern: re.Pattern[str]
    read: Callable[[Path, re.Match[str]], bytes]
    stamp: Callable[[Path, re.Match[str]], int]


def read_bytes(root: Where, path: str) -> bytes:
    """The bytes of one image file.

    Args:
        root: folder or address that `path` starts from.
        path: a row's path; see the module's text.

    Raises:
        ValueError: the reason why it cannot be read, in a few words, e.g. `missing`.
        StorageError: if an object store refuses or cannot be reached.
    """
    found = read_many(root, [path])[0]
    if isinstance(found, ValueError):
        raise found
    return found


def read_many(root: Where, paths: Sequence[str]) -> list[bytes | ValueError]:
    """The bytes of several images, or why one cannot be read; see `read_bytes`.

    On an object store, neighbours in a tar come by one request.

    Raises:
        StorageError: if an object store refuses or cannot be reached.
    """
    if is_url(root):
        return _read_objects(root, paths)
    return [_read_file(Path(str(root)), path) for path in paths]


def stamp(root: Where, path: str) -> int:
    """A cheap mark of an image's version, without reading it: equal marks mean equal bytes.

    Returns:
        XXH3-64 of size and modification time (nanoseconds) of the file or of the tar, and of the
        place in the tar; 0 if there is nothing to tell by. On an object store the ETag stands for
        the time.

    Raises:
        StorageError: if an object store refuses or cannot be reached.
    """
    if is_url(root):
        return _object_stamp(root, path)
    try:
        container, match = _container(path)
        if container is None or match is None:
            return file_stamp(os.path.join(root, path))  # a path object costs more
        return container.stamp(Path(str(root)), match)
    except OSError:
        return 0


def _read_file(root: Path, path: str) -> bytes | ValueError:
    try:
        container, match = _container(path)
        if container is None or match is None:
            return (root / path).read_bytes()
        return container.read(root, match)
    except ValueError as error:
        return error
    except FileNotFoundError:
        return ValueError("missing")
    except OSError as error:
        return ValueError((error.strerror or str(error)).lower())


def _read_objects(root: Where, paths: Sequence[str]) -> list[bytes | ValueError]:
    folder = locate(root)
    found: list[bytes | ValueError] = [ValueError("missing")] * len(paths)
    members: dict[str, list[tuple[int, int, int]]] = {}
    for place, path in enumerate(paths):
        _, match = _container(path)
        if match is None:
            with contextlib.suppress(FileNotFoundError):
                found[place] = folder.read(path)
        elif "tar" in match.groupdict():
            start = int(match["offset"])
            members.setdefault(match["tar"], []).append((place, start, start + int(match["size"])))
        else:
            found[place] = ValueError("in a file that has to be copied to a disk first")
    for tar, ranges in members.items():
        _, starts, stops = zip(*ranges, strict=True)
        with contextlib.suppress(FileNotFoundError):
            parts = folder.read_ranges(tar, starts, stops)
            for (place, start, stop), part in zip(ranges, parts, strict=True):
                found[place] = part if len(part) == stop - start else ValueError(_CUT_OFF)
    return found


def _object_stamp(root: Where, path: str) -> int:
    _, match = _container(path)
    inside = {} if match is None else match.groupdict()
    if inside and "tar" not in inside:
        return 0
    # The clock in the arguments lets what was found grow old.
    found = _object_version(str(root), inside.get("tar", path), int(time.monotonic() / 60))
    if found is None:
        return 0
    where = (int(inside["offset"]), int(inside["size"])) if inside else ()
    return hash_numbers(*found, *where)


@lru_cache(maxsize=4096)
def _object_version(root: str, key: str, minute: int) -> tuple[int, int] | None:
    found = locate(root).entry(key)
    if found is None:
        return None
    return found.size, xxhash.xxh3_64_intdigest(found.version.encode())


def file_stamp(file: str | Path, *more: int) -> int:
    """XXH3-64 of a file's size and modification time, and of further numbers.

    Raises:
        OSError: if there is no such file.
    """
    status = os.stat(file)
    return hash_numbers(status.st_size, status.st_mtime_ns, *more)


def hash_numbers(*numbers: int) -> int:
    """XXH3-64 of numbers; never 0, which means unknown."""
    return xxhash.xxh3_64_intdigest(" ".join(map(str, numbers)).encode()) or 1


def _container(path: str) -> tuple[Container | None, re.Match[str] | None]:
    if "@" not in path:  # a plain file, at a fraction of the patterns' cost
        return None, None
    for container in CONTAINERS:
        match = container.pattern.fullmatch(path)
        if match is not None:
            return container, match
    return None, None


def tar_member_path(tar: str, offset: int, size: int, member: str) -> str:
    """The path of an image inside a tar.

    Args:
        tar: the tar's path, relative to the root.
        offset: first byte of the member's content.
        size: bytes of the content.
        member: the member's name, for people.
    """
    return f"{tar}@{offset}+{size}/{member}"


def _read_member(root: Path, match: re.Match[str]) -> bytes:
    offset, size = int(match["offset"]), int(match["size"])
    descriptor = os.open(root / match["tar"], os.O_RDONLY)
    try:
        data = os.pread(descriptor, size, offset)
    finally:
        os.close(descriptor)
    if len(data) < size:
        raise ValueError(_CUT_OFF)
    return data


def _member_stamp(root: Path, match: re.Match[str]) -> int:
    return file_stamp(root / match["tar"], int(match["offset"]), int(match["size"]))


def arrow_cell_path(file: str, row: int, column: str) -> str:
    """The path of an image inside an Arrow stream file.

    Args:
        file: the file's path, relative to the root; ends with `.arrow`.
        row: counted from 0 in that file.
        column: of binary type, or a struct with a field `bytes`.
    """
    return f"{file}@{row}/{column}"


def _read_arrow(root: Path, match: re.Match[str]) -> bytes:
    return read_cell(root / match["file"], int(match["row"]), match["column"])


def _arrow_stamp(root: Path, match: re.Match[str]) -> int:
    column = xxhash.xxh3_64_intdigest(match["column"].encode())
    return file_stamp(root / match["file"], int(match["row"]), column)


CONTAINERS: list[Container] = [
    Container(
        re.compile(r"(?P<file>.+?\.arrow)@(?P<row>\d+)/(?P<column>.+)", re.DOTALL),
        _read_arrow,
        _arrow_stamp,
    ),
    Container(
        re.compile(r"(?P<tar>.+?\.tar)@(?P<offset>\d+)\+(?P<size>\d+)/(?P<member>.+)", re.DOTALL),
        _read_member,
        _member_stamp,
    ),
]
"""Every kind of container; the first one whose pattern matches a path reads it."""
