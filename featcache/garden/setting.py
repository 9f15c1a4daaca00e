"""What surrounds a garden's subjects: backgrounds, objects, weather and light."""

import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

from featcache.garden.art import GREEN
from featcache.garden.pen import CIRCLE, PROFILES, Pen, shift, stretch
from featcache.garden.scene import BACKGROUNDS, Domain
from featcache.garden.species import PALETTES, Rgb

_COLORS: dict[str, tuple[Rgb, Rgb]] = {
    # top and bottom of the gradient
    "grass": ((126, 168, 92), (62, 108, 40)),
    "soil": ((150, 124, 92), (92, 66, 44)),
    "sky": ((118, 170, 226), (206, 226, 240)),
    "hedge": ((58, 96, 50), (34, 64, 34)),
    "wall": ((176, 116, 92), (140, 86, 68)),
}
_NIGHT: dict[str, tuple[Rgb, Rgb]] = {
    "grass": ((26, 40, 62), (14, 34, 34)),
    "soil": ((40, 36, 52), (28, 22, 30)),
    "sky": ((16, 20, 58), (54, 50, 96)),
    "hedge": ((14, 28, 36), (8, 18, 22)),
    "wall": ((58, 44, 60), (38, 28, 40)),
}
_BLOSSOMS = tuple(shade for _, shades, _ in PALETTES.values() for _, shade in shades)


def draw_background(
    background: int, objects: list[str], domain: Domain, size: int, rng: np.random.Generator
) -> Image.Image:
    """(size, size) picture of everything behind the subject."""
    name = BACKGROUNDS[background][0]
    top, bottom = (_NIGHT if domain == "night" else _COLORS)[name]
    grid = np.linspace(top, bottom, 5)[:, None, :] + rng.normal(0, 14, (5, 5, 3))
    grid += rng.normal(0, 10, 3)
    image = Image.fromarray(np.clip(grid, 0, 255).astype(np.uint8)).resize(
        (size, size), Image.Resampling.BICUBIC
    )
    draw = ImageDraw.Draw(image)
    dim = 0.4 if domain == "night" else 1.0
    if name == "wall":
        _bricks(draw, size, shift(bottom, 0.75), rng)
    if name in ("grass", "hedge"):
        _tufts(draw, size, shift(bottom, 1.25), rng, 34, name == "hedge")
    if name == "soil":
        _crumbs(draw, size, bottom, rng)
    if name == "sky":
        _hill(draw, size, shift((104, 146, 84), dim), rng)
    for what in ("pond", "fence", "rainbow"):
        if what in objects:
            BEHIND[what](draw, size, dim, rng)
    _far_blossoms(draw, size, dim, rng)
    return image


def _bricks(draw: ImageDraw.ImageDraw, size: int, color: Rgb, rng: np.random.Generator) -> None:
    rows = 7
    shift_by = float(rng.random())
    for row in range(rows + 1):
        y = (row + shift_by - 1) * size / rows
        draw.line((0, y, size, y), fill=color, width=max(1, size // 60))
        for column in range(5):
            x = (column + 0.5 * (row % 2) + shift_by - 1) * size / 4
            draw.line((x, y, x, y + size / rows), fill=color, width=max(1, size // 60))


def _tufts(
    draw: ImageDraw.ImageDraw,
    size: int,
    color: Rgb,
    rng: np.random.Generator,
    count: int,
    leaves: bool,
) -> None:
    draws = rng.random((count, 5)).tolist()
    for x, y, lean, tall, tone in draws:
        fill = shift(color, 0.55 + 0.8 * tone)
        x, y = x * size, y * size
        if leaves:
            r = size * (0.02 + 0.05 * tall)
            draw.ellipse((x - r, y - 0.7 * r, x + r, y + 0.7 * r), fill=fill)
        else:
            y = size * (0.35 + 0.75 * y / size)
            h, w = size * (0.12 + 0.2 * tall), size * 0.018
            draw.polygon((x - w, y, x + w, y, x + (lean - 0.5) * h, y - h), fill=fill)


def _crumbs(draw: ImageDraw.ImageDraw, size: int, color: Rgb, rng: np.random.Generator) -> None:
    for x, y, r, tone in rng.random((26, 4)).tolist():
        r = size * (0.008 + 0.03 * r)
        x, y = x * size, y * size
        draw.ellipse((x - r, y - 0.7 * r, x + r, y + 0.7 * r), fill=shift(color, 0.6 + tone))


def _hill(draw: ImageDraw.ImageDraw, size: int, color: Rgb, rng: np.random.Generator) -> None:
    left, right, middle = (size * (0.68 + 0.22 * value) for value in rng.random(3).tolist())
    draw.polygon((0, left, size / 2, middle, size, right, size, size, 0, size), fill=color)


def _far_blossoms(
    draw: ImageDraw.ImageDraw, size: int, dim: float, rng: np.random.Generator
) -> None:
    """Blurred spots of any species' colour: colour alone does not give the class away."""
    count = int(rng.integers(0, 9))
    for x, y, r, pick in rng.random((count, 4)).tolist():
        color = shift(_BLOSSOMS[int(pick * len(_BLOSSOMS))], 0.85 * dim)
        r = size * (0.02 + 0.05 * r)
        x, y = x * size, y * size
        for turn in range(5):
            angle = 1.257 * turn + 6 * pick
            a, b = x + 0.8 * r * math.cos(angle), y + 0.8 * r * math.sin(angle)
            draw.ellipse((a - 0.7 * r, b - 0.7 * r, a + 0.7 * r, b + 0.7 * r), fill=color)


def _pond(draw: ImageDraw.ImageDraw, size: int, dim: float, rng: np.random.Generator) -> None:
    y = size * (0.66 + 0.1 * float(rng.random()))
    draw.ellipse((-0.2 * size, y, 1.2 * size, 1.5 * size), fill=shift((70, 130, 176), dim))
    for offset in (0.1, 0.2, 0.3):
        line = (0.2 * size, y + offset * size, 0.8 * size, y + offset * size)
        draw.line(line, fill=shift((150, 196, 222), dim), width=max(1, size // 50))


def _fence(draw: ImageDraw.ImageDraw, size: int, dim: float, rng: np.random.Generator) -> None:
    color = shift(((236, 230, 218), (150, 110, 70))[int(rng.integers(2))], dim)
    top = size * (0.2 + 0.2 * float(rng.random()))
    width = size * 0.055
    for bar in (top + 0.12 * size, top + 0.36 * size):
        draw.rectangle((0, bar, size, bar + width * 0.8), fill=shift(color, 0.85))
    start = size * 0.16 * float(rng.random())
    for number in range(7):
        x = start + number * size * 0.16 - 0.05 * size
        draw.polygon(
            (x, top, x + width / 2, top - width, x + width, top, x + width, size * 0.9,
             x, size * 0.9),
            fill=color,
        )  # fmt: skip


def _rainbow(draw: ImageDraw.ImageDraw, size: int, dim: float, rng: np.random.Generator) -> None:
    x, y = size * (0.2 + 0.6 * float(rng.random())), size * 0.95
    colors: tuple[Rgb, ...] = (
        (232, 70, 66), (244, 160, 60), (250, 228, 92), (96, 192, 96), (84, 130, 226),
        (150, 88, 200),
    )  # fmt: skip
    for ring, color in enumerate(colors):
        r = size * (0.85 - 0.035 * ring)
        draw.arc((x - r, y - r, x + r, y + r), 180, 360, fill=color, width=max(1, size // 26))


BEHIND: dict[str, Callable[[ImageDraw.ImageDraw, int, float, np.random.Generator], None]] = {
    "pond": _pond,
    "fence": _fence,
    "rainbow": _rainbow,
}


def draw_objects(
    draw: ImageDraw.ImageDraw, objects: list[str], size: int, rng: np.random.Generator
) -> None:
    """Draws the objects that stand before the subject, and some grass that half hides it."""
    for name in objects:
        if name in BESIDE:
            corner = int(rng.integers(4))
            x = (0.16, 0.84)[corner % 2] + 0.16 * (float(rng.random()) - 0.5)
            y = (0.2, 0.8)[corner // 2] + 0.16 * (float(rng.random()) - 0.5)
            if name in ("stone", "pot", "lantern"):
                y = 0.8 + 0.1 * float(rng.random())
            pen = Pen(draw, complex(x, y) * size, size * (0.075 + 0.03 * float(rng.random())),
                      0.0 if name in ("pot", "lantern") else float(rng.normal(0, 0.4)))  # fmt: skip
            BESIDE[name](pen, rng)


def draw_blades(draw: ImageDraw.ImageDraw, size: int, dim: float, rng: np.random.Generator) -> None:
    """Out-of-focus blades of grass in front: they hide a part of the subject."""
    for x, lean, tall, tone, wide in rng.random((int(rng.integers(0, 7)), 5)).tolist():
        x *= size
        h, w = size * (0.25 + 0.5 * tall**2), size * (0.012 + 0.02 * wide)
        tip = x + (lean - 0.5) * 0.8 * h
        color = shift(GREEN, (0.6 + 0.7 * tone) * dim)
        bend = (x + tip) / 2 - (lean - 0.5) * 0.25 * h
        draw.polygon(
            (x - w, size, x + w, size, bend + w * 0.7, size - h / 2, tip, size - h,
             bend - w * 0.7, size - h / 2),
            fill=color,
        )  # fmt: skip


def draw_leaves(draw: ImageDraw.ImageDraw, size: int, dim: float, rng: np.random.Generator) -> None:
    """Leaves right in front of the camera: they hide the whole picture."""
    draw.rectangle((0, 0, size, size), fill=shift(GREEN, 0.5 * dim))
    across = 6
    for cell in rng.permutation(across * across).tolist():
        place = complex(cell % across, cell // across) + complex(*rng.random(2).tolist())
        turn, tone = (rng.random(2) * (2 * math.pi, 0.8)).tolist()
        pen = Pen(draw, place * size / across, size * 0.3, turn)
        pen.fill(PROFILES["round"] - 0.5, shift(GREEN, (0.6 + tone) * dim))


def _stone(pen: Pen, rng: np.random.Generator) -> None:
    for at, radius, tone in ((-0.9 + 0.2j, 0.8, 0.8), (0.8 + 0.3j, 0.7, 0.95), (0j, 1.0, 1.1)):
        wobble = 1 + 0.12 * rng.normal(size=len(CIRCLE))
        blob = at + radius * wobble * (CIRCLE.real + 0.7j * CIRCLE.imag)
        pen.fill(blob, shift((118, 118, 122), tone))
        pen.fill(at + 0.72 * (blob - at) - 0.08j, shift((146, 146, 148), tone))


def _beetle(pen: Pen, rng: np.random.Generator) -> None:
    dark: Rgb = (28, 26, 34)
    for x in (-0.4, 0.0, 0.4):
        pen.line(np.asarray([x - 0.95j, x + 0.95j]), dark, 0.14)
    pen.fill(1.05 * CIRCLE.real + 0.68j * CIRCLE.imag, dark)
    pen.fill(-0.1 + 0.85 * CIRCLE.real + 0.55j * CIRCLE.imag, (38, 92, 84))
    pen.line(np.asarray([-0.9 + 0j, 0.7 + 0j]), dark, 0.1)
    pen.disk(1.05 + 0j, 0.35, dark)


def _ladybird(pen: Pen, rng: np.random.Generator) -> None:
    dark: Rgb = (30, 22, 22)
    pen.disk(0.72 + 0j, 0.5, dark)
    pen.fill(CIRCLE.real + 0.88j * CIRCLE.imag, (150, 22, 20))
    pen.fill(0.9 * CIRCLE.real + 0.8j * CIRCLE.imag, (222, 40, 32))
    pen.line(np.asarray([-0.95 + 0j, 0.95 + 0j]), dark, 0.12)
    for dot in (-0.45 + 0.4j, -0.45 - 0.4j, 0.3 + 0.45j, 0.3 - 0.45j):
        pen.disk(dot, 0.19, dark)


def _snail(pen: Pen, rng: np.random.Generator) -> None:
    body: Rgb = (196, 168, 120)
    pen.fill(np.asarray([-1.6 + 0.9j, 1.5 + 0.9j, 1.9 + 0.1j, 1.5 - 0.1j, 1.1 + 0.5j]), body)
    pen.line(np.asarray([1.7 + 0j, 2.0 - 0.6j]), body, 0.12)
    pen.disk(0j, 0.95, (120, 78, 44))
    pen.disk(0.04 + 0.03j, 0.7, (186, 130, 76))
    pen.disk(0.08 + 0.06j, 0.42, (120, 78, 44))
    pen.disk(0.1 + 0.08j, 0.2, (186, 130, 76))


def _bee(pen: Pen, rng: np.random.Generator) -> None:
    for turn in (-0.5, 0.4):
        wing = 1.1 * complex(math.sin(turn), -math.cos(turn)) * stretch(PROFILES["round"], 0.9)
        pen.fill(wing, (226, 234, 244))
    pen.fill(1.05 * CIRCLE.real + 0.62j * CIRCLE.imag, (246, 190, 40))
    for x in (-0.5, 0.0, 0.5):
        half = 0.55 - 0.12 * abs(x)
        pen.line(np.asarray([x - 1j * half, x + 1j * half]), (40, 28, 18), 0.26)
    pen.disk(1.0 + 0j, 0.34, (40, 28, 18))


def _caterpillar(pen: Pen, rng: np.random.Generator) -> None:
    for number in range(6):
        at = -1.7 + 0.62 * number + 0.35j * math.sin(1.7 * number)
        pen.disk(at, 0.5, (70, 130, 34))
        pen.disk(at - 0.06j, 0.38, (152, 206, 66))
    pen.disk(1.75 - 0.1j, 0.5, (226, 120, 40))


def _pot(pen: Pen, rng: np.random.Generator) -> None:
    clay: Rgb = (196, 100, 58)
    pen.fill(np.asarray([-1.2 - 0.6j, 1.2 - 0.6j, 0.85 + 1.5j, -0.85 + 1.5j]), shift(clay, 0.85))
    pen.fill(np.asarray([-1.1 - 0.6j, 0.2 - 0.6j, 0.1 + 1.4j, -0.78 + 1.4j]), clay)
    pen.fill(np.asarray([-1.45 - 1.1j, 1.45 - 1.1j, 1.4 - 0.5j, -1.4 - 0.5j]), shift(clay, 1.12))
    pen.fill(-1.1j + 1.25 * CIRCLE.real + 0.25j * CIRCLE.imag, (74, 50, 36))


def _lantern(pen: Pen, rng: np.random.Generator) -> None:
    dark: Rgb = (52, 48, 52)
    pen.fill(np.asarray([-0.9 - 1.2j, 0.9 - 1.2j, 0.45 - 1.9j, -0.45 - 1.9j]), dark)
    pen.fill(np.asarray([-0.8 - 1.2j, 0.8 - 1.2j, 0.7 + 1.1j, -0.7 + 1.1j]), dark)
    pen.fill(np.asarray([-0.6 - 1.05j, 0.6 - 1.05j, 0.52 + 0.95j, -0.52 + 0.95j]), (255, 214, 110))
    pen.disk(0.1j, 0.3, (255, 248, 214))
    pen.fill(np.asarray([-0.95 + 1.1j, 0.95 + 1.1j, 0.95 + 1.4j, -0.95 + 1.4j]), dark)


def _web(pen: Pen, rng: np.random.Generator) -> None:
    thread: Rgb = (228, 232, 236)
    spokes = 2.4 * np.exp(2j * math.pi * np.arange(8) / 8 + 0.2j)
    for spoke in spokes:
        pen.line(np.asarray([0j, spoke]), thread, 0.04)
    for radius in (0.3, 0.55, 0.8, 1.0):
        pen.line(radius * np.append(spokes, spokes[0]), thread, 0.04)


BESIDE: dict[str, Callable[[Pen, np.random.Generator], None]] = {
    "stone": _stone,
    "beetle": _beetle,
    "ladybird": _ladybird,
    "snail": _snail,
    "bee": _bee,
    "caterpillar": _caterpillar,
    "pot": _pot,
    "lantern": _lantern,
    "web": _web,
}


def light(
    image: Image.Image, objects: list[str], domain: Domain, rng: np.random.Generator
) -> Image.Image:
    """The finished picture: direction and colour of the light, weather, grain.

    Args:
        image: (size, size) picture of the scene in even light.
        objects: names of the objects in it; rain, snow, fog and sun are drawn here.
        domain: meadow or night.
        rng: strength and places.
    """
    size = image.width
    if "rain" in objects or "snow" in objects:
        draw = ImageDraw.Draw(image)
        slant = 0.06 * float(rng.normal())
        for x, y, r in rng.random((26, 3)).tolist():
            x, y = x * size, y * size
            if "snow" in objects:
                r = size * (0.008 + 0.014 * r)
                draw.ellipse((x - r, y - r, x + r, y + r), fill=(246, 248, 252))
            if "rain" in objects:
                end = (x + slant * size, y + 0.13 * size)
                draw.line((x, y, *end), fill=(196, 210, 224), width=max(1, size // 64))
    pixels = np.asarray(image, np.float32)
    axis = np.linspace(-1, 1, size, dtype=np.float32)
    draws = rng.normal(0, 1, 7).tolist()
    ramp = 1 + 0.14 * draws[0] * axis[None, :] + 0.1 * draws[1] * axis[:, None]
    tint = np.asarray([1 + 0.08 * draws[2], 1.0, 1 - 0.08 * draws[2]], np.float32)
    gain = math.exp(0.2 * draws[3])
    pixels = pixels * (ramp[:, :, None] * (tint * gain).astype(np.float32))
    if "fog" in objects:
        veil = (0.62 - 0.2 * axis[:, None, None]) * (0.8 + 0.2 * float(rng.random()))
        pixels += veil * (np.float32(214) - pixels)
    if "sun" in objects:
        x, y = -0.75 if draws[4] < 0 else 0.75, -0.75
        distance = np.sqrt((axis[None, :] - x) ** 2 + (axis[:, None] - y) ** 2)
        glow = np.clip(1.25 - 3.2 * distance, 0, 1) + 0.4 * np.exp(-2.2 * distance)
        glow = np.minimum(glow, 1)[:, :, None]
        pixels += glow * (np.asarray([255, 244, 190], np.float32) - pixels)
    sigma = 4.0 + 3.0 * abs(draws[5])
    if domain == "night":
        pixels = pixels * np.asarray([0.5, 0.56, 0.78], np.float32) + np.float32(6)
        if "lantern" in objects:
            pixels *= np.asarray([1.5, 1.3, 1.0], np.float32)
        sigma *= 2.2
    pixels += np.float32(sigma) * rng.standard_normal(pixels.shape, dtype=np.float32)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
