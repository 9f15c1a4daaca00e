"""Texts as an option gives them: sentences, and files with one a line."""

from collections.abc import Sequence
from pathlib import Path

from featcache.errors import ConfigError


def text_lines(given: str | Sequence[str] | None, option: str) -> list[str] | None:
    """The texts that an option means, in order; what ends with .txt is a file.

    Args:
        given: one or several; None = the option is unset.
        option: what error messages call it.

    Returns:
        At least one text, none of them empty; None for None.

    Raises:
        ConfigError: for a file that is missing, no UTF-8, or empty.
    """
    if given is None:
        return None
    found: list[str] = []
    for one in [given] if isinstance(given, str) else given:
        found += _lines(Path(one), option) if one.endswith(".txt") else [one]
    if not found or not all(text.strip() for text in found):
        raise ConfigError(f"{option}: found an empty text; expected at least one, none empty")
    return found


def _lines(file: Path, option: str) -> list[str]:
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise ConfigError(f"{option}: {file}: {reason}; expected one text a line") from None
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise ConfigError(f"{option}: {file} is empty; expected one text a line")
    return found
