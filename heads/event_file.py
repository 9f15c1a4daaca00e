"""Curves as TensorBoard event files, written without the tensorboard package.

`tensorboard --logdir runs` shows them. An event file is a chain of records, each a length, its
checksum, a protocol buffer and its checksum; of the buffers only scalars are needed here.

Reference: TensorFlow's `tfrecord` format and `event.proto` (field numbers below).
"""

import socket
import struct
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import google_crc32c

FOLDER = "tensorboard"
"""Folder of the event files, in a run folder."""

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_NOT_CURVES = ("epoch", "step")


class EventFile:
    """A file that grows by the scalars of one epoch at a time."""

    def __init__(self, folder: Path, history: Iterable[Mapping[str, Any]] = ()) -> None:
        """Begins a file in place of an earlier one, with the epochs of a resumed training."""
        folder = folder / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        for earlier in folder.glob("events.out.tfevents.*"):
            earlier.unlink()
        self.path = folder / f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}"
        self._append(_event(3, _BYTES, _sized(b"brain.Event:2")))
        for record in history:
            self.add(record)

    def add(self, record: Mapping[str, Any]) -> None:
        """Appends one epoch's numbers; the horizontal axis is the optimiser step."""
        flat: dict[str, float] = {}
        for name, value in record.items():
            if isinstance(value, Mapping):
                flat |= {f"{name}/{key}": number for key, number in value.items()}
            elif name not in _NOT_CURVES:
                flat[name] = value
        values = b"".join(
            _field(1, _BYTES, _sized(_scalar(name, value))) for name, value in flat.items()
        )
        step = _field(2, _VARINT, _varint(int(record["step"])))
        self._append(step + _event(5, _BYTES, _sized(values)))

    def _append(self, event: bytes) -> None:
        length = struct.pack("<Q", len(event))
        content = length + _checksum(length) + event + _checksum(event)
        with self.path.open("ab") as file:
            file.write(content)


def _event(number: int, wire: int, content: bytes) -> bytes:
    """A message `Event` of now: wall_time = 1, step = 2, file_version = 3, summary = 5."""
    return _field(1, _FIXED64, struct.pack("<d", time.time())) + _field(number, wire, content)


def _scalar(name: str, value: float) -> bytes:
    """A message `Summary.Value`: tag = 1, simple_value = 2."""
    return _field(1, _BYTES, _sized(name.encode())) + _field(2, _FIXED32, struct.pack("<f", value))


def _field(number: int, wire: int, content: bytes) -> bytes:
    return _varint(number << 3 | wire) + content


def _sized(content: bytes) -> bytes:
    return _varint(len(content)) + content


def _varint(value: int) -> bytes:
    result = bytearray()
    while value >= 0x80:
        result.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*result, value])


def _checksum(content: bytes) -> bytes:
    """CRC-32C, rotated and shifted so that checksums of checksums stay good."""
    crc = google_crc32c.value(content)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
