"""Grids of training options: from the command line or a YAML file to one mapping a combination."""

import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from featcache.config import merge
from featcache.errors import ConfigError

Grid = Mapping[str, Sequence[Any]]
"""Option by dotted path -> its values."""

_ASSIGNMENT = re.compile(r"[A-Za-z_][\w.]*=")


def rejoined(entries: Iterable[Any], start: re.Pattern[str] = _ASSIGNMENT) -> tuple[str, ...]:
    """Entries `option=value,value` as they were typed.

    The command line cuts lists at commas, and reads a piece in brackets as JSON.

    Args:
        entries: pieces in their order.
        start: what an entry begins with; other pieces belong to the entry before.
    """
    result: list[str] = []
    for entry in entries:
        text = entry if isinstance(entry, str) else json.dumps(entry)
        if start.match(text) or not result:
            result.append(text)
        else:
            result[-1] += f",{text}"
    return tuple(result)


def grid_of(entries: Sequence[str]) -> Grid:
    """The grid that entries `option=value,value` mean; each value is read as YAML.

    Raises:
        ConfigError: if one is not of that form, or an option is there twice.
    """
    grid: dict[str, Sequence[Any]] = {}
    for entry in entries:
        path, equals, text = entry.partition("=")
        if not equals or not text:
            raise ConfigError(f"set: {entry!r} is not of the form option=value,value,…")
        if path in grid:
            raise ConfigError(f"set: {path} is there twice; give all its values at once")
        try:
            grid[path] = yaml.safe_load(f"[{text}]")
        except yaml.YAMLError:
            raise ConfigError(f"set: {entry!r}: the values are not YAML") from None
    return grid


def one_value(entry: str) -> tuple[str, Any]:
    """Option and value of an entry `option=value`; the value is read as YAML.

    Raises:
        ConfigError: if it is no YAML.
    """
    path, _, text = entry.partition("=")
    try:
        return path, yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"set: {entry!r}: the value is not YAML") from None


def read_grids(path: Path) -> list[Grid]:
    """Grids of a YAML file: one mapping of options to values, or a list of such mappings.

    A value that is no list is the only one of its option.

    Raises:
        ConfigError: if the file is missing or holds something else.
    """
    found = _read_yaml(path)
    grids = found if isinstance(found, list) else [found]
    for number, grid in enumerate(grids, 1):
        if not isinstance(grid, dict) or not all(isinstance(name, str) for name in grid):
            raise ConfigError(
                f"{path}: entry {number} is no mapping of options to lists of values, as in "
                "optim.lr: [0.001, 0.01]"
            )
    return [
        {name: value if isinstance(value, list) else [value] for name, value in grid.items()}
        for grid in grids
    ]


def read_options(path: Path) -> dict[str, Any]:
    """Nested options of a YAML file, as `--config` of a job reads it.

    Raises:
        ConfigError: if the file is missing or holds something else.
    """
    found = _read_yaml(path)
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: expected `option: value` lines, found {type(found).__name__}")
    return found


def combinations(grids: Sequence[Grid], common: Grid) -> list[dict[str, Any]]:
    """Each grid's combinations one after the other, times those of `common`; none twice.

    Raises:
        ConfigError: if an option has no value, or is both in a grid and in `common`.
    """
    result: list[dict[str, Any]] = []
    for grid in grids:
        if twice := grid.keys() & common.keys():
            raise ConfigError(f"{min(twice)}: in the grid file and in --set; leave one out")
        both = {**grid, **common}
        for name, values in both.items():
            if not values:
                raise ConfigError(f"{name}: no value in the grid")
        for values in itertools.product(*both.values()):
            one = dict(zip(both, values, strict=True))
            if one not in result:
                result.append(one)
    return result


def nested(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options by dotted path as the mapping that a YAML file would hold.

    A choice of a kind by its bare name (`head: mop`) may stand beside options of it.
    """
    result: dict[str, Any] = {}
    for path, value in options.items():
        *parents, last = path.split(".")
        for parent in reversed([*parents, last]):
            value = {parent: value}
        result = merge(_kinds_written_out(result, value), value)
    return result


def _read_yaml(path: Path) -> Any:
    if not path.is_file():
        raise ConfigError(f"{path}: no such file")
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        raise ConfigError(f"{path}: not YAML") from None


def _kinds_written_out(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`below` with `name: kind` as `name: {kind: …}` where `above` adds options of it."""
    return {
        name: {"kind": value}
        if isinstance(value, str) and isinstance(above.get(name), Mapping)
        else value
        for name, value in below.items()
    }
