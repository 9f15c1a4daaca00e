"""One line that says how far a job is: rewritten in place on a terminal, rare lines elsewhere."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TextIO

_TERMINAL_SECONDS = 0.1
_LOG_SECONDS = 10.0
_SILENT = ContextVar("silent", default=False)


@contextmanager
def silenced(quiet: bool = True) -> Iterator[None]:
    """No progress inside, for what is too deep to be told: a head that is fitted as it is built.

    Args:
        quiet: False changes nothing.
    """
    token = _SILENT.set(_SILENT.get() or quiet)
    try:
        yield
    finally:
        _SILENT.reset(token)


class ProgressLine:
    """Shows the latest of many messages, at most ten times a second (a log: every 10 seconds)."""

    def __init__(self, quiet: bool = False, stream: TextIO | None = None) -> None:
        """Writes to `stream`, by default standard error; `quiet` writes nothing."""
        self.quiet = quiet or _SILENT.get()
        self.stream = stream or sys.stderr
        self.terminal = self.stream.isatty()
        self._shown_at = -float("inf")
        self._pending = ""

    def show(self, message: str) -> None:
        """Replaces the message."""
        self._pending = message
        wait = _TERMINAL_SECONDS if self.terminal else _LOG_SECONDS
        if time.monotonic() - self._shown_at >= wait:
            self._write()

    def close(self) -> None:
        """Shows the last message and ends the line."""
        if self._pending:
            self._write()
        if self.terminal and not self.quiet and self._shown_at > 0:
            self.stream.write("\n")

    def _write(self) -> None:
        if not self.quiet:
            self.stream.write(
                f"\r\x1b[2K{self._pending}" if self.terminal else f"{self._pending}\n"
            )
            self.stream.flush()
        self._pending = ""
        self._shown_at = time.monotonic()


def duration(seconds: float) -> str:
    """Seconds in words of two units, such as `1 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
