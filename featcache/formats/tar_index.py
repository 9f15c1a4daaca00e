"""The samples of a tar as a table, made from its headers and texts once and kept on disk.

A sample is what WebDataset takes for one: the files that follow each other in a tar and have the
same name up to the first dot behind the last slash. The tables lie in a folder of their own, one
small Arrow file a tar, so a tar that was not written anew is not walked again, an interrupted walk
goes on where it was, and rows are read from them block by block.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from featcache.errors import CacheError, DatasetError
from featcache.formats.tar_walk import Member, TarFile
from featcache.identity import fingerprint
from featcache.image_bytes import tar_member_path
from featcache.layout.chunks import make_folder, write_file
from featcache.storage import Location

_SCHEMA = pa.schema(
    [
        ("id", pa.large_string()),
        ("path", pa.large_string()),
        ("labels", pa.large_list(pa.large_string())),
        ("captions", pa.large_list(pa.large_string())),
    ]
)
_SUMMARY = b"featcache"
_VERSION = 2
_NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)
_UNLABELLED = "-1"
"""The label of a sample without one, as published test splits have it."""
_MAX_DIGITS = 18
"""Digits of a label that is a number."""
_META = re.compile(r"__[^/]*__($|/)")


@dataclass(frozen=True)
class SampleRule:
    """Which of a sample's files are what; see `WebDatasetConfig`.

    Attributes:
        extensions: of the image; the first one that a sample has.
        label, caption: extension, `json:FIELD`, or `none`.
        skip_imageless: whether samples without an image are left out.
    """

    extensions: tuple[str, ...]
    label: str
    caption: str
    skip_imageless: bool

    @property
    def texts(self) -> set[str]:
        """Extensions of the members that are read."""
        return {_extension(source) for source in (self.label, self.caption)} - {"none"}


@dataclass(frozen=True)
class TarSummary:
    """What is known of a tar's samples without their table.

    Attributes:
        key: the tar's path below the dataset's root.
        file: its table.
        num_rows, num_captions, num_bytes: of its samples; bytes of all strings.
        labels: samples by label, as written.
        lists: whether a sample names its labels in a list.
    """

    key: str
    file: Path
    num_rows: int
    num_captions: int
    num_bytes: int
    labels: Mapping[str, int]
    lists: bool

    def table(self) -> pa.Table:
        """Its samples: id, path, labels (as written), captions.

        Raises:
            DatasetError: if the table is damaged or was deleted meanwhile.
        """
        try:
            with pa.OSFile(str(self.file)) as source:
                return pa.ipc.open_file(source).read_all()
        except (OSError, pa.ArrowInvalid):
            raise DatasetError(
                f"{self.file}: the index of {self.key} is damaged or was deleted; delete it and "
                "run the same command again, it walks the tar anew"
            ) from None


def index_tar(folder: Location, key: str, rule: SampleRule, index: Path) -> TarSummary:
    """The samples of a tar, from the index if the tar is as it was then.

    Args:
        folder: the dataset's root.
        key: the tar's path below it.
        rule: see there.
        index: folder of the tables.

    Raises:
        DatasetError: naming the tar, and the sample or member that is wrong.
        StorageError: if the store refuses or cannot be reached.
        CacheError: if the index cannot be written.
    """
    tar = TarFile(folder, key)
    asked = {
        "format": _VERSION,
        "root": str(folder.url.resolve()),
        "tar": key,
        "extensions": list(rule.extensions),
        "label": rule.label,
        "caption": rule.caption,
        "skip_imageless": rule.skip_imageless,
    }
    name = fingerprint(asked)
    file = index / name[:2] / f"{name}.arrow"
    version = [tar.size, tar.version]
    known = _summary(file)
    if known is None or known["version"] != version:
        table, lists = _samples_table(tar, key, rule)
        labels = Counter(pc.list_flatten(table.column("labels")).to_pylist())
        known = {
            "version": version,
            "num_rows": table.num_rows,
            "num_captions": len(pc.list_flatten(table.column("captions"))),
            "num_bytes": table.nbytes,
            "labels": dict(labels),
            "lists": lists,
        }
        _write(file, table, known)
    return TarSummary(
        key,
        file,
        known["num_rows"],
        known["num_captions"],
        known["num_bytes"],
        known["labels"],
        known["lists"],
    )


def _summary(file: Path) -> dict[str, Any] | None:
    try:
        with pa.OSFile(str(file)) as source:
            schema = pa.ipc.open_file(source).schema
        found: dict[str, Any] = json.loads(schema.metadata[_SUMMARY])
    except FileNotFoundError:
        return None
    except (OSError, pa.ArrowInvalid, KeyError, TypeError, ValueError):
        return None  # of another version, or cut off by a full disk: made anew
    return found


def _write(file: Path, table: pa.Table, summary: dict[str, Any]) -> None:
    sink = pa.BufferOutputStream()
    schema = table.schema.with_metadata({_SUMMARY: json.dumps(summary).encode()})
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    with pa.ipc.new_file(sink, schema, options=options) as writer:
        writer.write_table(table.cast(schema))
    try:
        make_folder(file.parent)
    except CacheError as error:
        raise DatasetError(
            f"the index of the tars cannot be written ({error}); set dataset.index to another one"
        ) from error
    write_file(file, sink.getvalue().to_pybytes())


def _samples_table(tar: TarFile, key: str, rule: SampleRule) -> tuple[pa.Table, bool]:
    columns: dict[str, list[Any]] = {name: [] for name in _SCHEMA.names}
    lists = False
    for name, files in _samples(tar):
        image = next((files[ext] for ext in rule.extensions if ext in files), None)
        if image is None:
            if rule.skip_imageless:
                continue
            found, wanted = ", ".join(files), ", ".join(rule.extensions)
            tar.fail(
                f"sample {name} has no image: it has {found}, expected one of {wanted}; set "
                "dataset.extensions, or dataset.skip_imageless to leave such samples out"
            )
        texts = {ext: tar.text(files[ext]) for ext in rule.texts if ext in files}
        labels = _values(tar, name, rule.label, texts)
        lists = lists or isinstance(labels, list)
        captions = _values(tar, name, rule.caption, texts)
        columns["id"].append(f"{key}/{name}")
        columns["path"].append(tar_member_path(key, image.offset, image.size, image.name))
        columns["labels"].append(_labels(tar, name, labels))
        columns["captions"].append(_captions(captions))
    try:
        arrays = [pa.array(columns[field.name], field.type) for field in _SCHEMA]
    except UnicodeEncodeError as error:  # JSON can spell half a character
        shown = error.object.encode(errors="replace").decode()
        tar.fail(f"holds text that is not Unicode, {shown[:80]!r}; write it anew")
    return pa.table(arrays, schema=_SCHEMA), lists


def _samples(tar: TarFile) -> Iterator[tuple[str, dict[str, Member]]]:
    """Each sample's name and its files by extension, in small letters."""
    seen: set[str] = set()
    name, files = "", dict[str, Member]()
    for member in tar.members():
        match = _NAME.fullmatch(member.name)
        if match is None or _META.match(member.name):
            continue
        stem, extension = match[1], match[2].lower()
        if stem != name or not files:
            if files:
                yield name, files
            if stem in seen:
                tar.fail(
                    f"sample {stem} occurs twice ({member.name} comes behind other samples); "
                    "files of a sample have to follow each other"
                )
            seen.add(stem)
            name, files = stem, {}
        if extension in files:
            tar.fail(f"sample {stem} has two files {extension}; expected each name once")
        files[extension] = member
    if files:
        yield name, files


def _extension(source: str) -> str:
    return "json" if source.startswith("json:") else source


def _values(tar: TarFile, sample: str, source: str, texts: Mapping[str, str]) -> Any:
    """What a sample says about its label or caption; None if nothing."""
    text = texts.get(_extension(source))
    if text is None:
        return None
    if not source.startswith("json:"):
        return text
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        tar.fail(f"sample {sample}: its json cannot be read ({error}); write it anew")
    for part in source.removeprefix("json:").split("."):
        if value is None:
            return None
        if not isinstance(value, Mapping):
            tar.fail(f"sample {sample}: its json has no field {source.removeprefix('json:')}")
        value = value.get(part)
    return value


def _labels(tar: TarFile, sample: str, value: Any) -> list[str]:
    """A sample's labels as written; none for -1."""
    values = value if isinstance(value, list) else [value]
    found = []
    for each in values:
        if isinstance(each, bool) or not isinstance(each, str | int | None):
            tar.fail(
                f"sample {sample}: label {each!r} is no number and no name; expected an integer "
                "or a text"
            )
        text = "" if each is None else " ".join(str(each).split())
        if text:
            number = text.isascii() and text.isdecimal()
            found.append((text.lstrip("0") or "0") if number else text)
            if number and len(found[-1]) > _MAX_DIGITS:
                tar.fail(f"sample {sample}: label {text[:20]}… has {len(text)} digits; is it one?")
    if len(set(found)) < len(found):
        tar.fail(f"sample {sample}: a label occurs twice in {found}; expected each once")
    if found == [_UNLABELLED]:
        return []
    if _UNLABELLED in found:
        tar.fail(
            f"sample {sample}: found -1 beside other labels in {found}; -1 means unlabelled, so "
            "expected it alone"
        )
    return found


def _captions(value: Any) -> list[str]:
    """Captions with one kind of line end and without blanks around them; empty ones are none."""
    values = value if isinstance(value, list) else [value]
    texts = ["" if each is None else str(each) for each in values]
    stripped = ["\n".join(text.splitlines()).strip() for text in texts]
    return [text for text in stripped if text]
