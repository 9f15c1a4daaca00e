"""Draws garden scenes and writes them as JPEG; one of the processes a garden is drawn by.

    python -m featcache.garden.worker JOB.json FIRST STEP

draws every STEP-th image of the job from FIRST on, and prints a line for each 20 images.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFilter

from featcache.garden.art import draw_subject
from featcache.garden.scene import OBJECTS, Garden
from featcache.garden.setting import (
    draw_background,
    draw_blades,
    draw_leaves,
    draw_objects,
    light,
)
from featcache.garden.species import make_species

ART = 1
"""Version of the drawings; a change that moves any pixel raises it."""

SUPERSAMPLE = 3
"""Shapes are drawn this many times larger, then averaged."""

PROGRESS_EVERY = 20
"""Images for each line of progress."""


def draw_image(garden: Garden, index: int, species: int, size: int) -> Image.Image:
    """(size, size) RGB picture number `index`; the same in every process.

    Args:
        garden: what scenes are sampled from.
        index: number of the image.
        species: class of the image; ignored by a multi-label garden.
        size: height and width in pixels.
    """
    scene, rng = garden.scene(index, species)
    objects = [OBJECTS[number][0] for number in scene.objects]
    behind = draw_background(scene.background, objects, scene.domain, size, rng)
    for subject in scene.distant:
        draw_subject(ImageDraw.Draw(behind), subject, size, rng)
    behind = behind.filter(ImageFilter.GaussianBlur(size / 80))
    side = size * SUPERSAMPLE
    canvas = behind.resize((side, side), Image.Resampling.BILINEAR)
    draw = ImageDraw.Draw(canvas)
    for subject in scene.subjects:
        draw_subject(draw, subject, side, rng)
    draw_objects(draw, objects, side, rng)
    dim = 0.4 if scene.domain == "night" else 1.0
    draw_blades(draw, side, dim, rng)
    if scene.covered:
        draw_leaves(draw, side, dim, rng)
    image = canvas.reduce(SUPERSAMPLE)
    if scene.domain == "night":
        image = image.filter(ImageFilter.GaussianBlur(size / 80))
    return light(image, objects, scene.domain, rng)


def make_garden(options: dict[str, Any]) -> Garden:
    """The garden that a dataset's options describe."""
    return Garden(
        species=tuple(make_species(options["num_species"])),
        task=options["task"],
        domain=options["domain"],
        imbalance=options["imbalance"],
        num_captions=options["num_captions"],
        covered=options["covered"],
        vague=options["vague"],
        company=options["company"],
        seed=options["seed"],
    )


def image_path(index: int) -> str:
    """Path of an image below the garden's folder, a thousand a directory."""
    return f"images/{index // 1000:03d}/{index:06d}.jpg"


def draw_rows(job: dict[str, Any], folder: Path, first: int, step: int) -> Iterator[int]:
    """Draws the job's images first, first + step, …; yields how many more are done.

    Args:
        job: "options" of the dataset and "species" of each image.
        folder: where to write; the directories of `image_path` exist.
        first: first image.
        step: distance to the next one.
    """
    garden = make_garden(job["options"])
    size, quality = job["options"]["image_size"], job["options"]["quality"]
    since = 0
    for index in range(first, len(job["species"]), step):
        image = draw_image(garden, index, job["species"][index], size)
        image.save(folder / image_path(index), quality=quality, subsampling=0)
        since += 1
        if since == PROGRESS_EVERY:
            yield since
            since = 0
    yield since


def main(arguments: list[str]) -> None:
    """Runs a job file's share."""
    file = Path(arguments[0])
    job = json.loads(file.read_text(encoding="utf-8"))
    for done in draw_rows(job, file.parent, int(arguments[1]), int(arguments[2])):
        print(done, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
