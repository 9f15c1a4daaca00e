"""Pictures of predictions: each image beside bars of its likeliest classes."""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageOps

from featcache.image_bytes import read_bytes
from featcache.reporting.style import EMPTY, GRID, INK, MUTED, PALETTE, figure, short_name
from featcache.storage import Where
from heads.run_folder import write_atomic

IMAGES_PER_PAGE = 24
"""Most images of one picture; further ones go to further pictures."""
_PAIRS_PER_ROW = 2
_LONGEST_NAME, _LONGEST_TITLE = 24, 30


@dataclass(frozen=True)
class Shown:
    """An image and what is said about it.

    Attributes:
        title: under which it is shown.
        image: the picture.
        names: its k likeliest classes, best first.
        shares: their k probabilities, 0..1.
    """

    title: str
    image: Image.Image
    names: Sequence[str]
    shares: Sequence[float]


def single(shown: Shown) -> Figure:
    """One image at the left, its bars at the right."""
    made = figure(9.0, 4.0)
    left, right = made.subplots(1, 2, width_ratios=[1.0, 1.25])
    _image(left, shown)
    _bars(right, shown)
    return made


def grid(shown: Sequence[Shown]) -> Figure:
    """Pairs of image and bars, two pairs a row, any number of them; an odd one stands alone."""
    rows = math.ceil(len(shown) / _PAIRS_PER_ROW)
    made = figure(13.0, 2.5 * rows)
    axes = made.subplots(rows, 2 * _PAIRS_PER_ROW, squeeze=False, width_ratios=[1.0, 1.3] * 2)
    places = axes.reshape(-1, 2)
    for pair, one in zip(places, shown, strict=False):
        _image(pair[0], one)
        _bars(pair[1], one)
    for pair in places[len(shown) :]:
        for empty in pair:
            empty.set_axis_off()
    return made


def write_figures(folder: Path, shown: Sequence[Shown], alone: bool) -> list[Path]:
    """Writes `single_img_demo.png`, or `demo.png`, `demo_2.png`, … of a folder's images.

    Args:
        folder: where they go; made if missing.
        shown: at least one.
        alone: whether a single file was asked for, not a folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if alone:
        return [write_png(single(shown[0]), folder / "single_img_demo.png")]
    pages = [
        shown[start : start + IMAGES_PER_PAGE] for start in range(0, len(shown), IMAGES_PER_PAGE)
    ]
    files = []
    for number, page in enumerate(pages, start=1):
        name = "demo.png" if number == 1 else f"demo_{number}.png"
        files.append(write_png(grid(page), folder / name))
    for stale in folder.glob("demo_*.png"):  # of an earlier run with more images
        ending = stale.stem.removeprefix("demo_")
        if ending.isdigit() and int(ending) > len(pages):
            stale.unlink()
    return files


def _image(axes: Axes, shown: Shown) -> None:
    axes.imshow(shown.image)
    axes.set_axis_off()
    title = shown.title  # a path, of which the end tells more than the beginning
    title = title if len(title) <= _LONGEST_TITLE else "…" + title[1 - _LONGEST_TITLE :]
    axes.set_title(title, loc="left", fontsize=9, color=MUTED)


def _bars(axes: Axes, shown: Shown) -> None:
    places = range(len(shown.names))
    axes.barh(places, shown.shares, color=PALETTE[0], height=0.62, zorder=2)
    names = [short_name(name, _LONGEST_NAME) for name in shown.names]
    axes.set_yticks(places, names, fontsize=9)
    for place, share in zip(places, shown.shares, strict=True):
        axes.text(
            share + 0.015, place, f"{100 * share:.1f} %", va="center", fontsize=8.5, color=INK
        )
    axes.set_xlim(0, 1.16)  # room for the figure behind a full bar
    axes.set_ylim(max(len(names), 3) - 0.5, -0.5)
    axes.set_xticks([0, 0.5, 1], ["0 %", "50 %", "100 %"])
    axes.tick_params(axis="x", colors=MUTED, labelsize=8, length=0)
    axes.tick_params(axis="y", labelcolor=INK, length=0)
    axes.grid(visible=True, axis="x", color=GRID, lw=0.8, zorder=0)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)


def small_picture(root: Where, path: str, side: int = 320) -> Image.Image:
    """An image at most `side` pixels high and wide, upright; a grey one if it cannot be shown.

    Args:
        root: folder or address that the path starts from.
        path: see `featcache.image_bytes.read_bytes`.
        side: pixels.
    """
    try:
        with Image.open(io.BytesIO(read_bytes(root, path))) as image:
            image.draft("RGB", (2 * side, 2 * side))
            plain = ImageOps.exif_transpose(image).convert("RGB")
    except (ValueError, OSError, SyntaxError, Image.DecompressionBombError):
        return Image.new("RGB", (side, side), EMPTY)
    plain.thumbnail((side, side), Image.Resampling.LANCZOS)
    return plain


def write_png(made: Figure, path: Path, **options: Any) -> Path:
    """Writes a figure, whole or not at all; returns `path`. Options are those of `savefig`."""
    buffer = io.BytesIO()
    made.savefig(buffer, format="png", **options)
    write_atomic(path, buffer.getvalue())
    return path
