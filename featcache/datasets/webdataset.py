"""WebDataset: tars whose files come in samples; local or on an object store, of any length."""

import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Literal, Self

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, PositiveInt, model_validator

from featcache.datasets.base import DatasetConfig
from featcache.datasets.patterns import common_root, expand, find
from featcache.datasets.table import read_classes
from featcache.errors import ConfigError, DatasetError
from featcache.formats.image_names import IMAGE_EXTENSIONS
from featcache.formats.tar_index import SampleRule, TarSummary, index_tar
from featcache.manifest import SPLITS, Manifest, Task
from featcache.row_block import ROW_SCHEMA
from featcache.storage import Location, locate, place
from featcache.streamed import Part, StreamedManifest, cut

_SOURCE = r"^(none|json:[^.]+(\.[^.]+)*|[^:]+)$"


class WebDatasetConfig(DatasetConfig):
    """Samples in uncompressed tars; rows are streamed, so the set may be longer than memory."""

    kind: Literal["webdataset"] = "webdataset"
    """Dataset kind."""
    train: str = ""
    """Tars of the training split: a path or s3:// address with {0000..0099}, {a,b}, * and ?, or
    several separated by `::`. Rows come in the order given, inside a tar as they lie there."""
    val: str = ""
    """Tars of the validation split, like `train`."""
    test: str = ""
    """Tars of the test split, like `train`."""
    root: str | None = None
    """Folder or s3:// address that the patterns and the recorded paths start from. Unset = the
    deepest folder that all patterns have in common."""
    extensions: tuple[str, ...] = IMAGE_EXTENSIONS
    """What stands behind the first dot of an image's name, in small letters; of several images in a
    sample the one that comes first in this list."""
    label: str = Field(default="cls", pattern=_SOURCE)
    """Where a sample's label is: an extension (`cls`: a number or a name), `json:FIELD` (number,
    name, or a list of them for a multi-label set; FIELD may be `a.b`), or `none`. -1 and nothing
    at all mean unlabelled."""
    caption: str = Field(default="txt", pattern=_SOURCE)
    """Where a sample's caption is: an extension, `json:FIELD` (text, list of texts), or `none`."""
    classes: Path | None = None
    """Class list: one name a line, or a .csv with `name` and metadata; labels are its names, or
    numbers from 0. Unset = all labels found, sorted, numbers by value."""
    skip_imageless: bool = False
    """Leave out samples that have no image instead of stopping."""
    limit: PositiveInt | None = None
    """Keep only the first images of each split, this many; no further tar is read. Unset = all."""
    index: Path = Path("~/.cache/featcache/tars")
    """Folder that keeps what was found in each tar: one that did not change is not walked again."""
    index_threads: PositiveInt = 4
    """Tars that are walked at a time."""

    @model_validator(mode="after")
    def _streams(self) -> Self:
        if self.shots is not None:
            raise ValueError(
                f"shots={self.shots} needs all rows in memory, kind webdataset streams them; "
                "set limit, or pack the drawn images into a set of their own"
            )
        return self

    def manifest(self) -> Manifest:
        """Rows in split order, then in the order of the tars; with `limit` no further tar is read.

        Raises:
            ConfigError: if no tars are given.
            DatasetError: one line naming the tar, and the sample or member that is wrong.
            StorageError: if the store refuses or cannot be reached.
        """
        folder, tars = self._tars()
        rule = SampleRule(
            tuple(ext.lower().lstrip(".") for ext in self.extensions),
            self.label,
            self.caption,
            self.skip_imageless,
        )
        found = {split: self._walked(folder, keys, rule) for split, keys in tars.items()}
        summaries = [summary for each in found.values() for summary in each]
        if not any(summary.num_rows for summary in summaries):
            raise DatasetError(f"{folder.url}: no sample in {len(summaries)} tars; check the tars")
        self._check_fields(summaries, str(folder.url))
        classes, numbers = self._classes(summaries, str(folder.url))
        lists = any(summary.lists for summary in summaries)
        task: Task = "multi_label" if lists else "single_label"
        if not any(summary.labels for summary in summaries):
            task = "unlabelled"
        names = {summary.key: (split, summary) for split in found for summary in found[split]}

        def load(name: str) -> pa.Table:
            split, summary = names[name]
            return _rows(summary.table(), split, numbers)

        parts = []
        for split, each in found.items():
            left = self.limit
            for summary in each:
                part = _part(summary, split, numbers)
                if left is not None and part.num_rows > left:
                    part = cut(part, left, load(part.name))
                left = None if left is None else left - part.num_rows
                parts.append(part)
        return StreamedManifest(
            kind=self.kind,
            root=place(folder.url),
            classes=classes,
            task=task,
            parts=parts,
            load=load,
        )

    def _tars(self) -> tuple[Location, dict[str, list[str]]]:
        """The root, and the tars of each split as paths below it."""
        if not (self.train or self.val or self.test):
            raise ConfigError(
                "dataset.train, .val and .test are all unset; give the tars of at least one, e.g. "
                '--dataset.train "shards/train-{0000..0099}.tar"'
            )
        patterns = {split: expand(str(getattr(self, split))) for split in SPLITS}
        root = self.root or common_root([text for texts in patterns.values() for text in texts])
        folder = locate(Path(root).expanduser() if "://" not in root else root)
        tars: dict[str, list[str]] = {}
        seen: dict[str, str] = {}
        for split, texts in patterns.items():
            keys = [key for text in texts for key in find(folder, root, text)]
            for key in keys:
                if not key.endswith(".tar"):
                    raise DatasetError(
                        f"{folder.url}/{key}: expected a plain .tar; unpack a compressed one with "
                        "gunzip, write a folder's tars as FOLDER/*.tar"
                    )
                if key in seen:
                    raise DatasetError(
                        f"{folder.url}/{key}: listed twice ({seen[key]}, {split}); expected every "
                        "tar once"
                    )
                seen[key] = split
            if keys:
                tars[split] = keys
        return folder, tars

    def _walked(self, folder: Location, keys: list[str], rule: SampleRule) -> list[TarSummary]:
        """What is in the tars of a split; those that `limit` leaves out are not looked at."""
        index = self.index.expanduser()
        found: list[TarSummary] = []
        began = shown = time.monotonic()
        rows = 0
        waiting = iter(keys)
        with ThreadPoolExecutor(self.index_threads, thread_name_prefix="tars") as pool:
            # A few at a time: with a limit, the rows so far decide whether more are needed.
            size = self.index_threads * (1 if self.limit else 16)
            while group := list(islice(waiting, size)):
                for summary in pool.map(lambda key: index_tar(folder, key, rule, index), group):
                    found.append(summary)
                    rows += summary.num_rows
                    if time.monotonic() - shown > 10:
                        shown = time.monotonic()
                        rate = rows / (shown - began)
                        print(
                            f"index: {len(found)}/{len(keys)} tars, {rows} samples, {rate:.0f}/s",
                            file=sys.stderr,
                            flush=True,
                        )
                if self.limit is not None and rows >= self.limit:
                    break
        return list(_until(found, self.limit))

    def _check_fields(self, summaries: list[TarSummary], where: str) -> None:
        """Stops if a JSON field that was named is in no sample; labels and captions are optional.

        Raises:
            DatasetError: naming the field.
        """
        for name, option, found in (
            ("label", self.label, any(summary.labels for summary in summaries)),
            ("caption", self.caption, any(summary.num_captions for summary in summaries)),
        ):
            if option.startswith("json:") and not found:
                raise DatasetError(
                    f"{where}: no sample of {len(summaries)} tars has a {name} as field "
                    f"{option.removeprefix('json:')!r} in a .json; check dataset.{name}"
                )

    def _classes(
        self, summaries: list[TarSummary], where: str
    ) -> tuple[pd.DataFrame, dict[str, int]]:
        """The class table, and the class index of each label as written."""
        counts: Counter[str] = Counter()
        for summary in summaries:
            counts.update(summary.labels)
        if self.classes is None:
            numeric = all(_is_number(label) for label in counts)
            names = sorted(counts, key=(lambda label: (int(label), label)) if numeric else None)
            return pd.DataFrame({"name": names}, dtype=object), {
                name: number for number, name in enumerate(names)
            }
        frame = read_classes(self.classes)
        numbers = {name: number for number, name in enumerate(frame["name"].tolist())}
        if not any(_is_number(name) for name in numbers):
            numbers |= {str(number): number for number in range(len(frame))}
        unknown = [label for label in counts if label not in numbers]
        if unknown:
            tar = next(summary.key for summary in summaries if unknown[0] in summary.labels)
            raise DatasetError(
                f"{where}/{tar}: label {unknown[0]!r} is not in {self.classes}; expected one of "
                f"its {len(frame)} names or a number from 0"
            )
        return frame, numbers


def _part(summary: TarSummary, split: str, numbers: dict[str, int]) -> Part:
    counts: Counter[int] = Counter()
    for label, count in summary.labels.items():
        counts[numbers[label]] += count
    return Part(
        summary.key, split, summary.num_rows, summary.num_captions, summary.num_bytes, dict(counts)
    )


def _rows(table: pa.Table, split: str, numbers: dict[str, int]) -> pa.Table:
    """A tar's samples as rows: labels as class indices, the split's name added."""
    labels = table.column("labels").combine_chunks()
    known = pa.array(list(numbers), pa.large_string())
    index = pa.array(list(numbers.values()), pa.int32())
    values = index.take(pc.index_in(labels.flatten(), value_set=known))
    columns = {
        "id": table.column("id"),
        "path": table.column("path"),
        "split": pa.array([split] * table.num_rows, pa.large_string()),
        "labels": pa.LargeListArray.from_arrays(labels.offsets, values),
        "captions": table.column("captions"),
    }
    return pa.table([columns[name] for name in ROW_SCHEMA.names], schema=ROW_SCHEMA)


def _until(summaries: list[TarSummary], limit: int | None) -> Iterator[TarSummary]:
    """The first tars that hold `limit` samples together."""
    rows = 0
    for summary in summaries:
        if limit is not None and rows >= limit:
            return
        rows += summary.num_rows
        yield summary


def _is_number(label: str) -> bool:
    return label.isascii() and label.removeprefix("-").isdecimal()
