"""Large JSON files as Arrow columns, read in pieces: memory holds the columns, never the objects.

COCO and iNaturalist annotations are one object with arrays of millions of small objects, often on
one line. Loaded at once, a gigabyte of it takes many gigabytes of Python objects; here every object
is decoded, its wanted fields are taken, and it is dropped.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NoReturn

import pyarrow as pa

from featcache.errors import DatasetError

_PIECE = 1 << 22
"""Characters read at a time."""
_LONGEST = 1 << 26
"""Characters that one array element may have: what is longer is no annotation file."""
_BATCH = 8192
"""Objects decoded before their fields are taken."""
_BLANKS = re.compile(r"[ \t\n\r]*")
_SCAN: Callable[[str, int], tuple[Any, int]] = json.JSONDecoder(strict=False).scan_once  # type: ignore[attr-defined]

Columns = Mapping[str, pa.DataType]
"""Arrow type by field name: integers, floating point, or large_string."""


def read_arrays(file: Path, arrays: Mapping[str, Columns | None]) -> dict[str, Any]:
    """Fields of the objects in a JSON file's top-level arrays.

    Args:
        file: UTF-8 JSON, an object of arrays; or a bare array, whose name is then "".
        arrays: by array name, the fields to take of every element and their types; None takes the
            elements as they are, for arrays that are small.

    Returns:
        By array name an Arrow table with a row an element, or a list. Arrays that the file lacks
        are left out; whatever else the file holds is skipped.

    Raises:
        DatasetError: no such file, unreadable, malformed or cut off, or an element without a field
            or with one of another type; the message names the place.
    """
    if not file.is_file():
        raise DatasetError(f"{file}: no such file; expected JSON annotations")
    parts: dict[str, list[Any]] = {}
    counts: dict[str, int] = {}
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            for name, elements in _Reader(file, stream).arrays():
                if name not in arrays:
                    continue
                columns = arrays[name]
                known = parts.setdefault(name, [])
                if columns is None:
                    known += elements
                else:
                    known.append(_take(file, name, elements, columns, counts.get(name, 0)))
                counts[name] = counts.get(name, 0) + len(elements)
    except UnicodeDecodeError as error:
        raise DatasetError(f"{file}: not UTF-8 ({error.reason}); expected JSON") from None
    except OSError as error:
        raise DatasetError(f"{file}: cannot be read ({error.strerror})") from None
    results: dict[str, Any] = {}
    for name, known in parts.items():
        columns = arrays[name]
        results[name] = known if columns is None else pa.concat_tables(known)
    return results


def _take(file: Path, name: str, elements: list[Any], columns: Columns, start: int) -> pa.Table:
    """The wanted fields of some elements, the first of which has index `start`."""
    taken = {}
    for field, dtype in columns.items():
        try:
            taken[field] = _array([element[field] for element in elements], dtype)
        except (KeyError, TypeError, ValueError, OverflowError):
            _fail_at(file, name, elements, field, dtype, start)
    return pa.table(taken, schema=pa.schema(columns))


def _array(values: list[Any], dtype: pa.DataType) -> pa.Array:
    """Values as Arrow, without Arrow's own leniency: 1.5 is no integer, null no text."""
    found = pa.array(values)
    if len(found) == 0:
        return found.cast(dtype)
    number = pa.types.is_integer(found.type) or pa.types.is_floating(found.type)
    right = pa.types.is_string(found.type) if pa.types.is_large_string(dtype) else number
    if not right or found.null_count:
        raise TypeError(str(found.type))
    return found.cast(dtype)


def _fail_at(
    file: Path, name: str, elements: list[Any], field: str, dtype: pa.DataType, start: int
) -> NoReturn:
    array = f" of {name!r}" if name else ""
    for index, element in enumerate(elements, start):
        place = f"{file}: element {index}{array}"
        if not isinstance(element, dict):
            raise DatasetError(f"{place} is {_shown(element)}; expected an object")
        if field not in element:
            found = " ".join(", ".join(element).split()) or "nothing"
            raise DatasetError(f"{place} has no {field!r}; found {found}")
        try:
            _array([element[field]], dtype)
        except (TypeError, ValueError, OverflowError):
            found = _shown(element[field])
            raise DatasetError(f"{place} has {field} {found}; expected {_words(dtype)}") from None
    place = f"{file}: elements {start} to {start + len(elements) - 1}{array}"
    raise DatasetError(f"{place} have {field} of different types; expected {_words(dtype)}")


def _words(dtype: pa.DataType) -> str:
    if pa.types.is_large_string(dtype):
        return "text"
    return "a whole number" if pa.types.is_integer(dtype) else "a number"


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False).encode(errors="replace").decode()
    return text if len(text) <= 40 else text[:40] + "…"


class _Reader:
    """A cursor over a file of which only a window is in memory."""

    def __init__(self, file: Path, stream: IO[str]):
        self._file = file
        self._stream = stream
        self._text = ""
        self._start = 0  # of the cursor, in the window
        self._before = 0  # characters of the file before the window
        self._ended = False

    def arrays(self) -> Iterator[tuple[str, list[Any]]]:
        """(array name, some of its elements) in file order, first with no elements at all."""
        first = self._peek()
        if first == "[":
            yield from self._elements("")
        elif first == "{":
            self._start += 1
            more = self._peek() != "}"
            self._start += not more
            while more:
                name = self._value("a name")
                if not isinstance(name, str) or self._peek() != ":":
                    self._fail('expected "name": value')
                self._start += 1
                if self._peek() == "[":
                    yield from self._elements(name)
                else:
                    self._value(repr(name))
                more = self._goes_on("}", "the object")
        else:
            self._fail("expected a JSON object or array" if first else "the file is empty")
        if self._peek():
            self._fail("text after the end of the JSON")

    def _elements(self, name: str) -> Iterator[tuple[str, list[Any]]]:
        self._start += 1
        yield name, []
        if self._peek() == "]":
            self._start += 1
            return
        elements: list[Any] = []
        done = 0
        more = True
        while more:
            what = f"element {done + len(elements)} of {name!r}"
            elements.append(self._value(what))
            more = self._goes_on("]", what)
            if len(elements) == _BATCH or not more:
                yield name, elements
                done += len(elements)
                elements = []

    def _goes_on(self, close: str, what: str) -> bool:
        """Steps over a comma, or over the closing bracket (False)."""
        mark = self._peek()
        if mark not in (",", close):
            self._fail(f"the file ends behind {what}" if not mark else "expected a comma")
        self._start += 1
        return mark == ","

    def _value(self, what: str) -> Any:
        """The value at the cursor."""
        self._peek()
        while True:
            try:
                value, end = _SCAN(self._text, self._start)
            except StopIteration as error:
                position, message = int(error.value), "Expecting value"
            except json.JSONDecodeError as error:
                position, message = error.pos, error.msg
            except RecursionError:
                self._fail(f"{what} is nested too deeply")
            else:
                if end < len(self._text) or self._ended:  # a number may go on behind the window
                    self._start = end
                    return value
                position, message = end, ""
            left = len(self._text) - self._start
            cut = len(self._text) - position < 16 or message.startswith("Unterminated")
            if self._ended and cut:
                self._fail(f"the file ends inside {what}; is it a whole download?")
            if not cut or left > _LONGEST:
                self._start = position
                self._fail(f"{message} in {what}")
            self._fill()

    def _peek(self) -> str:
        """The next character that is no blank, the cursor on it; "" at the end of the file."""
        while True:
            found = _BLANKS.match(self._text, self._start)
            assert found is not None, "the pattern matches nothing too"
            self._start = found.end()
            if self._start < len(self._text):
                return self._text[self._start]
            if self._ended:
                return ""
            self._fill()

    def _fill(self) -> None:
        rest = self._text[self._start :]
        piece = self._stream.read(max(_PIECE, len(rest)))  # doubling: a long value is linear work
        self._ended = not piece
        self._before += self._start
        self._text, self._start = rest + piece, 0

    def _fail(self, message: str) -> NoReturn:
        raise DatasetError(
            f"{self._file} character {self._before + self._start}: {message}; expected JSON"
        )
