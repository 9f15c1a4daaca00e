"""Images that a source keeps as arrays, written out as PNG once."""

import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from featcache.errors import DatasetError

_PER_FOLDER = 1000
_SILENT = 5000
"""Up to this many images are written without a progress bar."""


def write_png(
    parent: Path, name: str, arrays: Mapping[str, npt.NDArray[np.uint8]]
) -> tuple[str, dict[str, list[str]]]:
    """Writes arrays as PNG below `parent`, unless just these are there already.

    Args:
        parent: folder for the folder of images.
        name: what the folder's name begins with; a hash of the pixels follows, so other pixels
            never pass for these and the same ones get the same paths anywhere.
        arrays: (N, H, W) or (N, H, W, 3) pixels by split.

    Returns:
        The folder's name, and by split the N paths below it.

    Raises:
        DatasetError: if the folder cannot be written.
    """
    digest = xxhash.xxh3_64()
    for split, pixels in arrays.items():
        digest.update(f"{split}{pixels.shape}".encode())
        digest.update(np.ascontiguousarray(pixels).data)
    folder = parent / f"{name}-png-{digest.hexdigest()[:10]}"
    paths = {
        split: [f"{split}/{row // _PER_FOLDER:03d}/{row:06d}.png" for row in range(len(pixels))]
        for split, pixels in arrays.items()
    }
    if not folder.is_dir():
        try:
            _write(folder, arrays, paths)
        except OSError as error:
            raise DatasetError(
                f"{folder}: cannot write the images ({error.strerror}); set dataset.images to a "
                "folder with room"
            ) from None
    return folder.name, paths


def _write(folder: Path, arrays: Mapping[str, Any], paths: Mapping[str, list[str]]) -> None:
    total = sum(map(len, paths.values()))
    columns = ("writing PNG files", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    shown = Console(stderr=True)  # standard output may be a result
    with (
        whole_folder(folder) as partial,
        Progress(*columns, console=shown, disable=total <= _SILENT) as progress,
    ):
        bar = progress.add_task("images", total=total)
        for split, pixels in arrays.items():
            for row, path in enumerate(paths[split]):
                file = partial / path
                if row % _PER_FOLDER == 0:
                    file.parent.mkdir(parents=True)
                Image.fromarray(pixels[row]).save(file, compress_level=1)
                progress.advance(bar)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which gets its name `folder` at the end: there is none until it is whole.

    Raises:
        OSError: if it cannot be made or renamed.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.partial-{uuid.uuid4().hex[:8]}")
    partial.mkdir()
    try:
        yield partial
        try:
            partial.rename(folder)
        except OSError:  # another process was faster: its images are the same
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
