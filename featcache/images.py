"""From a file's bytes to the pixels that an image tower expects.

Three modes, recorded in a cache's identity:

- `fast`: JPEG by libjpeg-turbo, resize by torch's uint8 kernels. Within one step of 255 of the
  source library's own transform (two steps in a few of ten million values), at 3 times its speed.
  Anything that is not a plain JPEG goes through Pillow, which also decides whether a doubtful file
  can be read.
- `scaled`: the same, but a big JPEG is decoded at 1/2, 1/4 or 1/8 of its size, as long as that
  keeps twice the pixels needed in each direction. Faster for photographs of several megapixels;
  pixels differ by a few steps.
- `reference`: the source library's own transform, in float32.

A file is either decoded as a whole or not readable: a truncated image is never filled with grey.
"""

import io
import math
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import simplejpeg
import torch
import xxhash
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn.functional import interpolate

from featcache.backbones.base import PixelSpec

PixelMode = Literal["fast", "scaled", "reference"]
"""How files are decoded and resized."""

MAX_PIXELS = 178_956_970
"""Largest image that is decoded, height times width: what Pillow allows before it calls a file a
decompression bomb."""

T = TypeVar("T")

Box = tuple[int, int, int, int]
"""Part of an image: top, left, height, width in pixels."""

# What Pillow's decoders raise for damaged files, over all formats.
_PIL_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    EOFError,
    RuntimeError,
    ArithmeticError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


@dataclass(frozen=True)
class Views:
    """How many views of an image are made, and how the augmented ones are drawn.

    Attributes:
        count: V; view 0 is the plain one, the others are a random resized crop, flipped half of
            the time.
        seed: with the row's id and the view's number it fixes crop and flip, whatever the order
            in which images are read.
        scale: smallest share of the image's area that a crop keeps, (0, 1].
    """

    count: int = 1
    seed: int = 0
    scale: float = 1.0


@dataclass(frozen=True)
class _Plan:
    """Source box (top, left, height, width), size after the resize; crop or padding follow."""

    box: Box | None
    resized: tuple[int, int]
    flip: bool = False


_Planner = Callable[[int, int], list[_Plan]]
"""The plans for an image of this height and width."""


def load_pixels(
    data: bytes,
    spec: PixelSpec,
    mode: PixelMode = "fast",
    *,
    views: Views | None = None,
    row_id: str = "",
    transform: Callable[[Any], Tensor] | None = None,
) -> Tensor:
    """All views of one image, ready for `Backbone.encode_image`.

    Args:
        data: the file's bytes.
        spec: what the tower expects.
        mode: see the module's text.
        views: default one plain view.
        row_id: id of the row; only augmented views depend on it.
        transform: the backbone's own transform; needed by `reference` only.

    Returns:
        (V, 3, H, W) uint8 in 0..255, or float32 already normalised in mode `reference`.

    Raises:
        ValueError: the reason why the file cannot be read, in a few words.
    """
    views = views or Views()
    if not data:
        raise ValueError("empty file")
    if mode == "reference":
        assert transform is not None, "mode reference needs the backbone's own transform"
        image = _pil_image(data)
        work = partial(_reference_views, image, spec, transform, views, row_id)
        return _pil_guarded(work)
    return _planned_views(data, spec, mode, lambda h, w: _plans(h, w, spec, views, row_id))


def load_view(
    data: bytes,
    spec: PixelSpec,
    mode: Literal["fast", "scaled"],
    draw: Callable[[int, int], tuple[Box | None, bool]],
) -> Tensor:
    """One view of an image whose crop the caller draws, once its size is known.

    Args:
        data: the file's bytes.
        spec: what the tower expects.
        mode: see the module's text.
        draw: height and width in pixels to a box that is resized to `spec.size` as it is (None:
            the plain view of `load_pixels`), and whether the result is mirrored. May be asked
            twice, and must answer the same.

    Returns:
        (3, H, W) uint8 in 0..255.

    Raises:
        ValueError: the reason why the file cannot be read, in a few words.
    """

    def plans(height: int, width: int) -> list[_Plan]:
        box, flip = draw(height, width)
        resized = spec.size if box is not None else resized_size(height, width, spec)
        _check_size(*resized)
        return [_Plan(box, resized, flip)]

    return _planned_views(data, spec, mode, plans)[0]


def _planned_views(data: bytes, spec: PixelSpec, mode: PixelMode, plans_of: _Planner) -> Tensor:
    """(V, 3, H, W) uint8, one view per plan."""
    if not data:
        raise ValueError("empty file")
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return _pil_views(data, spec, plans_of)
    if colorspace in ("CMYK", "YCCK"):  # libjpeg-turbo turns them into RGB by another formula
        return _pil_views(data, spec, plans_of)
    _check_size(height, width)
    plans = plans_of(height, width)
    decoded: dict[int, Tensor] = {}
    try:
        for plan in plans:
            factor = _dct_factor(plan, height, width) if mode == "scaled" else 1
            if factor not in decoded:
                decoded[factor] = _decode_jpeg(data, height, width, factor)
    except ValueError:
        return _pil_views(data, spec, plans_of)
    result = np.empty((len(plans), 3, *spec.size), np.uint8)
    for view, plan in enumerate(plans):
        factor = _dct_factor(plan, height, width) if mode == "scaled" else 1
        # Copied by numpy: torch would wake its thread pool in every reader thread.
        np.copyto(result[view], _resize_and_crop(decoded[factor], plan, spec, factor))
    return torch.from_numpy(result)


def resized_size(height: int, width: int, spec: PixelSpec) -> tuple[int, int]:
    """Height and width after the resize, before crop or padding, as the source library rounds."""
    rows, columns = (math.floor(edge / spec.crop_pct) for edge in spec.size)
    if spec.resize_mode == "squash":
        return rows, columns
    if spec.resize_mode == "longest":
        ratio = max(height / rows, width / columns)
        return max(1, round(height / ratio)), max(1, round(width / ratio))
    if rows != columns:
        ratio = min(height / rows, width / columns)
        return round(height / ratio), round(width / ratio)
    if width <= height:
        return int(rows * height / width), rows
    return rows, int(rows * width / height)


def crop_box(height: int, width: int, views: Views, row_id: str, view: int) -> tuple[Box, bool]:
    """The random resized crop (top, left, height, width) and flip of an augmented view.

    Area share uniform in [scale, 1], aspect ratio log-uniform in [3/4, 4/3], ten attempts to fit
    it into the image, then the whole image. Drawn from hashes, so it depends on nothing but the
    arguments.
    """

    def uniform(draw: int) -> float:
        key = f"{views.seed}\0{row_id}\0{view}\0{draw}".encode()
        return float(xxhash.xxh3_64_intdigest(key)) / 2.0**64

    flip = uniform(0) < 0.5
    for attempt in range(10):
        first = 1 + 4 * attempt
        area = height * width * (views.scale + (1 - views.scale) * uniform(first))
        ratio = math.exp(math.log(4 / 3) * (2 * uniform(first + 1) - 1))
        rows, columns = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < rows <= height and 0 < columns <= width:
            top = int(uniform(first + 2) * (height - rows + 1))
            left = int(uniform(first + 3) * (width - columns + 1))
            return (top, left, rows, columns), flip
    return (0, 0, height, width), flip


def _plans(height: int, width: int, spec: PixelSpec, views: Views, row_id: str) -> list[_Plan]:
    plans = [_Plan(None, resized_size(height, width, spec))]
    _check_size(*plans[0].resized)
    for view in range(1, views.count):
        box, flip = crop_box(height, width, views, row_id, view)
        plans.append(_Plan(box, spec.size, flip))
    return plans


def _check_size(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise ValueError(f"{width}x{height} pixels are more than the {MAX_PIXELS} allowed")


def _dct_factor(plan: _Plan, height: int, width: int) -> int:
    """Largest power of two up to 8 that leaves twice the resized size in both directions."""
    if plan.box is not None:
        height, width = plan.box[2:]
    rows, columns = plan.resized
    factor = 1
    while factor < 8 and height >= 4 * factor * rows and width >= 4 * factor * columns:
        factor *= 2
    return factor


def _decode_jpeg(data: bytes, height: int, width: int, factor: int) -> Tensor:
    """(1, 3, H, W) uint8, channels last. Strict: any complaint of the decoder is an error."""
    if factor == 1:
        pixels = simplejpeg.decode_jpeg(data, "RGB")
    else:
        pixels = simplejpeg.decode_jpeg(
            data, "RGB", min_height=-(-height // factor), min_width=-(-width // factor)
        )
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]


def _torchvision() -> Any:
    """Its functions on images; imported late, because that takes longer than all else here."""
    import torchvision.transforms.functional as tvf

    return tvf


def _resize_and_crop(
    image: Tensor, plan: _Plan, spec: PixelSpec, factor: int = 1
) -> npt.NDArray[np.uint8]:
    """(3, H, W) uint8 of one view from (1, 3, H/factor, W/factor) uint8."""
    if plan.box is not None:
        top, left, rows, columns = (round(edge / factor) for edge in plan.box)
        image = image[:, :, top : top + rows, left : left + columns]
    if image.shape[-2:] != plan.resized:
        image = interpolate(
            image, plan.resized, mode=_filter(spec), antialias=True, align_corners=False
        )
    pixels: npt.NDArray[np.uint8] = _center(image[0], spec).numpy()
    return pixels[:, :, ::-1] if plan.flip else pixels


def _filter(spec: PixelSpec) -> str:
    # The source library resizes to a non-square target with its default filter.
    square = spec.size[0] == spec.size[1]
    return spec.interpolation if square or spec.resize_mode != "shortest" else "bicubic"


def _center(image: Any, spec: PixelSpec) -> Any:
    """Centre crop, or padding of the mode `longest`, of a tensor or a Pillow image."""
    height, width = image.shape[-2:] if isinstance(image, Tensor) else (image.height, image.width)
    rows, columns = spec.size
    if (height, width) == (rows, columns):
        return image
    tvf = _torchvision()
    if spec.resize_mode == "longest":
        extra_rows, extra_columns = rows - height, columns - width
        left, top = extra_columns // 2, extra_rows // 2
        padding = [left, top, extra_columns - left, extra_rows - top]
        return tvf.pad(image, padding, fill=spec.fill_color)
    return tvf.center_crop(image, [rows, columns])


def _pil_image(data: bytes) -> Image.Image:
    def load() -> Image.Image:
        image = Image.open(io.BytesIO(data))
        _check_size(image.height, image.width)
        image.load()
        return image

    return _pil_guarded(load)


def _pil_guarded(work: Callable[[], T]) -> T:
    try:
        return work()
    except UnidentifiedImageError:
        raise ValueError("not an image, or of an unknown format") from None
    except _PIL_ERRORS as error:
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None


def _pil_views(data: bytes, spec: PixelSpec, plans_of: _Planner) -> Tensor:
    """The same views through Pillow's decoder; modes other than RGB through its resize as well.

    Most source libraries resize first and convert to RGB afterwards, which matters for palettes
    (nearest neighbour), alpha (premultiplied), 16 bit and CMYK; `spec.convert_first` says which do
    not.
    """
    image = _pil_image(data)

    def work() -> Tensor:
        plans = plans_of(image.height, image.width)
        if image.mode == "RGB" or spec.convert_first:
            pixels = torch.from_numpy(np.array(_rgb(image, spec))).permute(2, 0, 1)[None]
            views_of = [_resize_and_crop(pixels, plan, spec) for plan in plans]
        else:
            views_of = [_pil_view(image, plan, spec) for plan in plans]
        return torch.from_numpy(np.stack(views_of))

    return _pil_guarded(work)


def _rgb(image: Image.Image, spec: PixelSpec) -> Image.Image:
    """The image in RGB; `spec.on_white` takes an RGB file's transparent colour into account too."""
    transparent = "A" in image.getbands() or image.info.get("transparency") is not None
    if spec.on_white and transparent:
        pixels = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255,) * 4), pixels)
    return image.convert("RGB")


def _pil_resized(image: Image.Image, plan: _Plan, spec: PixelSpec) -> Image.Image:
    tvf = _torchvision()
    if plan.box is not None:
        image = tvf.crop(image, *plan.box)
    result: Image.Image = tvf.resize(
        image, list(plan.resized), tvf.InterpolationMode(_filter(spec))
    )
    return tvf.hflip(result) if plan.flip else result


def _pil_view(image: Image.Image, plan: _Plan, spec: PixelSpec) -> npt.NDArray[np.uint8]:
    resized = _pil_resized(image, plan, spec)
    if spec.resize_mode == "longest":  # the padding colour is meant in RGB
        resized = resized.convert("RGB")
    return np.array(_center(resized, spec).convert("RGB")).transpose(2, 0, 1)


def _reference_views(
    image: Image.Image,
    spec: PixelSpec,
    transform: Callable[[Any], Tensor],
    views: Views,
    row_id: str,
) -> Tensor:
    plans = _plans(image.height, image.width, spec, views, row_id)
    plain = transform(image)
    image = _rgb(image, spec) if spec.convert_first else image

    def augmented(plan: _Plan) -> Tensor:
        # A crop already has the target's size, so what is left is to convert and normalise it.
        view = _pil_resized(image, plan, spec)
        if spec.crop_pct == 1:
            return transform(view)
        # The transform would enlarge it and cut the centre out once more.
        tvf = _torchvision()
        pixels: Tensor = tvf.normalize(tvf.to_tensor(view.convert("RGB")), spec.mean, spec.std)
        return pixels

    return torch.stack([plain, *map(augmented, plans[1:])])
