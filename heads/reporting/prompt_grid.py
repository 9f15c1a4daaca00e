"""What each sub-prompt of a class stands for: the images that it claims most, a row a prompt."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from featcache.reporting.thumbnails import Thumbnails

_INK, _MUTED, _PAPER, _EMPTY = (34, 48, 60), (102, 114, 125), (255, 255, 255), (226, 230, 234)
_GAP, _MARGIN, _TITLE = 4, 132, 44


class Claim(NamedTuple):
    """An image and how much of it a prompt claims.

    Attributes:
        row: row of the cache.
        share: γ, 0..1; the shares of one image sum to 1 over the prompts.
    """

    row: int
    share: float


def strongest(
    shares: npt.NDArray[np.floating], rows: npt.NDArray[np.int64], num: int
) -> list[list[Claim]]:
    """For each of K prompts the `num` images that it claims most, most first; fewer if there are.

    Args:
        shares: (n, K) γ of each image.
        rows: (n,) rows of the cache.
        num: images a prompt.
    """
    order = np.argsort(-shares, axis=0, kind="stable")[:num]
    return [
        [Claim(int(rows[i]), float(shares[i, k])) for i in order[:, k]]
        for k in range(shares.shape[1])
    ]


def draw(
    claims: Sequence[Sequence[Claim]],
    prompts: Sequence[int],
    usage: npt.NDArray[np.floating],
    num_columns: int,
    thumbnails: Thumbnails,
    side: int,
    title: str,
) -> Image.Image:
    """A row a prompt: its number and usage, then its images with γ; grey EMPTY tiles to the end.

    Args:
        claims: images of each prompt that is drawn.
        prompts: their numbers.
        usage: (K,) mean γ of all prompts.
        num_columns: tiles of a row.
        thumbnails: where the pictures come from, `side` pixels each.
        side: pixels of a tile.
        title: line above.
    """
    width = _MARGIN + num_columns * (side + _GAP) + _GAP
    sheet = Image.new("RGB", (width, _TITLE + len(claims) * (side + _GAP) + _GAP), _PAPER)
    drawing = ImageDraw.Draw(sheet)
    small, large = _font(12), _font(15)
    drawing.text((12, _TITLE / 2), title, _INK, _font(18), anchor="lm")
    for place, (k, own) in enumerate(zip(prompts, claims, strict=True)):
        top = _TITLE + place * (side + _GAP)
        middle = top + side / 2
        drawing.text((12, middle - 9), f"prompt {k}", _INK, large, anchor="lm")
        drawing.text((12, middle + 12), f"mean γ {usage[k]:.1%}", _MUTED, small, anchor="lm")
        for column in range(num_columns):
            left = _MARGIN + column * (side + _GAP)
            if column >= len(own):
                drawing.rectangle((left, top, left + side - 1, top + side - 1), _EMPTY)
                drawing.text((left + side / 2, middle), "EMPTY", _MUTED, small, anchor="mm")
                continue
            sheet.paste(thumbnails.picture(own[column].row), (left, top))
            text = f"{own[column].share:.3f}"
            box = drawing.textbbox((left + 5, top + 3), text, small)
            drawing.rectangle((left, top, box[2] + 4, box[3] + 3), _PAPER)
            drawing.text((left + 5, top + 3), text, _INK, small)
    return sheet


def _font(size: int) -> ImageFont.FreeTypeFont:
    """Matplotlib's font: Pillow's own has no Greek letters."""
    return ImageFont.truetype(Path(mpl.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", size)
