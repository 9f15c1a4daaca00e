"""ImageNet and its kin: one directory a class, named by WordNet id or by number."""

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from featcache.datasets.base import DatasetConfig
from featcache.datasets.folder import entries, images_below, split_folders
from featcache.datasets.label_lists import one_or_none
from featcache.datasets.path_lists import read_lines
from featcache.errors import DatasetError
from featcache.formats.image_names import IMAGE_SUFFIXES
from featcache.manifest import Manifest

NAME_FILES = ("map_clsloc.txt", "LOC_synset_mapping.txt")
"""Class name files that are looked for in the root."""

KNOWN_NAMES = {
    "n02012849": "crane bird",
    "n03126707": "construction crane",
    "n03710637": "maillot",
    "n03710721": "tank suit",
}
"""Names of ImageNet classes that its own lists call alike, by WordNet id."""

_WORDNET_ID = re.compile(r"n\d{8}")


class WordnetFolderConfig(DatasetConfig):
    """Images in `root/{train,val}/n01440764/…` or `root/n01440764/…`, or numbers as directories."""

    kind: Literal["wordnet_folder"] = "wordnet_folder"
    """Dataset kind."""
    root: Path
    """Folder with one directory a class, or with train, val and test."""
    names: Path | None = None
    """Class names: lines `n02119789 1 kit_fox`, or `n02119789 kit fox, Vulpes macrotis`; unset =
    map_clsloc.txt or LOC_synset_mapping.txt in `root`, otherwise the WordNet ids themselves."""
    numbers: Literal["rank", "file"] = "rank"
    """What a directory that is a number counts: the rank of the WordNet id among those of the name
    file, from 0 (as in ImageNetV2), or the number that the name file gives."""
    all_classes: bool = False
    """Keep all classes of the name file, also those without images here: the class list of a head
    that was trained on all of ImageNet."""
    split_name: Literal["train", "val", "test"] = "test"
    """Split of a root without train, val and test."""
    val_labels: Path | None = None
    """Classes of a val directory without class directories: LOC_val_solution.csv, or one number of
    the name file a line, for the files in name order."""

    def manifest(self) -> Manifest:
        """Rows in split, class and path order; class index = rank of the WordNet id.

        Class names are those of the file with blanks for underscores; classes that it calls alike
        get their known names or their WordNet id in brackets. Column `wordnet_id`; `synonyms` where
        the file has them. Ids are paths relative to `root`.

        Raises:
            DatasetError: one line naming the folder or file and what is wrong with it.
        """
        if not self.root.is_dir():
            raise DatasetError(f"{self.root}: no such folder; expected one directory per class")
        names = self._names()
        rows: list[tuple[str, str, str]] = []
        for split, folder in (
            split_folders(self.root, IMAGE_SUFFIXES) or {self.split_name: ""}
        ).items():
            folders, loose = entries(self.root / folder)
            loose = [name for name in loose if name.lower().endswith(IMAGE_SUFFIXES)]
            prefix = f"{folder}/" if folder else ""
            if loose:
                found = self._flat(split, self.root / folder, loose, folders, names)
                rows += [(split, wordnet_id, prefix + name) for name, wordnet_id in found.items()]
                continue
            for wordnet_id, name in sorted((names.of(self.root / prefix, n), n) for n in folders):
                below = sorted(images_below(self.root, prefix + name, IMAGE_SUFFIXES))
                rows += [(split, wordnet_id, path) for path in below]
        if not rows:
            raise DatasetError(f"{self.root}: found no images; expected a directory per class")
        present = {wordnet_id for _, wordnet_id, _ in rows if wordnet_id}
        order = sorted(set(names.texts) if self.all_classes else present)
        index = {wordnet_id: number for number, wordnet_id in enumerate(order)}
        paths = [path for _, _, path in rows]
        labels = np.asarray([index.get(wordnet_id, -1) for _, wordnet_id, _ in rows], np.int64)
        return Manifest.build(
            kind=self.kind,
            root=self.root,
            ids=paths,
            paths=paths,
            splits=[split for split, _, _ in rows],
            labels=one_or_none(labels),
            classes=names.table(order),
            task="single_label",
        )

    def _names(self) -> "_Names":
        candidates = [self.root / name for name in NAME_FILES]
        file = self.names or next((path for path in candidates if path.is_file()), None)
        if file is not None:
            return _read_names(file, self.numbers)
        if self.all_classes:
            raise DatasetError(f"{self.root}: all_classes needs a name file; set dataset.names")
        return _Names(self.root, {}, {})

    def _flat(
        self, split: str, folder: Path, files: list[str], folders: list[str], names: "_Names"
    ) -> dict[str, str]:
        """WordNet id, or "" for unlabelled, of the files of a split without class directories."""
        if not folders and split == "val" and self.val_labels is not None:
            return _read_val_labels(self.val_labels, files, names)
        if not folders and split == "test" and folder != self.root:
            return dict.fromkeys(files, "")
        raise DatasetError(
            f"{folder}: images ({files[0]}, …) outside class directories; expected one directory "
            "per class (dataset.val_labels names the classes of a flat val)"
        )


@dataclass(frozen=True)
class _Names:
    """What a name file says: names (the first one counts) and WordNet ids by number."""

    file: Path
    texts: dict[str, list[str]]
    by_number: dict[int, str]

    def of(self, folder: Path, name: str) -> str:
        """The WordNet id that a class directory's name means."""
        if _WORDNET_ID.fullmatch(name):
            if self.texts and name not in self.texts:
                raise DatasetError(f"{folder / name}: {self.file} does not list it; add a line")
            return name
        if not (name.isascii() and name.isdigit()):
            raise DatasetError(
                f"{folder / name}: expected a WordNet id (n01440764) or a number as the "
                "directory's name; --dataset folder takes any names"
            )
        if not self.texts:
            raise DatasetError(
                f"{folder / name}: a number says no class without a name file; set dataset.names"
            )
        return self.numbered(int(name), folder / name)

    def numbered(self, number: int, place: object) -> str:
        """The WordNet id of a number; `place` is where it was found."""
        if number not in self.by_number:
            raise DatasetError(
                f"{place}: number {number} is none of the {len(self.by_number)} of {self.file} "
                f"({min(self.by_number)} to {max(self.by_number)}); check dataset.numbers"
            )
        return self.by_number[number]

    def table(self, order: list[str]) -> pd.DataFrame:
        """Class table; names are unique over the whole file, whichever classes are in `order`."""
        firsts = Counter(texts[0] for texts in self.texts.values())
        names = []
        for wordnet_id in order:
            name = self.texts.get(wordnet_id, [wordnet_id])[0]
            if firsts[name] > 1:
                name = KNOWN_NAMES.get(wordnet_id, f"{name} ({wordnet_id})")
            names.append(name)
        frame = pd.DataFrame({"name": names, "wordnet_id": order}, dtype=object)
        if any(len(texts) > 1 for texts in self.texts.values()):
            frame["synonyms"] = [", ".join(self.texts[one]) for one in order]
        return frame


def _read_names(file: Path, numbers: str) -> _Names:
    texts: dict[str, list[str]] = {}
    given: dict[int, str] = {}
    for each in read_lines(file, "lines n02119789 1 kit_fox"):
        place, line = each.place, each.text
        wordnet_id, _, rest = line.partition(" ")
        number, _, name = rest.strip().partition(" ")
        if not _WORDNET_ID.fullmatch(wordnet_id) or not rest.strip():
            raise DatasetError(f"{place}: found {line[:60]!r}; expected n02119789 1 kit_fox")
        if wordnet_id in texts:
            raise DatasetError(f"{place}: {wordnet_id} is listed twice; keep one line")
        if number.isascii() and number.isdigit() and name.strip():
            if int(number) in given:
                raise DatasetError(f"{place}: number {number} is given twice; keep one line")
            given[int(number)] = wordnet_id
            texts[wordnet_id] = [name.strip().replace("_", " ")]
        else:
            texts[wordnet_id] = [part.strip().replace("_", " ") for part in rest.split(",")]
    if not texts:
        raise DatasetError(f"{file}: empty; expected lines n02119789 1 kit_fox")
    if numbers == "rank":
        return _Names(file, texts, dict(enumerate(sorted(texts))))
    if len(given) < len(texts):
        raise DatasetError(f"{file}: gives no numbers; leave dataset.numbers at rank")
    return _Names(file, texts, given)


def _read_val_labels(file: Path, files: list[str], names: _Names) -> dict[str, str]:
    """WordNet id of each file of a flat val folder."""
    what = "the classes of val, as dataset.val_labels says"
    lines = [(line.place, line.text) for line in read_lines(file, what)]
    if not lines or lines[0][1].split(",")[0] != "ImageId":
        if len(lines) != len(files):
            raise DatasetError(f"{file}: {len(lines)} labels for {len(files)} images of val")
        found = {}
        for (place, line), name in zip(lines, sorted(files), strict=True):
            if not (line.isascii() and line.isdigit()):
                raise DatasetError(f"{place}: found {line[:60]!r}; expected a class number")
            found[name] = names.numbered(int(line), place)
        return found
    by_stem: dict[str, str] = {}
    for place, line in lines[1:]:
        stem, _, rest = line.partition(",")
        wordnet_id = rest.split(" ")[0]
        if (
            not _WORDNET_ID.fullmatch(wordnet_id)
            or by_stem.setdefault(stem, wordnet_id) != wordnet_id
        ):
            raise DatasetError(
                f"{place}: found {line[:60]!r}; expected ID,n02119789 … once an image"
            )
        names.of(file, wordnet_id)
    unknown = [name for name in files if Path(name).stem not in by_stem]
    if unknown:
        raise DatasetError(f"{file}: no class for {unknown[0]} and {len(unknown) - 1} more of val")
    return {name: by_stem[Path(name).stem] for name in files}
