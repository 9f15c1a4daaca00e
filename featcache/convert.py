"""Job: iNaturalist's images in the folders that torchvision's `INaturalist` reads.

python -m featcache.convert --data_root inat --version 2021 --out inat-torchvision

2021 becomes `out/2021_train/00002_Animalia_…/ab.jpg` and `out/2021_valid/…`; 2018 becomes
`out/2018/Insects/2/ab.jpg`, train and val in one tree, as torchvision has them. What is there
already is left alone, so the same command goes on after an interruption.
"""

import os
import shutil
import uuid
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import PositiveInt
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from featcache.config import Config, run_job
from featcache.datasets.inaturalist import InaturalistConfig, Version
from featcache.datasets.inaturalist_json import Split
from featcache.errors import DatasetError, UnreadableImagesError

Mode = Literal["link", "hard_link", "copy"]

_TAXA = ("kingdom", "phylum", "class", "order", "family", "genus", "specific_epithet")
_BLOCK = 4096
"""Images handed to the threads at a time."""


class ConvertConfig(Config):
    """Lays iNaturalist's images out as torchvision's INaturalist reads them."""

    data_root: Path
    """Folder with train2021.json (…2018.json), val2021.json and the images."""
    version: Version = "2021"
    """2018 or 2021."""
    out: Path | None = None
    """Folder to write to; unset = `torchvision` in `data_root`."""
    splits: tuple[Literal["train", "val"], ...] = ("train", "val")
    """Splits to convert; one whose JSON is not there is left out."""
    mode: Mode = "link"
    """link = symbolic links, which take no room; hard_link = second names on the same disk; copy =
    copies."""
    num_threads: PositiveInt = 8
    """Files created at a time."""


def run(config: ConvertConfig) -> Path:
    """Makes the tree, prints and returns the folder.

    Raises:
        DatasetError: the source is not what it should be, or two images get the same place.
        UnreadableImagesError: images are missing; the others are in place.
    """
    out = config.out or config.data_root / "torchvision"
    dataset = InaturalistConfig(root=config.data_root, version=config.version, splits=config.splits)
    _, categories, parts = dataset.read()
    parts = [part.only(part.labels >= 0) for part in parts]
    _check_places(parts, config.version)
    folders = [class_folder(one, rank, config.version) for rank, one in enumerate(categories)]
    missing: list[Path] = []
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with (
        Progress(*columns, console=Console(stderr=True)) as progress,
        ThreadPoolExecutor(config.num_threads) as pool,
    ):
        for part in parts:
            base = out / tree_name(config.version, part.split)
            for folder in folders:  # also those without images: a class's number is its rank
                (base / folder).mkdir(parents=True, exist_ok=True)
            bar = progress.add_task(part.split, total=len(part.names))
            paths = dataset.paths(part)
            for start in range(0, len(paths), _BLOCK):
                sources = [config.data_root / p for p in paths.slice(start, _BLOCK).to_pylist()]
                targets = [
                    base / folders[label] / source.name
                    for source, label in zip(sources, part.labels[start:], strict=False)
                ]
                placed = pool.map(place, sources, targets, repeat(config.mode))
                missing += [s for s, done in zip(sources, placed, strict=True) if not done]
                progress.advance(bar, len(sources))
    if missing:
        raise UnreadableImagesError(
            f"{config.data_root}: {len(missing)} images are not there, e.g. {missing[0]}; the "
            f"others are in {out}; complete the data and run this again"
        )
    print(out)
    return out


def tree_name(version: str, split: str) -> str:
    """Folder that torchvision looks for: one for each split of 2021, one for all of 2018."""
    return version if version == "2018" else {"train": "2021_train", "val": "2021_valid"}[split]


def class_folder(category: dict[str, Any], rank: int, version: str) -> str:
    """Folder of a class below the tree; torchvision takes the class's number from its name.

    2021: `00002_Kingdom_Phylum_Class_Order_Family_Genus_epithet`, exactly seven underscores; 2018:
    `Supercategory/2`. The number is the rank of the category id, the same in the published sets.
    """
    if version == "2018":
        return f"{_word(category, 'supercategory', ' ')}/{rank}"
    pieces = str(category.get("image_dir_name", "")).split("_")
    if len(pieces) != 8:
        epithet = str(category["name"]).split()[-1]
        pieces = ["", *(_word({"specific_epithet": epithet, **category}, t, "-") for t in _TAXA)]
    return "_".join([f"{rank:05d}", *pieces[1:]])


def _word(category: dict[str, Any], field: str, blank: str) -> str:
    words = str(category.get(field) or "unknown").replace("_", " ").replace("/", " ").split()
    return blank.join(words) or "unknown"


def place(source: Path, target: Path, mode: Mode) -> bool:
    """Puts one image in its place, unless it is there; False if there is no such image."""
    if target.exists():
        return True
    if not source.exists():
        return False
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    try:
        if mode == "link":
            partial.symlink_to(os.path.relpath(source.resolve(), target.parent.resolve()))
        elif mode == "hard_link":
            os.link(source.resolve(), partial)
        else:
            shutil.copyfile(source, partial)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return True


def _check_places(parts: list[Split], version: str) -> None:
    """Two images of one class and one tree must not have one file name."""
    trees: dict[str, list[Split]] = {}
    for part in parts:
        trees.setdefault(tree_name(version, part.split), []).append(part)
    for name, members in trees.items():
        labels = np.concatenate([part.labels for part in members]).astype(str)
        files = pc.replace_substring_regex(
            pa.concat_arrays([part.names for part in members]), r"^.*/", ""
        )
        places = pc.binary_join_element_wise(
            pa.array(labels, pa.large_string()), files, pa.scalar("/", pa.large_string())
        )
        if pc.count_distinct(places).as_py() < len(places):
            counts = pc.value_counts(places)
            twice = counts.filter(pc.greater(counts.field("counts"), 1))[0]["values"].as_py()
            label, _, file = twice.partition("/")
            raise DatasetError(
                f"{members[0].file}: {file} is the name of two images of class {label}, which "
                f"would share one place in {name}; rename one"
            )


if __name__ == "__main__":
    run_job(ConvertConfig, run)
