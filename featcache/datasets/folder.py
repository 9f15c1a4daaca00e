"""Image folder: one directory a class, optionally under train, val and test."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from featcache.datasets.label_lists import one_or_none
from featcache.datasets.path_lists import read_captions
from featcache.datasets.splitting import ALIASES, SplitConfig
from featcache.errors import DatasetError
from featcache.formats.image_names import IMAGE_EXTENSIONS
from featcache.manifest import Manifest


class FolderConfig(SplitConfig):
    """Images in `root/class/…` or `root/split/class/…`; class index = rank of the name."""

    kind: Literal["folder"] = "folder"
    """Dataset kind."""
    root: Path
    """Folder with one directory a class, or with train, val (valid, validation) and test."""
    extensions: tuple[str, ...] = IMAGE_EXTENSIONS
    """File name extensions that count as images, in any case; other files are skipped."""
    captions: Path | None = None
    """List of captions, `path caption` on each line, as featcache.caption writes it; unset = none.
    Joined by path; images without a caption stay."""

    def manifest(self) -> Manifest:
        """Rows in split, class and path order; ids are paths relative to `root`.

        Hidden files and directories are skipped, links followed, and a directory without images is
        no class. A link that leads nowhere stays a row: extraction reports it as unreadable.

        Raises:
            DatasetError: no such folder, no images, images beside class directories, a class in val
                or test that train lacks, or captions of none of the images.
        """
        if not self.root.is_dir():
            what = "is a file" if self.root.exists() else "no such folder"
            raise DatasetError(
                f"{self.root}: {what}; expected a folder with one directory per class"
            )
        suffixes = tuple("." + extension.lower().lstrip(".") for extension in self.extensions)
        parts = split_folders(self.root, suffixes)
        trees = {
            split: _classes(self.root, folder, suffixes)
            for split, folder in (parts or {"": ""}).items()
        }
        names = sorted({name for tree in trees.values() for name, files in tree.items() if files})
        _check_known(self.root, trees, names)
        index = {name: number for number, name in enumerate(names)}
        paths: list[str] = []
        labels: list[int] = []
        splits: list[str] = []
        for split, tree in trees.items():
            for name in sorted(tree):
                files = sorted(tree[name])
                paths += files
                labels += [index[name] if name else -1 for _ in files]
                splits += [split] * len(files)
        _check_text(self.root, paths)
        classes = np.asarray(labels, np.int64)
        if not parts:
            splits = self.split(paths, classes)
        unlabelled = names == [""]
        found = {} if self.captions is None else read_captions(self.captions, set(paths))
        return Manifest.build(
            kind=self.kind,
            root=self.root,
            ids=paths,
            paths=paths,
            splits=splits,
            labels=one_or_none(classes),
            classes=pd.DataFrame({"name": [] if unlabelled else names}, dtype=object),
            task="unlabelled" if unlabelled else "single_label",
            captions=[found.get(path, []) for path in paths] if found else None,
        )


def split_folders(root: Path, suffixes: tuple[str, ...]) -> dict[str, str]:
    """Directory of each split, empty if the top directories are classes."""
    folders = entries(root)[0]
    found = {folder: ALIASES.get(folder.lower()) for folder in folders}
    others = [folder for folder, split in found.items() if split is None]
    if not found or len(others) == len(found):
        return {}
    if others:
        if (
            "train" not in found.values()
            or not entries(
                root / next(folder for folder, split in found.items() if split == "train")
            )[0]
        ):
            return {}
        for folder in others:
            if next(images_below(root, folder, suffixes), None) is not None:
                raise DatasetError(
                    f"{root}: {folder}/ with images stands beside the split directories; "
                    "expected train, val and test only, so move it away"
                )
    parts: dict[str, str] = {}
    for folder, split in found.items():
        if split is None:
            continue
        if split in parts:
            raise DatasetError(
                f"{root}: {parts[split]}/ and {folder}/ both mean {split}; keep one of them"
            )
        parts[split] = folder
    return parts


def _classes(root: Path, folder: str, suffixes: tuple[str, ...]) -> dict[str, list[str]]:
    """Image paths, relative to `root`, by class; the class "" holds a flat folder's images."""
    folders, files = entries(root / folder)
    loose = [name for name in files if name.lower().endswith(suffixes)]
    prefix = folder + "/" if folder else ""
    tree = {name: list(images_below(root, prefix + name, suffixes)) for name in folders}
    if not loose:
        return tree
    if any(tree.values()):
        raise DatasetError(
            f"{root / folder}: {len(loose)} images ({loose[0]}, ...) lie beside the class "
            "directories; expected them inside one, so move them"
        )
    return {"": [prefix + name for name in loose]}


def entries(folder: Path) -> tuple[list[str], list[str]]:
    """Visible directories and files of a folder, both sorted by name."""
    folders: list[str] = []
    files: list[str] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith((".", "__MACOSX")):
                continue
            (folders if entry.is_dir() else files).append(entry.name)
    return sorted(folders), sorted(files)


def images_below(root: Path, folder: str, suffixes: tuple[str, ...]) -> Iterator[str]:
    """Paths, relative to `root`, of the images below a folder, in no particular order."""
    status = (root / folder).stat()
    pending = [(folder, frozenset({(status.st_dev, status.st_ino)}))]
    while pending:
        current, above = pending.pop()
        with os.scandir(root / current) as entries:
            for entry in entries:
                name = entry.name
                if name.startswith("."):
                    continue
                if entry.is_dir():
                    status = entry.stat()
                    key = (status.st_dev, status.st_ino)
                    if key not in above:  # else a link back to a folder that we are in
                        pending.append((f"{current}/{name}", above | {key}))
                elif name.lower().endswith(suffixes):
                    yield f"{current}/{name}"


def _check_known(root: Path, trees: dict[str, dict[str, list[str]]], names: list[str]) -> None:
    if not names:
        raise DatasetError(
            f"{root}: found no images; expected them in one directory per class "
            "(dataset.extensions says which files count)"
        )
    if "" in names and len(names) > 1:
        raise DatasetError(
            f"{root}: one split has class directories, another has images without; "
            "expected the same layout in all"
        )
    if "train" not in trees:
        return
    for split, tree in trees.items():
        unknown = [name for name, files in tree.items() if files and name not in trees["train"]]
        if unknown:
            more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
            raise DatasetError(
                f"{root}: class {unknown[0]!r}{more} of {split} is not in train; "
                "expected every class under train"
            )


def _check_text(root: Path, paths: list[str]) -> None:
    try:
        "\n".join(paths).encode()
    except UnicodeEncodeError:
        for path in paths:
            shown = path.encode(errors="replace").decode()
            if shown != path:
                raise DatasetError(
                    f"{root}: the file name {shown!r} is not UTF-8; rename the file"
                ) from None
