"""Where data lie: a local folder or a folder of an object store, under one set of operations.

    locate("cache/birds")          a folder on a local disk
    locate("s3://bucket/birds")    a folder of an S3-compatible store (extra `s3`)

Keys are paths inside that folder with `/` between their parts. An object store has no folders of
its own: a folder is there when an object in it is.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import PlainSerializer, PlainValidator, WithJsonSchema

from featcache.errors import ConfigError
from featcache.layout.chunks import Content, link_file, make_folder, write_file

SCHEME = "s3://"


class StoreUrl(str):
    """`s3://bucket/prefix` without slashes at its end; named and joined the way a `Path` is."""

    __slots__ = ()

    @classmethod
    def parse(cls, text: str) -> Self:
        """The address `s3://bucket/prefix`.

        Raises:
            ConfigError: if the text is no such address.
        """
        bucket, _, prefix = text.removeprefix(SCHEME).partition("/")
        parts = prefix.strip("/").split("/") if prefix.strip("/") else []
        if not text.startswith(SCHEME) or not bucket or any(p in ("", ".", "..") for p in parts):
            raise ConfigError(f"{text}: expected a local folder or s3://bucket/prefix")
        return cls(SCHEME + "/".join([bucket, *parts]))

    @property
    def bucket(self) -> str:
        """Name of the bucket."""
        return self.removeprefix(SCHEME).partition("/")[0]

    @property
    def prefix(self) -> str:
        """Path in the bucket; "" = the bucket itself."""
        return self.removeprefix(SCHEME).partition("/")[2]

    def __truediv__(self, key: str) -> "StoreUrl":
        return StoreUrl(f"{self}/{key}".rstrip("/"))

    @property
    def name(self) -> str:
        """Last part of the address."""
        return self.rpartition("/")[2]

    @property
    def parent(self) -> "StoreUrl":
        """The folder around it; a bucket is its own parent."""
        return StoreUrl(self.rpartition("/")[0]) if self.prefix else self

    def with_name(self, name: str) -> "StoreUrl":
        """Another entry of the folder around it."""
        return self.parent / name

    def resolve(self) -> "StoreUrl":
        """Itself: an address is absolute."""
        return self


Where = str | Path | StoreUrl
"""What names a place: a path, or the text or address of a store's folder."""


def is_url(where: Where) -> bool:
    """Whether a text or path names an object store; `Path("s3://b/x")` has lost a slash."""
    return isinstance(where, StoreUrl) or str(where).startswith(("s3:/", "s3:\\"))


def place(where: Where) -> Path | StoreUrl:
    """A path or an address, whichever a text means.

    A symbolic link is followed: what lies beside a cache (its lock, its next state) has to be the
    same under all its names, and on its disk.

    Raises:
        ConfigError: for an address of another kind than s3.
    """
    if isinstance(where, StoreUrl):
        return where
    text = str(where)
    if is_url(where):
        return StoreUrl.parse(text if text.startswith(SCHEME) else text.replace("s3:/", SCHEME, 1))
    if "://" in text and text.partition("://")[0].isalnum():
        raise ConfigError(f"{text}: expected a local folder or s3://bucket/prefix")
    path = Path(where)
    return path.resolve() if path.name in ("", "..") or path.is_symlink() else path


def _cache_path(value: Any) -> Path | StoreUrl:
    if not isinstance(value, str | Path | StoreUrl) or str(value) == "":
        raise ValueError("expected a folder or s3://bucket/prefix")
    found = place(value)
    if isinstance(found, StoreUrl) and not found.prefix:
        raise ValueError("a cache needs a folder in its bucket, e.g. s3://bucket/birds")
    if not found.name:
        raise ValueError("a cache needs a folder of its own, this is the root of the disk")
    return found


CachePath = Annotated[
    Path | StoreUrl,
    PlainValidator(_cache_path),
    PlainSerializer(str, return_type=str),
    WithJsonSchema({"type": "string", "format": "path"}),
]
"""A configuration's field for a cache: a folder, or `s3://bucket/prefix`."""


@dataclass(frozen=True)
class Entry:
    """A file or object.

    Attributes:
        key: path inside the folder.
        size: bytes.
        version: changes when the content is written anew: an object's ETag, a file's time of
            writing in nanoseconds.
    """

    key: str
    size: int
    version: str


class Location(ABC):
    """A folder that holds data.

    Attributes:
        url: where it is, for messages and records.
    """

    url: Path | StoreUrl

    @abstractmethod
    def read(self, key: str) -> bytes:
        """Everything in a file.

        Raises:
            FileNotFoundError: if there is none.
            StorageError: if the store refuses or cannot be reached.
        """

    @abstractmethod
    def read_ranges(self, key: str, starts: Sequence[int], stops: Sequence[int]) -> list[bytes]:
        """Bytes [start, stop) of a file for each pair; near ones come by one request.

        A range past the file's end gives fewer bytes, or none.

        Raises:
            FileNotFoundError: if there is no such file.
            StorageError: if the store refuses or cannot be reached.
        """

    def read_range(self, key: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of a file; see `read_ranges`."""
        return self.read_ranges(key, [start], [stop])[0]

    @abstractmethod
    def entry(self, key: str) -> Entry | None:
        """Size and version of a file; None if there is none."""

    def exists(self, key: str) -> bool:
        """Whether there is a file of that key."""
        return self.entry(key) is not None

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[Entry]:
        """All files in the folder `prefix` and below it, by key."""

    @abstractmethod
    def write(self, key: str, *parts: Content) -> None:
        """Writes a file: afterwards it is there as a whole, whatever happened before."""

    @abstractmethod
    def delete(self, *keys: str) -> None:
        """Deletes files; those that are not there are no error."""

    @abstractmethod
    def copy(self, key: str, to: "Location", to_key: str) -> None:
        """Copies a file into a folder of the same disk or bucket without reading it.

        On a disk the two names share the bytes (a hard link), which is right for files that are
        only ever replaced.
        """


class LocalFolder(Location):
    """A folder on a local disk."""

    url: Path

    def __init__(self, path: str | Path) -> None:
        self.url = Path(path)

    def read(self, key: str) -> bytes:
        """See `Location.read`."""
        return (self.url / key).read_bytes()

    def read_ranges(self, key: str, starts: Sequence[int], stops: Sequence[int]) -> list[bytes]:
        """See `Location.read_ranges`."""
        with (self.url / key).open("rb") as stream:
            descriptor = stream.fileno()
            return [
                os.pread(descriptor, max(0, stop - start), start)
                for start, stop in zip(starts, stops, strict=True)
            ]

    def entry(self, key: str) -> Entry | None:
        """See `Location.entry`."""
        try:
            found = (self.url / key).stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return Entry(key, found.st_size, str(found.st_mtime_ns))

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """See `Location.list`."""
        for file in sorted((self.url / prefix).rglob("*")):
            if not file.is_dir():
                found = self.entry(file.relative_to(self.url).as_posix())
                if found is not None:
                    yield found

    def write(self, key: str, *parts: Content) -> None:
        """See `Location.write`."""
        file = self.url / key
        make_folder(file.parent)
        write_file(file, *parts)

    def delete(self, *keys: str) -> None:
        """See `Location.delete`."""
        for key in keys:
            (self.url / key).unlink(missing_ok=True)

    def copy(self, key: str, to: Location, to_key: str) -> None:
        """See `Location.copy`."""
        assert isinstance(to, LocalFolder), f"{to.url} is not a local folder"
        link_file(self.url / key, to.url / to_key)


def locate(where: Where) -> Location:
    """The folder that a path or an address names; nothing is read.

    Raises:
        ConfigError: for an address of another kind than s3.
        StorageError: if the extra `s3` is not installed.
    """
    found = place(where)
    if isinstance(found, Path):
        return LocalFolder(found)
    from featcache.remote.object_store import ObjectFolder

    return ObjectFolder(found)
