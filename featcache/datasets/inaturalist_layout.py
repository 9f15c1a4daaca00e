"""Where the images of an iNaturalist split lie: four layouts, tried in order.

Looking for each of millions of images in up to four places takes long on a network disk. So a few
are looked for, and where they agree the rest is believed; where they do not, folders are listed,
one at a time, which is far cheaper than asking for single files.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from featcache.errors import DatasetError

PROBES = 32
"""Images of a split that are looked for before its layout is believed."""

_SPLIT_FOLDER = r"^(train|val|test|train_mini|public_test)/"
"""First folder of a `file_name` that an unpacked archive may lack."""


def resolve(root: Path, version: str, split: str, names: pa.Array, check_files: bool) -> pa.Array:
    """(N,) image paths relative to `root`.

    Args:
        root: the dataset's folder.
        version: name of the image folder below it, 2018 or 2021.
        split: name of the split, for messages.
        names: (N,) the `file_name` of each image, with forward slashes.
        check_files: look for every image.

    Raises:
        DatasetError: if no image is there, or with `check_files` if one is not.
    """
    if len(names) == 0:
        return names
    if not check_files:
        probes = names.take(pa.array(probe_rows(len(names))))
        candidates = zip(*(_in_layout(probes, version, i) for i in range(4)), strict=True)
        found = {_first_existing(root, paths) for paths in candidates} - {-1}
        if len(found) == 1:
            return _in_layout(names, version, found.pop())
    paths = _in_layout(names, version, 0)
    unseen = np.arange(len(names))
    for index in range(4):
        rows = pa.array(unseen)
        there = _listed(root, at := _in_layout(names.take(rows), version, index))
        paths = _replaced(paths, unseen[there], at.filter(pa.array(there)))
        unseen = unseen[~there]
        if len(unseen) == 0:
            break
    if len(unseen) == len(names):
        places = dict.fromkeys(str(_in_layout(names.slice(0, 1), version, i)[0]) for i in range(4))
        raise DatasetError(
            f"{root}: found none of the {len(names)} images of {split}, the first as none of "
            f"{', '.join(places)}; check dataset.root and dataset.version, or leave the split out "
            "(dataset.splits)"
        )
    if check_files and len(unseen):
        raise DatasetError(
            f"{root}: {len(unseen)} of the {len(names)} images of {split} are not there, e.g. "
            f"{paths[unseen[0]]}; complete the data, or leave dataset.check_files off to have them "
            "skipped and reported"
        )
    return paths


def probe_rows(num_rows: int) -> list[int]:
    """Up to `PROBES` rows, spread evenly, both ends among them."""
    spread = np.linspace(0, num_rows - 1, min(num_rows, PROBES))
    return list(dict.fromkeys(np.rint(spread).astype(int).tolist()))


def _in_layout(names: pa.Array, version: str, index: int) -> pa.Array:
    """The paths that images have in one of the four layouts, which are tried in this order."""
    if index in (1, 3):
        names = pc.replace_substring_regex(names, _SPLIT_FOLDER, "")
    return names if index >= 2 else _below(version, names)


def _below(folder: str, names: pa.Array) -> pa.Array:
    texts = (pa.scalar(text, pa.large_string()) for text in (folder, "/"))
    return pc.binary_join_element_wise(next(texts), names, next(texts))


def _replaced(paths: pa.Array, rows: npt.NDArray[np.int64], others: pa.Array) -> pa.Array:
    mask = np.zeros(len(paths), np.bool_)
    mask[rows] = True
    return pc.replace_with_mask(paths, pa.array(mask), others)


def _first_existing(root: Path, paths: Sequence[Any]) -> int:
    return next((i for i, path in enumerate(paths) if (root / path.as_py()).exists()), -1)


def _listed(root: Path, paths: pa.Array) -> npt.NDArray[np.bool_]:
    """(N,) whether each path is there, by one listing of every folder."""
    folders = pc.replace_substring_regex(paths, r"/?[^/]*$", "").dictionary_encode()
    codes = folders.indices.to_numpy(zero_copy_only=False)
    order = np.argsort(codes, kind="stable")
    present = np.zeros(len(paths), np.bool_)
    for rows in np.split(order, np.flatnonzero(np.diff(codes[order])) + 1):
        folder = folders.dictionary[int(codes[rows[0]])].as_py()
        try:
            entries = set(os.listdir(root / folder))
        except (FileNotFoundError, NotADirectoryError):
            continue
        names = paths.take(pa.array(rows)).to_pylist()
        present[rows] = [name.rpartition("/")[2] in entries for name in names]
    return present
