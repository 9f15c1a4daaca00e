"""Draws the garden's plants and animals; one function an order of the taxonomy."""

import math

import numpy as np
from PIL import ImageDraw

from featcache.garden.pen import (
    CIRCLE,
    MARKING_SHAPES,
    PROFILES,
    TAIL,
    Pen,
    Points,
    fan,
    shift,
    stretch,
)
from featcache.garden.scene import Subject
from featcache.garden.species import FAMILIES, MARKINGS, Rgb


class Painter:
    """Draws one subject's parts in its species' colours and marking.

    Args:
        pen: where to draw.
        subject: what is drawn.
        rng: jitter of colours and shapes.
    """

    def __init__(self, pen: Pen, subject: Subject, rng: np.random.Generator) -> None:
        self.pen = pen
        self.subject = subject
        self.rng = rng
        jitter = rng.normal(0, 1, 4).tolist()
        color = subject.species.color
        red, green, blue = (
            value * (1 + 0.09 * jitter[0]) + 13 * jitter[channel + 1]
            for channel, value in enumerate(color)
        )
        self.color: Rgb = (
            int(min(255, max(0, red))),
            int(min(255, max(0, green))),
            int(min(255, max(0, blue))),
        )
        # A marking is faint in some individuals, as in nature.
        faint = 0.1 + 0.55 * float(rng.random())
        self.mark = shift(subject.species.mark_color, 1 + 0.06 * jitter[1], self.color, faint)
        self.marking = MARKINGS[subject.species.marking][0]
        self.width = {"slender": 0.68, "broad": 1.35}.get(self.marking, 1.0)

    def parts(
        self, kind: str, places: list[tuple[complex, complex]], width: float, marked: bool = True
    ) -> None:
        """Draws parts one over the other, with the species' marking.

        Args:
            kind: key of `PROFILES`.
            places: (a, b) of each part.
            width: width over length.
            marked: whether the marking is drawn.
        """
        squeeze = width * self.width * 2
        outline = stretch(PROFILES[kind], squeeze)
        inner = 0.1 + 0.78 * outline.real + 0.68j * outline.imag
        overlays = MARKING_SHAPES[kind].get(self.marking, []) if marked else []
        overlays = [stretch(shape, squeeze) for shape in overlays]
        edged = marked and self.marking == "edged"
        for number, (a, b) in enumerate(places):
            tone = (1.0, 0.9, 0.95)[number % 3]
            body = shift(self.color, tone)
            self.pen.fill(b + a * outline, self.mark if edged else shift(body, 0.72))
            if edged:
                self.pen.fill(b + a * (0.04 + 0.84 * outline.real + 0.7j * outline.imag), body)
            else:
                shrunk = 0.02 + 0.94 * outline.real + 0.86j * outline.imag
                self.pen.fill(b + a * shrunk, body)
                self.pen.fill(b + a * inner, shift(body, 1.06, share=0.1))
            for overlay in overlays:
                self.pen.fill(b + a * overlay, self.mark)


GREEN: Rgb = (70, 124, 48)
BARK: Rgb = (96, 70, 44)


def _stem(pen: Pen, rng: np.random.Generator, color: Rgb, length: float = 2.6) -> None:
    bend = float(rng.normal(0, 0.25))
    t = np.linspace(0, 1, 6)
    pen.line(bend * t**2 + 1j * length * t, shift(color, 0.75), 0.15)
    pen.line(bend * t**2 - 0.02 + 1j * length * t, color, 0.09)
    leaf = stretch(PROFILES["pointed"], 0.7)
    for side in (1, -1):
        if rng.random() < 0.7:
            at = bend * 0.3 + 1j * (0.9 + 0.5 * rng.random())
            direction = 0.85 * complex(side * 0.85, -0.35 - 0.3 * rng.random())
            pen.fill(at + direction * leaf, shift(color, 0.85))
            pen.fill(at + direction * stretch(leaf, 0.5), shift(color, 1.12))


def draw_open_flower(painter: Painter) -> None:
    """Daisies (one ring of narrow petals, large disk) and roses (rings of broad petals)."""
    species, pen, rng = painter.subject.species, painter.pen, painter.rng
    upright = Pen(pen.draw, pen.center, pen.scale, painter.subject.angle * 0.3)
    _stem(upright, rng, GREEN)
    daisy = species.noun == "daisy"
    turn = 2 * math.pi * float(rng.random())
    if painter.subject.mode == 1:
        painter.pen = upright
        count = 5 + species.parts
        length = 1.05 if daisy else 0.95
        places = fan(count, -math.pi / 2 - 0.62, -math.pi / 2 + 0.62, length, 0.5j)
        places = [
            (a * (1 - 0.1 * abs(k - count / 2) / count), b) for k, (a, b) in enumerate(places)
        ]
        painter.parts("pointed" if daisy else "round", places[::2] + places[1::2],
                      0.3 if daisy else 0.55)  # fmt: skip
        calyx = stretch(PROFILES["bud"], 1.5)
        upright.fill(0.75j - 0.62j * calyx * (1 + 0j), shift(GREEN, 0.9))
        for side in (-0.45, 0.45):
            upright.fill(0.7j + 0.62 * complex(math.sin(side), -math.cos(side)) *
                         stretch(PROFILES["pointed"], 0.5), shift(GREEN, 1.1))  # fmt: skip
        return
    if daisy:
        count = 8 + 3 * species.parts
        painter.parts("pointed", fan(count, turn, turn + 2 * math.pi, 1.0), 2.6 / count)
        pen.disk(0j, 0.3, (150, 96, 22))
        pen.disk(-0.03 - 0.04j, 0.25, (240, 186, 46))
        for dot in (0.1 + 0.05j, -0.1 + 0.08j, 0.02 - 0.12j):
            pen.disk(dot, 0.05, (206, 140, 30))
        return
    count = 5 + species.parts
    for ring, (length, offset) in enumerate(((1.0, 0.0), (0.7, 0.5), (0.42, 0.2))):
        start = turn + offset * 2 * math.pi / count
        places = fan(count - (ring == 2), start, start + 2 * math.pi, length)
        painter.parts("round", places, 3.6 / count, marked=ring < 2)
    pen.disk(0j, 0.12, shift(painter.color, 0.6))


def draw_flower_spike(painter: Painter) -> None:
    """Bells (hanging along an arched stem) and torches (a dense upright spike)."""
    species, pen, rng = painter.subject.species, painter.pen, painter.rng
    lift = -0.55j if species.noun == "bell" else -0.1j
    upright = Pen(pen.draw, pen.center + lift * pen.scale, pen.scale * 1.2,
                  painter.subject.angle * 0.5)  # fmt: skip
    painter.pen = upright
    buds = painter.subject.mode == 1
    side = 1 if rng.random() < 0.5 else -1
    bell = species.noun == "bell"
    count = (5 if bell else 9) + 2 * species.parts
    t = np.linspace(0, 1, 12)
    if bell:
        stem = side * (0.75 * t**2.2 - 0.25) + 1j * (2.4 - 3.4 * t + 0.75 * t**4)
    else:
        stem = side * 0.12 * t**2 + 1j * (2.4 - 3.4 * t)
    upright.line(stem, shift(GREEN, 0.78), 0.13)
    upright.line(stem - 0.02, GREEN, 0.07)
    leaf = stretch(PROFILES["pointed"], 0.5)
    for turn in (-0.9, 0.9):
        upright.fill(stem[2] + 1.2 * complex(math.sin(turn), -math.cos(turn)) * leaf,
                     shift(GREEN, 0.9 if turn < 0 else 1.1))  # fmt: skip
    first = 4 if bell else 3
    along = np.linspace(first, 11, count)
    places = []
    for number, position in enumerate(along):
        at = complex(np.interp(position, np.arange(12), stem.real),
                     np.interp(position, np.arange(12), stem.imag))  # fmt: skip
        closed = buds and number >= count * 0.35
        if bell:
            out = 0.28 * (-1 if number % 2 else 1) * (1 - 0.5 * number / count)
            upright.line(np.asarray([at, at + out + 0.1j]), GREEN, 0.05)
            length = (0.68 - 0.2 * number / count) * (0.5 if closed else 1.0)
            direction = length * complex(0.25 * out, 1.0)
            places.append((direction, at + out + 0.08j))
        else:
            spread = (0.9 if number % 2 else -0.9) * (1 - 0.55 * number / count)
            length = (0.62 - 0.22 * number / count) * (0.5 if closed else 1.0)
            places.append((length * complex(math.sin(spread), -math.cos(spread)), at))
    opened = count if not buds else math.ceil(count * 0.35)
    painter.parts("bell" if bell else "pointed", places[:opened], 0.5 if bell else 0.42)
    for a, b in places[opened:]:
        upright.fill(b + a * stretch(PROFILES["bud"], 1.1), shift(GREEN, 1.15))
        upright.fill(b + a * (0.45 + 0.5 * stretch(PROFILES["bud"], 0.8)), painter.color)


def draw_mushroom(painter: Painter) -> None:
    """Caps (a dome on a stem) and cups (a funnel that opens upwards)."""
    species, pen = painter.subject.species, painter.pen
    segments = 6 + species.parts
    cap = species.noun == "cap"
    flesh: Rgb = (226, 212, 186)
    if painter.subject.mode == 1:
        _mushroom_from_above(painter, segments, cap)
        return
    upright = Pen(pen.draw, pen.center, pen.scale, painter.subject.angle * 0.4)
    painter.pen = upright
    broad = painter.width
    if cap:
        stem = np.asarray([-0.2 + 0.1j, 0.2 + 0.1j, 0.3 + 1.7j, -0.3 + 1.7j])
        upright.fill(stem, shift(flesh, 0.8))
        upright.fill(stem * 0.8 + 0.3j - 0.05, flesh)
        skirt = 0.55j + 0.42 * (CIRCLE.real + 0.3j * CIRCLE.imag)
        upright.fill(skirt, shift(flesh, 0.93))
        rim = 1.05 * (0.75 + 0.25 * broad)
        gills = 0.12j + rim * (CIRCLE.real + 0.24j * CIRCLE.imag)
        upright.fill(gills, shift(flesh, 0.66))
        arc = np.exp(1j * np.linspace(math.pi, 2 * math.pi, 14))
        height = 0.95 / (0.6 + 0.4 * broad)
        dome = 0.12j + rim * arc.real + 1j * height * arc.imag
        lower = 0.12j + rim * arc.real[::-1] - 0.1j * arc.imag[::-1]
        upright.fill(np.concatenate([dome, lower]), shift(painter.color, 0.8))
        upright.fill(np.concatenate([dome, lower]) * 0.93 - 0.02j, painter.color)
        apex = 0.12j - 1j * height * 0.97
        band = _BANDS.get(painter.marking)
        if band is not None:
            across = np.linspace(-1, 1, 14)
            bow = np.sqrt(1 - across**2)
            edges = [0.12 + bow * (0.1 * (1 - v) - height * v) for v in band]
            upright.fill(_strip(rim * across, edges[0], edges[1]) * 0.96, painter.mark)
        ends = [0.2j + rim * 0.86 * x - 0.05j * (1 - abs(x)) for x in (-1.0, -0.52, 0.0, 0.52, 1.0)]
        _overlay(painter, "fan", [(end - apex, apex) for end in ends], 0.5)
        shine = -0.3 * rim - 0.5j * height + 0.16 * (CIRCLE.real + 0.6j * CIRCLE.imag)
        upright.fill(shine, shift(painter.color, 1.1, share=0.35))
        return
    base = 1.5j
    top = -0.45 + 0.0j
    rim = 0.9 * (0.75 + 0.25 * broad)
    t = np.linspace(0, 1, 8)
    half = 0.16 + (rim - 0.16) * t**2.4
    wall = np.concatenate([half, -half[::-1]]) + 1j * (
        1.5 + (top.real - 1.5) * np.concatenate([t, t[::-1]])
    )
    upright.fill(wall, shift(painter.color, 0.78))
    upright.fill(wall * 0.9 + 0.12j, painter.color)
    hub = base * 0.35
    band = _BANDS.get(painter.marking)
    if band is not None:
        down = 1 - np.linspace(*band, 5)
        half = (0.16 + (rim - 0.16) * down**2.4) * 0.97
        ring = np.concatenate([half, -half[::-1]]) + 1j * (
            1.5 + (top.real - 1.5) * np.concatenate([down, down[::-1]])
        )
        upright.fill(ring, painter.mark)
    ends = [
        rim * 0.9 * x + 1j * (top.real + 0.16 * (1 - abs(x))) for x in (-1.0, -0.5, 0.0, 0.5, 1.0)
    ]
    _overlay(painter, "fan", [(end - hub, hub) for end in ends], 0.5)
    mouth = 1j * top.real + rim * (CIRCLE.real + 0.3j * CIRCLE.imag)
    upright.fill(mouth, shift(painter.color, 1.08, share=0.12))
    upright.fill(mouth * 0.8 + 0.2j * top.real, shift(painter.color, 0.5))


def _mushroom_from_above(painter: Painter, segments: int, cap: bool) -> None:
    pen, color, turn = painter.pen, painter.color, 2 * math.pi * float(painter.rng.random())
    pen.disk(0.1 + 0.14j, 1.03, (40, 38, 28))
    edged = painter.marking == "edged"
    pen.disk(0j, 1.0, painter.mark if edged else shift(color, 0.7))
    pen.disk(0j, 0.82 if edged else 0.93, color)
    pen.disk(-0.12 - 0.14j, 0.62, shift(color, 1.05, share=0.08))
    around = fan(segments, turn, turn + 2 * math.pi, 0.95)
    for a, _ in around:
        pen.line(np.asarray([0.5 * a, a]), shift(color, 0.82), 0.04)
    if not edged:
        _overlay(painter, "fan", around, math.tan(math.pi / segments))
    boss = painter.width**2.2
    if cap:
        pen.disk(0j, 0.2 * boss, shift(color, 0.85))
        pen.disk(-0.02 - 0.03j, 0.15 * boss, shift(color, 1.1, share=0.25))
        return
    pen.disk(0j, 0.4 * boss**0.6, shift(color, 0.6))
    pen.disk(0.03 + 0.05j, 0.3 * boss**0.6, shift(color, 0.36))


_BANDS = {"edged": (0.0, 0.2), "tipped": (0.0, 0.38), "ringed": (0.34, 0.56)}
"""Where a marking runs around a mushroom, 0 = rim, 1 = middle."""


def _strip(x: Points, first: Points, second: Points) -> Points:
    """The area between two curves over the same x."""
    return np.asarray(np.concatenate([x + 1j * first, (x + 1j * second)[::-1]]))


def _overlay(
    painter: Painter, kind: str, places: list[tuple[complex, complex]], width: float
) -> None:
    """Spots or stripes alone, for bodies drawn in one piece."""
    shapes = MARKING_SHAPES[kind].get(painter.marking, [])
    if painter.marking in _BANDS and painter.subject.mode == 0:
        return
    for a, b in places:
        for shape in shapes:
            painter.pen.fill(b + a * stretch(shape, 2 * width), painter.mark)


def draw_butterfly(painter: Painter) -> None:
    """Wings (rounded) and tails (pointed, with tails on the hind wings)."""
    species, pen, rng = painter.subject.species, painter.pen, painter.rng
    tails = species.noun == "tail"
    dark: Rgb = (40, 32, 30)
    kind = "kite" if tails else "wing"
    width = 0.62 if tails else 0.85
    if painter.subject.mode == 1:
        upright = Pen(pen.draw, pen.center + 0.3j * pen.scale, pen.scale * 1.05,
                      painter.subject.angle)  # fmt: skip
        painter.pen = upright
        side = 1 if rng.random() < 0.5 else -1
        t = np.linspace(-1, 1, 5)
        upright.line(1.4 * t + 1j * (0.62 + 0.1 * t**2), BARK, 0.14)
        painter.color = shift(painter.color, 0.85, (150, 130, 100), 0.25)
        fore = 1.35 * complex(side * 0.35, -1.0)
        hind = 1.05 * complex(side * 0.9, -0.55)
        if tails:
            upright.fill(0.3j + 0.6 * hind + 1.05 * hind * complex(0.9, 0.42 * side) * TAIL,
                         shift(painter.color, 0.66))  # fmt: skip
        painter.parts(kind, [(hind, 0.3j), (fore, 0.3j)], width)
        body = np.asarray([-0.5 * side + 0.2j, 0.55 * side + 0.45j])
        upright.line(body, dark, 0.16)
        for rise in (-0.5, -0.3):
            upright.line(np.asarray([body[0], body[0] - 0.4 * side + 1j * rise]), dark, 0.04)
        return
    pen.tilt = 0.75 + 0.25 * pen.tilt
    spread = 0.9 + 0.25 * float(rng.random())
    fore = 1.22 * complex(math.sin(spread), -math.cos(spread))
    hind = 0.92 * complex(math.sin(spread + 1.1), -math.cos(spread + 1.1))
    for mirror in (1, -1):
        flipped = [complex(mirror * a.real, a.imag) for a in (hind, fore)]
        if tails:
            lean = complex(0.92, 0.38 * mirror)
            pen.fill(0.6 * flipped[0] + 1.15 * flipped[0] * lean * TAIL,
                     shift(painter.color, 0.66))  # fmt: skip
        painter.parts(kind, [(flipped[0], 0.1j), (flipped[1], -0.1j)], width)
    if species.parts:
        for mirror in (1, -1):
            eye = complex(mirror * hind.real, hind.imag) * 0.62 + 0.1j
            pen.disk(eye, 0.13, dark)
            if species.parts > 1:
                pen.disk(eye, 0.07, painter.mark)
    body = stretch(PROFILES["bud"], 0.42)
    pen.fill(-0.45j + 1.15j * body, dark)
    for mirror in (1, -1):
        pen.line(np.asarray([-0.4j, mirror * 0.3 - 0.85j]), dark, 0.045)
        pen.disk(mirror * 0.3 - 0.85j, 0.05, dark)


SUBJECTS = {
    "open flowers": draw_open_flower,
    "flower spikes": draw_flower_spike,
    "mushrooms": draw_mushroom,
    "butterflies": draw_butterfly,
}
"""How the members of an order are drawn."""


def draw_subject(
    draw: ImageDraw.ImageDraw, subject: Subject, side: int, rng: np.random.Generator
) -> None:
    """Draws a subject on a square canvas of `side` pixels."""
    pen = Pen(draw, side * complex(subject.x, subject.y), side * subject.size, subject.angle,
              subject.tilt)  # fmt: skip
    SUBJECTS[FAMILIES[subject.species.family][0]](Painter(pen, subject, rng))
