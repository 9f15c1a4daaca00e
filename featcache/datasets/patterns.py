"""Lists of files by pattern: `train-{0000..0099}.tar`, `val-*.tar`, several of them with `::`."""

import fnmatch
import posixpath
import re
from pathlib import Path

from featcache.errors import DatasetError
from featcache.storage import SCHEME, LocalFolder, Location, is_url

_BRACES = re.compile(r"\{([^{}]*)\}")
_WILD = re.compile(r"[*?\[]")
MAX_FILES = 10_000_000
"""Most files that a pattern may mean; more is a slip of the keyboard."""


def expand(text: str) -> list[str]:
    """Patterns without braces, in the order given.

    `{007..012}` counts with as many digits, `{a,b}` chooses, `::` separates patterns, as WebDataset
    has it.

    Raises:
        DatasetError: for braces that are neither.
    """
    parts = [posixpath.expanduser(part) for part in text.split("::") if part]
    found = [each for part in parts for each in _expanded(part)]
    if len(found) > MAX_FILES:
        raise DatasetError(f"{text}: {len(found)} files; check the braces")
    return found


def _expanded(text: str) -> list[str]:
    match = _BRACES.search(text)
    if match is None:
        if "{" in text or "}" in text:
            raise DatasetError(f"{text}: a brace without its partner; expected {{0000..0099}}")
        return [text]
    inside = match[1]
    bounds = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
    if bounds is not None:
        first, last = int(bounds[1]), int(bounds[2])
        if abs(last - first) >= MAX_FILES:
            raise DatasetError(f"{text}: {{{inside}}} means {abs(last - first) + 1} files")
        padded = bounds[1].startswith("0") or bounds[2].startswith("0")
        width = max(len(bounds[1]), len(bounds[2])) if padded else 0
        step = 1 if first <= last else -1
        middles = [str(number).zfill(width) for number in range(first, last + step, step)]
    elif "," in inside:
        middles = inside.split(",")
    else:
        raise DatasetError(f"{text}: {{{inside}}} is neither {{0000..0099}} nor {{a,b}}")
    return [
        result
        for middle in middles
        for result in _expanded(text[: match.start()] + middle + text[match.end() :])
    ]


def common_root(patterns: list[str]) -> str:
    """The deepest folder that all patterns start from; `s3://bucket/…` for addresses.

    Raises:
        DatasetError: if some are addresses and some are not, or of different buckets.
    """
    folders = [posixpath.dirname(_WILD.split(pattern)[0]) or "." for pattern in patterns]
    urls = [is_url(folder) for folder in folders]
    try:
        if all(urls):
            bare = [folder.removeprefix(SCHEME) for folder in folders]
            root = posixpath.commonpath(bare)
            if not root:
                raise ValueError("buckets")
            return SCHEME + root
        if any(urls):
            raise ValueError("mixed")
        return posixpath.commonpath(folders)
    except ValueError:
        raise DatasetError(
            f"{patterns[0]} and {patterns[-1]} have no folder in common; expected files of one "
            "disk or one bucket, with the same beginning"
        ) from None


def find(folder: Location, root: str, pattern: str) -> list[str]:
    """Files that a pattern without braces means, as paths below the root, sorted by name.

    Args:
        folder: the root.
        root: its name, as patterns begin with it.
        pattern: starts with the root, or is relative to it.

    Raises:
        DatasetError: if a pattern with wildcards finds nothing.
    """
    inside = posixpath.normpath(pattern) if not is_url(pattern) else pattern
    start = root.rstrip("/") + "/"
    if root != "." and inside.startswith(start):
        inside = inside[len(start) :]
    if not _WILD.search(inside):
        return [inside]
    if isinstance(folder, LocalFolder):
        found = sorted(file.relative_to(folder.url).as_posix() for file in folder.url.glob(inside))
    else:
        fixed = posixpath.dirname(_WILD.split(inside)[0])
        names = [entry.key for entry in folder.list(fixed)]
        found = [name for name in names if _matches(name, inside)]
    if not found:
        raise DatasetError(f"{Path(root) / inside}: no such tar; check the pattern")
    return found


def _matches(name: str, pattern: str) -> bool:
    parts, patterns = name.split("/"), pattern.split("/")
    return len(parts) == len(patterns) and all(
        fnmatch.fnmatchcase(part, each) for part, each in zip(parts, patterns, strict=True)
    )
