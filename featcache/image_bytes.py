"""The bytes of an image, wherever it lies: the one place that reads a row's path.

A path is relative to the dataset's root and takes one of these forms:

    train/oak/17.jpg                      a file
    train-0000.tar@1536+48211/0042.jpg    48211 bytes at offset 1536 of an uncompressed tar
    train/data-00000.arrow@17/image       column `image` of row 17 of an Arrow stream file

Other containers add a line to `CONTAINERS`.
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import xxhash

from featcache.arrow_cells import read_cell


@dataclass(frozen=True)
class Container:
    """Files that hold several images.

    Attributes:
        pattern: matches the paths of such images as a whole.
        read: bytes of an image, from the root and the match; raises OSError or ValueError.
        stamp: see `stamp`; 0 = unknown; raises OSError.
    """

    pattern: re.Pattern[str]
    read: Callable[[Path, re.Match[str]], bytes]
    stamp: Callable[[Path, re.Match[str]], int]


def read_bytes(root: str | Path, path: str) -> bytes:
    """The bytes of one image file.

    Args:
        root: folder that `path` starts from.
        path: a row's path; see the module's text.

    Raises:
        ValueError: the reason why it cannot be read, in a few words, e.g. `missing`.
    """
    try:
        container, match = _container(path)
        if container is None or match is None:
            return (Path(root) / path).read_bytes()
        return container.read(Path(root), match)
    except FileNotFoundError:
        raise ValueError("missing") from None
    except OSError as error:
        raise ValueError((error.strerror or str(error)).lower()) from None


def stamp(root: str | Path, path: str) -> int:
    """A cheap mark of an image's version, without reading it: equal marks mean equal bytes.

    Returns:
        XXH3-64 of size and modification time (nanoseconds) of the file or of the tar, and of the
        place in the tar; 0 if there is nothing to tell by.
    """
    try:
        container, match = _container(path)
        if container is None or match is None:
            return file_stamp(Path(root) / path)
        return container.stamp(Path(root), match)
    except OSError:
        return 0


def file_stamp(file: Path, *more: int) -> int:
    """XXH3-64 of a file's size and modification time, and of further numbers.

    Raises:
        OSError: if there is no such file.
    """
    status = file.stat()
    return hash_numbers(status.st_size, status.st_mtime_ns, *more)


def hash_numbers(*numbers: int) -> int:
    """XXH3-64 of numbers; never 0, which means unknown."""
    return xxhash.xxh3_64_intdigest(" ".join(map(str, numbers)).encode()) or 1


def _container(path: str) -> tuple[Container | None, re.Match[str] | None]:
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
        raise ValueError("the tar ends before this member does")
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
