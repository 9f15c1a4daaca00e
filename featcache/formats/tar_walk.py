"""Names and places of a tar's files, by reading its headers only.

Only uncompressed tars: a member of theirs is a range of bytes that can be read by itself. ustar,
GNU (long names, sizes in base 256) and pax headers are understood; anything doubtful is an error,
since a sample that is silently left out is never found again.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Never

from featcache.errors import DatasetError
from featcache.storage import Location, StoreUrl

BLOCK = 512
"""Tars are made of blocks of this many bytes."""
_READ_AHEAD = 16 << 10
"""Bytes read at a time from a disk, where skipping the images costs nothing."""
_STORE_READ_AHEAD = (64 << 10, 1 << 20, 8 << 20)
"""Least, first and most bytes read at a time from an object store, where a request takes as long as
a megabyte: more while headers follow each other closely, fewer while big images lie between."""
_MAX_EXTENDED = 1 << 20
"""Longest pax or long-name header that is believed."""


@dataclass(frozen=True)
class Member:
    """A regular file in a tar.

    Attributes:
        name: its path in the tar.
        offset: first byte of its content in the tar.
        size: bytes of its content.
    """

    name: str
    offset: int
    size: int


class TarFile:
    """A tar somewhere, read in ranges.

    Attributes:
        where: its address, for messages.
        size: bytes.
        version: changes when the tar is written anew.
    """

    def __init__(self, folder: Location, key: str) -> None:
        """Looks it up.

        Raises:
            DatasetError: if there is no such tar.
            StorageError: if the store refuses or cannot be reached.
        """
        self.where = f"{folder.url}/{key}"
        found = folder.entry(key)
        if found is None:
            raise DatasetError(f"{self.where}: no such tar; check the option's pattern")
        self.size, self.version = found.size, found.version
        self._folder, self._key = folder, key
        self._adapts = isinstance(folder.url, StoreUrl)
        self._ahead = _STORE_READ_AHEAD[1] if self._adapts else _READ_AHEAD
        self._start, self._buffer = 0, b""

    def read(self, start: int, size: int) -> bytes:
        """`size` bytes from `start`; fewer at the end of the file."""
        first = start - self._start
        if first < 0 or first + size > len(self._buffer):
            if self._adapts and self._buffer:
                skipped = start - self._start - len(self._buffer)
                least, _, most = _STORE_READ_AHEAD
                close = skipped < self._ahead
                self._ahead = min(most, 2 * self._ahead) if close else max(least, self._ahead // 2)
            stop = min(self.size, start + max(size, self._ahead))
            self._buffer = self._folder.read_range(self._key, start, stop)
            self._start, first = start, 0
        return self._buffer[first : first + size]

    def text(self, member: Member) -> str:
        """A small member's content, UTF-8 with or without a mark at its start.

        Raises:
            DatasetError: if it is not UTF-8, or too long to be a text.
        """
        if member.size > 16 * _MAX_EXTENDED:
            self.fail(f"member {member.name} has {member.size} bytes; expected a short text")
        try:
            return self.read(member.offset, member.size).decode("utf-8-sig")
        except UnicodeDecodeError:
            self.fail(f"member {member.name} is not UTF-8 text; write it anew")

    def fail(self, message: str) -> Never:
        """Raises a DatasetError that names the tar."""
        raise DatasetError(f"{self.where}: {message}")

    def members(self) -> Iterator[Member]:
        """Its regular files in order; directories, links and devices are passed over.

        Raises:
            DatasetError: if the tar is damaged, cut off, compressed or holds sparse files.
        """
        place, last = 0, "its beginning"
        common: dict[str, str] = {}
        own: dict[str, str] = {}
        while True:
            header = self.read(place, BLOCK)
            if header[:2] == b"\x1f\x8b" and place == 0:
                self.fail("is compressed; expected a plain tar, so unpack it with gunzip")
            if len(header) < BLOCK:
                self.fail(
                    f"is cut off behind {last}: no end mark at byte {place} of {self.size}; write "
                    "or copy it anew"
                )
            if not any(header):
                return
            kind, size = self._kind_and_size(header, place, own, last)
            data = place + BLOCK
            skips = kind not in b"123456"  # links, devices and folders have no content
            place = data + (-(-size // BLOCK) * BLOCK if skips else 0)
            if kind in b"xgLK":
                text = self._extended(data, size, last)
                if kind in b"xg":
                    (own if kind == b"x" else common).update(self._pax(text, last))
                elif kind == b"L":
                    own["path"] = _string(text)
                continue
            names = {**common, **own}
            own = {}
            name = names.get("path") or _name(header)
            last = f"member {_shown(name)}"
            if any(key.startswith("GNU.sparse") for key in names) or kind == b"S":
                self.fail(f"{last} is a sparse file; write the tar anew without --sparse")
            if kind not in (b"0", b"\0", b"7") or name.endswith("/"):
                continue
            if data + size > self.size:
                self.fail(
                    f"is cut off in {last}: it ends at byte {data + size}, the tar at byte "
                    f"{self.size}; write or copy it anew"
                )
            if _shown(name) != name:
                self.fail(f"the name of {last} is not UTF-8; rename the file and pack it anew")
            yield Member(name, data, size)

    def _kind_and_size(
        self, header: bytes, place: int, own: dict[str, str], last: str
    ) -> tuple[bytes, int]:
        try:
            found = _number(header[148:156])
            expected = sum(header) - sum(header[148:156]) + 8 * 32
            if found != expected and found != expected - 256 * _num_negative(header):
                raise ValueError("checksum")
            size = int(own["size"]) if "size" in own else _number(header[124:136])
            if size < 0:
                raise ValueError("size")
        except ValueError:
            what = "is no tar" if place == 0 else f"is damaged behind {last}"
            self.fail(f"{what}: no valid header at byte {place}; write or copy it anew")
        return header[156:157], size

    def _extended(self, start: int, size: int, last: str) -> bytes:
        text = self.read(start, size) if size <= _MAX_EXTENDED else b""
        if not size or len(text) < size:
            self.fail(f"is cut off or damaged behind {last}; write or copy it anew")
        return text

    def _pax(self, text: bytes, last: str) -> dict[str, str]:
        """Records of an extended header: length, key and value, each ended by a line feed."""
        found: dict[str, str] = {}
        try:
            while text.strip(b"\0"):
                length = int(text.split(b" ", 1)[0])
                key, value = text[:length].split(b" ", 1)[1].split(b"=", 1)
                if value[-1:] != b"\n" or length > len(text):
                    raise ValueError("record")
                found[_string(key)] = _string(value[:-1])
                text = text[length:]
        except (ValueError, IndexError):
            self.fail(f"has a damaged pax header behind {last}; write or copy it anew")
        return found


def _num_negative(header: bytes) -> int:
    """Bytes that old tars took for negative numbers when they summed a header."""
    return sum(byte > 127 for byte in header[:148] + header[156:])


def _name(header: bytes) -> str:
    name = _string(header[:100])
    prefix = _string(header[345:500]) if header[257:263] == b"ustar\0" else ""
    return f"{prefix}/{name}" if prefix else name


def _string(raw: bytes) -> str:
    return raw.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _shown(name: str) -> str:
    return name.encode("utf-8", "replace").decode()


def _number(field: bytes) -> int:
    """An octal number, or one in base 256 as GNU tar writes those of more than 8 GiB."""
    if field[0] in (0o200, 0o377):
        value = int.from_bytes(field[1:], "big")
        return value if field[0] == 0o200 else value - 256 ** (len(field) - 1)
    return int(field.split(b"\0", 1)[0].strip() or b"0", 8)
