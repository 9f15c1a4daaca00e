"""A contact sheet: a dataset's classes as rows of pictures, with their names."""

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont, ImageOps

from featcache.image_bytes import read_bytes
from featcache.manifest import Manifest

_INK = (40, 40, 44)
_GREY = (130, 130, 138)
_PAPER = (250, 249, 246)
_GAP = 4


def contact_sheet(
    manifest: Manifest,
    path: str | Path,
    num_rows: int = 12,
    num_columns: int = 8,
    tile: int = 96,
    split: str | None = None,
    classes: Sequence[int] | None = None,
    seed: int = 0,
) -> Path:
    """Writes a picture with one row a class, its name on the left; returns its path.

    Args:
        manifest: the dataset; unlabelled ones give rows without names.
        path: PNG or JPEG file to write; its folder is made if missing.
        num_rows: classes shown, at most; spread evenly over the class list.
        num_columns: images of each class, at most.
        tile: height and width of an image on the sheet, in pixels.
        split: split that the images come from; None = all.
        classes: indices of the classes to show, instead of an even spread.
        seed: which images of a class are shown.

    Raises:
        ValueError: if an image's bytes cannot be had.
        OSError: if they are no image.
    """
    rows = _rows_by_class(manifest, split, classes, num_rows, num_columns, seed)
    margin = 2 * tile if manifest.num_classes else 0
    width = margin + num_columns * (tile + _GAP) + _GAP
    sheet = Image.new("RGB", (width, len(rows) * (tile + _GAP) + _GAP), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for place, (number, members) in enumerate(rows):
        top = _GAP + place * (tile + _GAP)
        if margin:
            _name(draw, manifest, number, top, tile)
        for column, member in enumerate(members):
            data = read_bytes(manifest.root, manifest.paths[member])
            with Image.open(io.BytesIO(data)) as image:
                picture = ImageOps.fit(image.convert("RGB"), (tile, tile), Image.Resampling.LANCZOS)
            sheet.paste(picture, (margin + _GAP + column * (tile + _GAP), top))
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(target)
    return target


def _rows_by_class(
    manifest: Manifest,
    split: str | None,
    classes: Sequence[int] | None,
    num_rows: int,
    num_columns: int,
    seed: int,
) -> list[tuple[int, npt.NDArray[np.int64]]]:
    """(class index, image rows) of each row of the sheet."""
    rng = np.random.default_rng(seed)
    wanted = np.ones(len(manifest), bool)
    if split is not None:
        wanted = np.asarray(manifest.splits, dtype=object) == split
    if not manifest.num_classes:
        drawn = rng.permutation(np.flatnonzero(wanted))[: num_rows * num_columns]
        return [
            (-1, np.sort(drawn[start : start + num_columns]))
            for start in range(0, len(drawn), num_columns)
        ]
    if classes is None:
        shown = min(num_rows, manifest.num_classes)
        classes = np.linspace(0, manifest.num_classes - 1, shown).round().astype(int).tolist()
    owners = np.repeat(np.arange(len(manifest)), np.diff(manifest.label_offsets))
    result = []
    for number in classes:
        members = owners[(manifest.label_values == number) & wanted[owners]]
        result.append((number, rng.permutation(members)[:num_columns]))
    return result


def _name(draw: ImageDraw.ImageDraw, manifest: Manifest, number: int, top: int, tile: int) -> None:
    row = manifest.classes.iloc[number]
    size = max(9, tile // 7)
    lines = [(text, _INK) for text in textwrap.wrap(str(row["name"]).replace("_", " "), 28)[:3]]
    for column in ("scientific_name", "group"):
        if row.get(column):
            lines += [(text, _GREY) for text in textwrap.wrap(str(row[column]), 28)[:2]]
    lines = lines[: max(1, tile // (size + 3))]
    y = top + (tile - len(lines) * (size + 3)) // 2
    for text, color in lines:
        draw.text((8, y), text, fill=color, font=ImageFont.load_default(size))
        y += size + 3
