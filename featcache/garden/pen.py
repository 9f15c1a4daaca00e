"""Outlines, markings and the pen that the garden is drawn with.

Shapes are complex numbers: x to the right, y down, in units of a subject's radius. A part (petal,
wing, blossom) is an outline along the real axis from its base 0 to its tip 1; a placement (a, b)
puts it at b + a·outline, so that a's angle is its direction and |a| its length.
"""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import ImageDraw

from featcache.garden.species import Rgb

Points = npt.NDArray[Any]
"""Positions x + iy."""


def _profile(kind: str, num: int = 9) -> Points:
    """Closed outline of 2·num points, half-width at most 0.5."""
    t = np.linspace(0, 1, num)
    shapes = {
        "pointed": 0.5 * np.sin(math.pi * t**0.75) ** 0.9,
        "round": 0.5 * np.sin(math.pi * t**1.35) ** 0.62,
        "bell": 0.16 + 0.3 * t**1.2 + 0.1 * t**8,
        "bud": 0.42 * np.sin(math.pi * t**0.8) ** 0.8,
        "wing": 0.5 * np.sin(math.pi * t**1.9) ** 0.7,
        "fan": 0.08 + 0.42 * t**0.9,
        "kite": 0.78 * t * (1 - t**6),
    }
    width = shapes[kind]
    return np.concatenate([t + 1j * width, (t - 1j * width)[::-1]])


PROFILES = {
    kind: _profile(kind) for kind in ("pointed", "round", "bell", "bud", "wing", "fan", "kite")
}
CIRCLE = np.exp(1j * np.linspace(0, 2 * math.pi, 20, endpoint=False))
TAIL = np.asarray(
    [-0.05j - 0.1, 0.5 - 0.09j, 0.85 - 0.14j, 1.0 + 0j, 0.85 + 0.14j, 0.5 + 0.09j, 0.05j]
)
DOT = np.exp(1j * np.linspace(0, 2 * math.pi, 7, endpoint=False))


def _half_width(profile: Points, t: float) -> float:
    num = len(profile) // 2
    return float(np.interp(t, profile[:num].real, profile[:num].imag))


def _band(profile: Points, start: float, stop: float) -> Points:
    """The part of an outline between two positions along its axis."""
    t = np.linspace(start, stop, 4)
    width = np.asarray([_half_width(profile, value) for value in t])
    return np.concatenate([t + 1j * width, (t - 1j * width)[::-1]])


def _markings(profile: Points) -> dict[str, list[Points]]:
    """Overlays, in part coordinates, of each marking."""
    wide = _half_width(profile, 0.6)
    return {
        "spotted": [
            0.42 + 0.085 * DOT,
            0.68 + 0.55j * wide + 0.085 * DOT,
            0.68 - 0.55j * wide + 0.085 * DOT,
        ],
        "striped": [
            np.asarray([0.1, 0.5 - 0.07j, 0.95, 0.5 + 0.07j]),
            np.asarray([0.2 - 0.04j, 0.85 - 0.62j * wide, 0.8 - 0.35j * wide]),
            np.asarray([0.2 + 0.04j, 0.85 + 0.62j * wide, 0.8 + 0.35j * wide]),
        ],
        "ringed": [_band(profile, 0.5, 0.68)],
        "tipped": [_band(profile, 0.74, 1.0)],
    }


MARKING_SHAPES = {kind: _markings(profile) for kind, profile in PROFILES.items()}
"""Overlays of each outline and marking."""


def shift(color: Rgb, factor: float, toward: Rgb = (255, 255, 255), share: float = 0.0) -> Rgb:
    """A colour made `factor` times as bright, then mixed with `toward`."""
    r, g, b = (
        min(255, int((1 - share) * value * factor + share * other))
        for value, other in zip(color, toward, strict=True)
    )
    return r, g, b


class Pen:
    """Draws shapes in a subject's own coordinates.

    Args:
        draw: canvas.
        center: middle of the subject in pixels.
        scale: pixels in the subject's unit.
        angle: rotation in radians.
        tilt: foreshortening along the vertical axis, 1 = none.
    """

    def __init__(
        self,
        draw: ImageDraw.ImageDraw,
        center: complex,
        scale: float,
        angle: float = 0.0,
        tilt: float = 1.0,
    ) -> None:
        self.draw = draw
        self.center = center
        self.turn = scale * complex(math.cos(angle), math.sin(angle))
        self.tilt = tilt
        self.scale = scale

    def to_pixels(self, points: Points) -> Points:
        """Canvas positions of points in the subject's coordinates."""
        flat = points if self.tilt == 1.0 else points.real + 1j * self.tilt * points.imag
        return np.asarray(self.center + self.turn * flat)

    def fill(self, points: Points, color: Rgb) -> None:
        """One closed polygon."""
        pixels = np.ascontiguousarray(self.to_pixels(points))
        self.draw.polygon(pixels.view(np.float64).tolist(), fill=color)

    def line(self, points: Points, color: Rgb, width: float) -> None:
        """A line through points; `width` in the subject's units, at least one pixel."""
        pixels = np.ascontiguousarray(self.to_pixels(points))
        pixel_width = max(1, round(width * self.scale))
        self.draw.line(
            pixels.view(np.float64).tolist(), fill=color, width=pixel_width, joint="curve"
        )

    def disk(self, center: complex, radius: float, color: Rgb) -> None:
        """A filled circle, foreshortened as everything else."""
        self.fill(center + radius * CIRCLE, color)


def stretch(points: Points, factor: float) -> Points:
    """An outline made `factor` times as wide."""
    return np.asarray(points.real + 1j * factor * points.imag)


def fan(
    count: int, start: float, stop: float, length: float, center: complex = 0j
) -> list[tuple[complex, complex]]:
    """Placements with directions spread evenly over [start, stop), in radians."""
    step = (stop - start) / count
    return [
        (length * complex(math.cos(start + step * k), math.sin(start + step * k)), center)
        for k in range(count)
    ]
