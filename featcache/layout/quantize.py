"""Tokens as 8-bit integers with one scale each: half of float16's room, at a measured error.

Symmetric: value = code * scale, scale = largest magnitude of the token / 127, so that an element is
off by at most half a scale. Tokens whose few largest channels dwarf the others lose most; what is
lost is measured on the data by `measure`, never assumed.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.identity import TokenDtype

SCALE = "_scale"
"""Behind the name of an int8 array: the array that holds its scales."""

LEVELS = 127
"""Largest code; -128 is not used, so that a code's negative is a code too."""

_TINY = 1e-35
"""Largest magnitude up to which a token is stored as zeros: 127 divided by less is infinite."""

_BLOCK_VALUES = 1 << 20
"""Numbers worked on at a time: they stay in the processor's cache between the steps."""


def quantize(values: npt.NDArray[Any]) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Codes and scales of tokens.

    Args:
        values: (N, ..., W) float; a token with NaN or infinity gets scale NaN, and reads as NaN.

    Returns:
        (N, ..., W) int8 codes in -127..127 and (N, ...) float32 scales.
    """
    codes = np.empty(values.shape, np.int8)
    scales = np.empty(values.shape[:-1], np.float32)
    for rows in _blocks(values.shape):
        part = values[rows].astype(np.float32)
        largest = np.abs(part).max(-1, initial=0)
        finite = np.isfinite(largest)
        scales[rows] = np.where(finite, largest / np.float32(LEVELS), np.nan)
        part[~finite] = 0
        usable = finite & (largest > _TINY)
        part *= np.divide(LEVELS, largest, out=np.zeros_like(largest), where=usable)[..., None]
        codes[rows] = np.rint(part, out=part)
    return codes, scales


def dequantize(
    codes: npt.NDArray[np.int8],
    scales: npt.NDArray[np.float32],
    out: npt.NDArray[np.float32] | None = None,
) -> npt.NDArray[np.float32]:
    """(N, ..., W) float32 tokens from codes and their (N, ...) scales."""
    if out is None:
        out = np.empty(codes.shape, np.float32)
    for rows in _blocks(codes.shape):
        np.multiply(codes[rows], scales[rows][..., None], out=out[rows])
    return out


def as_stored(values: npt.NDArray[np.float32], dtype: TokenDtype) -> npt.NDArray[np.float32]:
    """What a cache of that type gives back for (N, ..., W) features."""
    if dtype == "int8":
        return dequantize(*quantize(values))
    return values.astype(dtype).astype(np.float32)


@dataclass(frozen=True)
class TokenError:
    """What storing tokens in a type costs, over some images.

    Attributes:
        dtype: type on disk.
        num_images: images that it was measured on.
        relative_rms: root mean square of the difference, over that of the tokens.
        min_cosine: smallest cosine between a token and its stored form.
        finished_cosine: smallest cosine between the image feature and the one finished from stored
            tokens; None unless the cache holds `before_last` tokens.
    """

    dtype: TokenDtype
    num_images: int
    relative_rms: float
    min_cosine: float
    finished_cosine: float | None = None

    def record(self) -> dict[str, Any]:
        """Plain JSON values, kept among a cache's attributes."""
        return asdict(self)

    def __str__(self) -> str:
        text = (
            f"{self.dtype} tokens of the first {self.num_images} images: relative RMS error "
            f"{100 * self.relative_rms:.3g} %, smallest cosine of a token {self.min_cosine:.6f}"
        )
        if self.finished_cosine is None:
            return text
        return f"{text}, of the finished feature {self.finished_cosine:.6f}"


def measure(
    values: npt.NDArray[np.float32], dtype: TokenDtype, finished_cosine: float | None = None
) -> TokenError:
    """The error of storing (N, L, W) tokens of N images; see `TokenError`."""
    stored = as_stored(values, dtype)
    exact = values.astype(np.float64)
    difference = np.square(stored - exact).mean() / max(np.square(exact).mean(), 1e-300)
    return TokenError(
        dtype=dtype,
        num_images=len(values),
        relative_rms=round(float(np.sqrt(difference)), 8),
        min_cosine=smallest_cosine(values, stored),
        finished_cosine=finished_cosine,
    )


def smallest_cosine(first: npt.NDArray[Any], second: npt.NDArray[Any]) -> float:
    """Smallest cosine between vectors along the last axis; 1 where both are zero."""
    a, b = first.astype(np.float64), second.astype(np.float64)
    lengths = np.sqrt(np.square(a).sum(-1) * np.square(b).sum(-1))
    products = (a * b).sum(-1)
    cosines = np.divide(products, lengths, out=np.ones_like(products), where=lengths > 0)
    return round(float(cosines.min()), 8)


def _blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    """Slices of rows of about `_BLOCK_VALUES` numbers."""
    size = max(1, _BLOCK_VALUES // max(1, int(np.prod(shape[1:]))))
    for start in range(0, shape[0], size):
        yield slice(start, start + size)
