"""Text lists with a path on each line: `path ids`, `path caption`, and `NAME id` for classes.

UTF-8, LF or CRLF, blanks at the end of a line and a missing last newline are all the same. A path
may hold blanks: it ends at the image extension that is followed by a blank or the line's end.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from featcache.errors import DatasetError

_EXTENSION = re.compile(
    r"\.(?:jpe?g|jfif|png|webp|bmp|gif|tiff?|avif|heic|ppm)(?=\s|$)", re.IGNORECASE
)
_INTEGER = re.compile(r"-?[0-9]+")


@dataclass(frozen=True)
class Line:
    """A line that is not empty.

    Attributes:
        place: file and number, counted from 1, for messages.
        number: the same number.
        text: without the blanks around it.
    """

    place: str
    number: int
    text: str


@dataclass(frozen=True)
class PathList:
    """Images with their classes, in file order.

    Attributes:
        file: where it was read from.
        numbers: line number of each image.
        paths: paths as written.
        labels: class indices, ascending; a line may have none.
    """

    file: Path
    numbers: list[int]
    paths: list[str]
    labels: list[list[int]]


def read_text(file: Path, what: str) -> str:
    """A text file's content.

    Args:
        file: the file.
        what: what it should hold, for the message.

    Raises:
        DatasetError: no such file, or not UTF-8.
    """
    try:
        return file.read_bytes().decode("utf-8-sig")
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise DatasetError(f"{file}: no such file; expected {what}") from None
    except UnicodeDecodeError as error:
        raise DatasetError(f"{file}: not UTF-8 ({error.reason}); save it as UTF-8") from None


def read_lines(file: Path, what: str) -> list[Line]:
    """Lines of a text file that are not empty; see `read_text`."""
    # Not splitlines(): it would also cut captions at form feeds and Unicode's own separators.
    lines = re.split(r"\r\n|\n|\r", read_text(file, what))
    return [
        Line(f"{file} line {number}", number, line.strip())
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]


def read_names(file: Path) -> dict[int, str]:
    """Class names by id; each line is a name, which may hold blanks, and the id as last field.

    Raises:
        DatasetError: no id at a line's end, or an id or a name that occurs twice.
    """
    names: dict[int, str] = {}
    for line in read_lines(file, "lines like `traffic light 9`"):
        *words, last = line.text.split()
        name = " ".join(words)
        if not name or not _INTEGER.fullmatch(last):
            raise DatasetError(
                f"{line.place}: found {line.text!r}; expected a class name, a blank and its id"
            )
        if int(last) in names or name in names.values():
            raise DatasetError(
                f"{line.place}: {line.text!r} repeats an id or a name; expected each once"
            )
        names[int(last)] = name
    return names


def check_names(file: Path, expected: Sequence[str]) -> None:
    """Checks that a list of names agrees with the known class order.

    Raises:
        DatasetError: naming the first id whose name is another one.
    """
    found = read_names(file)
    for number, name in enumerate(expected):
        if found.get(number) != name:
            have = repr(found[number]) if number in found else "no name"
            raise DatasetError(
                f"{file}: class {number} has {have}; expected {name!r}, as the labels are numbered "
                "by that order"
            )
    if len(found) > len(expected):
        extra = next(number for number in found if not 0 <= number < len(expected))
        raise DatasetError(
            f"{file}: {len(found)} names, e.g. {found[extra]!r} {extra}; expected {len(expected)}"
        )


def read_path_list(file: Path, num_classes: int) -> PathList:
    """Images with their class indices; each line is a path and 0-based ids in any order.

    Raises:
        DatasetError: naming the line: something else than ids after the path, an id outside
            0..num_classes - 1 or twice on a line, or a path that was there before.
    """
    numbers, paths, labels = [], [], []
    first: dict[str, int] = {}
    for line in read_lines(file, "lines of an image's path and its class ids"):
        path, rest = _cut(line.text, None)
        where = line.place
        row = []
        for field in rest.split():
            if not _INTEGER.fullmatch(field):
                raise DatasetError(
                    f"{where}: found {field!r} after the path; expected class ids only"
                )
            if not 0 <= int(field) < num_classes:
                raise DatasetError(
                    f"{where}: class id {field} lies outside 0..{num_classes - 1}; check that the "
                    "list is of this dataset"
                )
            row.append(int(field))
        if len(set(row)) < len(row):
            raise DatasetError(f"{where}: a class id occurs twice; expected each once")
        if path in first:
            raise DatasetError(f"{where}: {path} was already on line {first[path]}; keep one")
        first[path] = line.number
        numbers.append(line.number)
        paths.append(path)
        labels.append(sorted(row))
    if not paths:
        raise DatasetError(f"{file}: empty; expected lines of an image's path and its class ids")
    return PathList(file, numbers, paths, labels)


def read_captions(file: Path, known: Collection[str] | None = None) -> dict[str, list[str]]:
    """Captions by path; each line is a path and free text. Several lines of a path add up.

    Args:
        file: the list.
        known: paths that can occur; only needed to tell a path like `a.jpg b.jpg` from a path with
            a caption, and to leave out captions of other images. None = keep all.

    Raises:
        DatasetError: no such file, not UTF-8, or no line is about a known path.
    """
    captions: dict[str, list[str]] = {}
    lines = read_lines(file, "lines of an image's path and its caption")
    for line in lines:
        path, text = _cut(line.text, known)
        if known is not None and path not in known:
            continue
        found = captions.setdefault(path, [])
        if text:
            found.append(text)
    if known is not None and lines and not captions:
        path = _cut(lines[0].text, None)[0]
        raise DatasetError(
            f"{file}: no caption is of a listed image, the first is of {path}; expected paths as "
            "in the image lists"
        )
    return captions


def _cut(text: str, known: Collection[str] | None) -> tuple[str, str]:
    """Path and the rest of a line."""
    ends = [match.end() for match in _EXTENSION.finditer(text)]
    if not ends:  # no extension that we know: a path without blanks
        path, *rest = text.split(None, 1)
        return path, "".join(rest)
    if known is not None:
        first = len(
            text.split(None, 1)[0]
        )  # a path may end otherwise, as rows inside containers do
        sure = [end for end in sorted({first, *ends}) if text[:end] in known]
        ends = sure[-1:] or ends
    return text[: ends[0]], text[ends[0] :].strip()
