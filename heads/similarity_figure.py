"""The picture of an image-text similarity matrix."""

from pathlib import Path

from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image, ImageOps

from featcache.reporting.style import INK, PALETTE, figure
from heads.prediction_figure import small_picture, write_png
from heads.similarity import Similarity, wrapped

_CELL = 0.82
"""Inches of a cell's side."""
_TEXT = 3.2
"""Inches for the texts."""
_SIDE = 160
_BELOW = 0.56
"""Cells between the matrix's first row and the pictures above it."""


def matrix(found: Similarity) -> Figure:
    """Texts as rows, images above columns, cosines inside; own pairs are framed."""
    num_texts, num_images = found.cosines.shape
    made = figure(_TEXT + _CELL * num_images, 0.3 + _CELL * (num_texts + 1))
    axes = made.subplots()
    colours = LinearSegmentedColormap.from_list("cosines", ["#ffffff", PALETTE[0]])
    low, high = float(found.cosines.min()), float(found.cosines.max())
    axes.imshow(found.cosines, cmap=colours, vmin=low, vmax=max(high, low + 1e-6))
    for column, path in enumerate(found.paths):
        picture = small_picture(found.root, path, 2 * _SIDE)
        tile = ImageOps.fit(picture, (_SIDE, _SIDE), Image.Resampling.LANCZOS)
        place = (column - 0.46, column + 0.46, -_BELOW, -_BELOW - 0.92)
        axes.imshow(tile, extent=place)
    for row in range(num_texts):
        for column in range(num_images):
            value = float(found.cosines[row, column])
            dark = value > low + 0.6 * (high - low)
            ink = "white" if dark else INK
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=ink, fontsize=9)
            if found.own is not None and found.own[row, column]:
                axes.add_patch(
                    Rectangle(
                        (column - 0.47, row - 0.47), 0.94, 0.94, fill=False, ec=PALETTE[1], lw=2
                    )
                )
    axes.set_xlim(-0.5, num_images - 0.5)
    axes.set_ylim(num_texts - 0.5, -_BELOW - 0.96)
    axes.set_xticks([])
    axes.set_yticks(range(num_texts), [wrapped(text) for text in found.texts], fontsize=8.5)
    axes.tick_params(axis="y", labelcolor=INK, length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return made


def write_matrix(found: Similarity, path: Path) -> Path:
    """Writes the picture as PNG; returns `path`."""
    return write_png(matrix(found), path, bbox_inches="tight")
