"""Small pictures of a cache's images, as they stand in the page itself."""

import base64
import io
import textwrap

from PIL import Image, ImageDraw, ImageFont, ImageOps

from featcache.image_bytes import read_bytes
from featcache.reader import Cache
from featcache.reporting import page

SIDE = 132
"""Pixels of a thumbnail's side: one and a half times what the page shows, for fine screens."""

_GREY, _INK = (226, 230, 234), (102, 114, 125)


class Thumbnails:
    """Thumbnails of rows; each is read once. An image that cannot be read is a grey tile.

    Attributes:
        names: C class names, with blanks for underscores.
        num_missing: rows asked for that are grey tiles.
    """

    def __init__(self, cache: Cache, root: str | None = None, side: int = SIDE) -> None:
        """Nothing is read yet.

        Args:
            cache: the cache.
            root: folder of the images; None = the one recorded at extraction.
            side: pixels of a thumbnail's side.
        """
        self._cache, self._side = cache, side
        self._root = str(cache.attributes["root"]) if root is None else root
        self._made: dict[int, str] = {}
        self.names = [str(name).replace("_", " ") for name in cache.classes["name"]]
        self.num_missing = 0

    def uri(self, row: int) -> str:
        """A row's thumbnail as a data URI."""
        if row not in self._made:
            self._made[row] = _encode(self.picture(row))
        return self._made[row]

    def tile(self, row: int) -> str:
        """A row's thumbnail as HTML, its id and labels under the pointer."""
        labels = self.labels(row)
        return page.tile(self.uri(row), f"{self._cache.ids[row]}{': ' if labels else ''}{labels}")

    def labels(self, row: int) -> str:
        """Names of a row's classes."""
        offsets, values = self._cache.label_lists
        numbers = values[offsets[row] : offsets[row + 1]].tolist()
        return ", ".join(self.names[number] for number in numbers)

    def pair(self, row: int, other: int, what: str) -> str:
        """Two rows side by side, with ids; labels that differ are marked."""
        one, two = self.labels(row), self.labels(other)
        names = one if one == two else f"{one or 'no label'} | {two or 'no label'}"
        ids = f"{self._cache.ids[row]} = {self._cache.ids[other]}"
        caption = "; ".join(part for part in (what, names, ids) if part)
        warning = "labels differ" if one != two else ""
        return page.pair([self.tile(row), self.tile(other)], caption, warning)

    def picture(self, row: int) -> Image.Image:
        """A row's thumbnail: the middle of the image, or grey with the reason."""
        try:
            data = read_bytes(self._root, self._cache.paths[row])
            with Image.open(io.BytesIO(data)) as image:
                image.draft("RGB", (2 * self._side, 2 * self._side))
                plain = ImageOps.exif_transpose(image).convert("RGB")
                return ImageOps.fit(plain, (self._side, self._side), Image.Resampling.LANCZOS)
        except (ValueError, OSError, SyntaxError, Image.DecompressionBombError) as error:
            self.num_missing += 1
            return _grey(_reason(error), self._side)


def _reason(error: Exception) -> str:
    if "cannot identify image file" in str(error):  # the rest names a buffer in memory
        return "not an image"
    return str(error) or type(error).__name__


def _grey(reason: str, side: int) -> Image.Image:
    picture = Image.new("RGB", (side, side), _GREY)
    draw = ImageDraw.Draw(picture)
    lines = textwrap.wrap(reason, 16)[:4]
    for index, line in enumerate(lines):
        y = side / 2 + (index - (len(lines) - 1) / 2) * 18
        draw.text((side / 2, y), line, _INK, ImageFont.load_default(14), anchor="mm")
    return picture


def _encode(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
