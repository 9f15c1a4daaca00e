"""Records of `ImageID,Labels,Caption` files, whose captions hold bare quotes, commas and newlines.

Such a file is no regular CSV: captions are wrapped in quotes, but quotes inside are not doubled. So
a record starts at a line that begins like one, whatever quotes came before: an image's file name, a
comma, and in a training file numbers and another comma. Everything up to the next such line is the
caption, of which one outer pair of quotes is taken off. Nothing else is changed, except where the
whole field is valid by RFC 4180: there two quotes are one.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from featcache.datasets.path_lists import read_text
from featcache.errors import DatasetError

TRAIN_HEADER = "ImageID,Labels,Caption"
TEST_HEADERS = ("ImageID,Caption", "ImageID,Labels")

_NAME = r'(?P<name>[^\s,"]+\.(?i:jpe?g|jfif|png|webp|bmp|gif|tiff?|avif|heic)),'
_START = {
    True: re.compile(_NAME + r"(?P<labels>[0-9 ]*),(?P<caption>.*)", re.DOTALL),
    False: re.compile(_NAME + r"(?P<labels>)(?P<caption>.*)", re.DOTALL),
}
_DOUBLED = re.compile(r'(?:[^"]|"")*')


@dataclass(frozen=True)
class Record:
    """One image.

    Attributes:
        line: line of the file on which it starts, counted from 1.
        name: ImageID.
        labels: label ids as written; empty in a test file.
        caption: text without the outer quotes.
    """

    line: int
    name: str
    labels: list[int]
    caption: str


def read_records(file: Path, labelled: bool) -> list[Record]:
    """All records of a file, in order.

    Args:
        file: UTF-8, LF or CRLF, with the header line.
        labelled: whether there is a column of labels (train) or not (test).

    Raises:
        DatasetError: one line naming file and line.
    """
    text = read_text(file, f"a CSV with {TRAIN_HEADER}")
    lines = re.split(r"(?<=\n)", text)
    header = lines[0].strip()
    if header not in ((TRAIN_HEADER,) if labelled else TEST_HEADERS):
        expected = TRAIN_HEADER if labelled else TEST_HEADERS[0]
        raise DatasetError(f"{file}: header is {header[:60]!r}, expected {expected!r}")
    found: list[tuple[int, re.Match[str], list[str]]] = []
    for number, line in enumerate(lines[1:], 2):
        match = _START[labelled].match(line)
        if match is not None:
            found.append((number, match, [match["caption"]]))
        elif found:
            if labelled and _START[False].match(line) and _closed("".join(found[-1][2])):
                raise DatasetError(
                    f"{file} line {number}: found {line.split(',')[1][:40]!r} after the image's "
                    "name; expected label numbers separated by blanks"
                )
            found[-1][2].append(line)
        elif line.strip():
            raise DatasetError(
                f"{file} line {number}: found {line.strip()[:40]!r}; expected an image's file "
                "name and a comma"
            )
    if not found:
        raise DatasetError(f"{file}: a header but no records")
    records = [
        Record(number, match["name"], [int(t) for t in match["labels"].split()], _caption(parts))
        for number, match, parts in found
    ]
    _check(file, records)
    return records


def _caption(parts: list[str]) -> str:
    text = "".join(parts).rstrip("\r\n")
    if len(text) >= 2 and text[0] == text[-1] == '"':
        text = text[1:-1]
        if _DOUBLED.fullmatch(text):
            text = text.replace('""', '"')
    return text


def _closed(text: str) -> bool:
    """Whether a caption cannot go on: it never had quotes, or has both."""
    text = text.rstrip("\r\n")
    return not text.startswith('"') or (len(text) >= 2 and text.endswith('"'))


def _check(file: Path, records: list[Record]) -> None:
    first: dict[str, int] = {}
    for record in records:
        if record.name in first:
            raise DatasetError(
                f"{file} line {record.line}: {record.name} was already on line "
                f"{first[record.name]}; keep one"
            )
        if len(set(record.labels)) < len(record.labels):
            raise DatasetError(
                f"{file} line {record.line}: a label occurs twice; expected each once"
            )
        first[record.name] = record.line
