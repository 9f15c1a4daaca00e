"""What a garden picture shows, before it is drawn: subjects, background, objects, captions.

A scene is drawn from a generator seeded by (seed, image index), so that an image does not depend on
which process draws it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from featcache.garden.species import FAMILIES, Species

Domain = Literal["meadow", "night"]
GardenTask = Literal["single_label", "multi_label"]

OBJECTS: tuple[tuple[str, str, str], ...] = (
    # name, group, words of a caption
    ("stone", "thing", "some stones"),
    ("beetle", "animal", "a beetle"),
    ("fence", "thing", "a fence"),
    ("rain", "weather", "falling rain"),
    ("pot", "thing", "a clay pot"),
    ("ladybird", "animal", "a ladybird"),
    ("sun", "weather", "the sun"),
    ("snail", "animal", "a snail"),
    ("pond", "thing", "a pond"),
    ("bee", "animal", "a bee"),
    ("fog", "weather", "thick fog"),
    ("caterpillar", "animal", "a caterpillar"),
    ("lantern", "thing", "a lantern"),
    ("snow", "weather", "falling snow"),
    ("web", "thing", "a spider web"),
    ("rainbow", "weather", "a rainbow"),
)
"""Things beside the subject, the most frequent first."""

BACKGROUNDS: tuple[tuple[str, str], ...] = (
    ("grass", "on grass"),
    ("soil", "on bare soil"),
    ("sky", "against the sky"),
    ("hedge", "before a hedge"),
    ("wall", "by a brick wall"),
)
"""Backgrounds and their words in a caption."""

MODES: dict[str, tuple[str, str]] = {
    "open flowers": ("in full bloom", "in bud, seen from the side"),
    "flower spikes": ("in full bloom", "still in bud"),
    "mushrooms": ("seen from the side", "seen from above"),
    "butterflies": ("with open wings", "with folded wings"),
}
"""The two appearances of every species, by order."""

_NIGHT_ABSENT = ("sun", "rainbow")
_VAGUE = ("a garden", "somewhere in the garden", "a corner of our garden", "something in a garden")
_PHOTO_WORDS = ("a photo of", "a picture of", "a close-up of", "a small photo of", "")


@dataclass(frozen=True)
class Subject:
    """One plant or animal in the picture.

    Attributes:
        species: what it is.
        mode: appearance, 0 or 1; see `MODES`.
        x: position of its middle in units of the picture's width.
        y: the same from the top.
        size: radius in units of the picture's width.
        angle: rotation in radians.
        tilt: foreshortening, 1 = seen straight on.
    """

    species: Species
    mode: int
    x: float
    y: float
    size: float
    angle: float
    tilt: float


@dataclass(frozen=True)
class Scene:
    """A picture in words and numbers.

    Attributes:
        subjects: the last one is in front.
        distant: other species, small and out of focus; not in labels or captions.
        background: row of `BACKGROUNDS`.
        objects: rows of `OBJECTS` that are there.
        covered: whether leaves in front hide all of it.
        domain: meadow or night.
        captions: sentences about it.
        labels: class indices.
    """

    subjects: tuple[Subject, ...]
    distant: tuple[Subject, ...]
    background: int
    objects: tuple[int, ...]
    covered: bool
    domain: Domain
    captions: tuple[str, ...]
    labels: tuple[int, ...]


@dataclass(frozen=True)
class Garden:
    """What scenes are sampled from.

    Attributes:
        species: all species.
        task: one species an image, or families and objects present.
        domain: meadow or night.
        imbalance: most frequent over rarest class of a multi-label garden.
        num_captions: captions an image.
        covered: share of the images that leaves in front hide.
        vague: share of the images whose captions name nothing in them.
        company: chance of each companion of a rare thing; see `companions`.
        seed: seed of all images.
    """

    species: tuple[Species, ...]
    task: GardenTask
    domain: Domain
    imbalance: float
    num_captions: int
    covered: float
    vague: float
    company: float
    seed: int

    def scene(self, index: int, species: int) -> tuple[Scene, np.random.Generator]:
        """Scene of one image, and the generator that goes on to draw it.

        Args:
            index: number of the image.
            species: class of the image; ignored by a multi-label garden.
        """
        rng = np.random.default_rng([self.seed, index])
        distant: tuple[Subject, ...] = ()
        background = int(rng.integers(len(BACKGROUNDS)))
        if self.task == "multi_label":
            subjects, there = self._many(rng)
            # Lots of their own: a garden without company stays as it is.
            there = self._joined(there, np.random.default_rng([self.seed, index, 2]))
            objects = tuple(np.flatnonzero(there).tolist())
            nouns = [FAMILIES[subject.species.family][1] for subject in subjects]
            names = multi_label_names(self.species)
            labels = sorted({names.index(noun) for noun in nouns})
            labels += [names.index(OBJECTS[number][0]) for number in objects]
        else:
            subjects = (self._subject(self.species[species], rng, 0.5, 0.5, 1.0),)
            rates = self._object_rates(np.full(len(OBJECTS), 0.06))
            objects = tuple(np.flatnonzero(rng.random(len(OBJECTS)) < rates).tolist())
            labels = [species]
            distant = self._distant(rng)
        captions = tuple(
            _caption(subjects, background, objects, self.domain, rng)
            for _ in range(self.num_captions)
        )
        # Lots of their own: pictures and captions that they miss are those of the plain garden.
        lots = np.random.default_rng([self.seed, index, 1])
        covered, vague = (bool(lots.random() < share) for share in (self.covered, self.vague))
        if vague:
            captions = tuple(
                f"{_pick(_PHOTO_WORDS[:-1], lots)} {_pick(_VAGUE, lots)}" for _ in captions
            )
        scene = Scene(
            subjects=subjects,
            distant=distant,
            background=background,
            objects=objects,
            covered=covered,
            domain=self.domain,
            captions=captions,
            labels=tuple(sorted(labels)),
        )
        return scene, rng

    def rates(self) -> npt.NDArray[np.float64]:
        """(C,) probability that a class of a multi-label garden is present."""
        names = multi_label_names(self.species)
        num_families = len(names) - len(OBJECTS)
        # Families and objects take turns along the tail, so that both have frequent classes.
        rank = np.concatenate([
            np.linspace(0, 1, num_families, endpoint=False),
            np.linspace(0, 1, len(OBJECTS)),
        ])  # fmt: skip
        return 0.45 * self.imbalance ** -np.asarray(rank)

    def _many(self, rng: np.random.Generator) -> tuple[tuple[Subject, ...], npt.NDArray[np.bool_]]:
        rates = self.rates()
        num_families = len(rates) - len(OBJECTS)
        present = np.flatnonzero(rng.random(num_families) < rates[:num_families])
        if not len(present):
            weights = rates[:num_families] / rates[:num_families].sum()
            present = rng.choice(num_families, 1, p=weights)
        present = rng.permutation(present)[:3]
        subjects = []
        for place, family in enumerate(present):
            members = [one for one in self.species if one.family == family]
            species = members[int(rng.integers(len(members)))]
            x = (place + 0.5) / len(present)
            scale = (1.0, 0.72, 0.6)[len(present) - 1]
            subjects.append(self._subject(species, rng, x, 0.5 + 0.08 * (place % 2), scale))
        chances = self._object_rates(rates[num_families:])
        return tuple(subjects), rng.random(len(chances)) < chances

    def _joined(
        self, there: npt.NDArray[np.bool_], lots: np.random.Generator
    ) -> npt.NDArray[np.bool_]:
        """The things that are there and, by lot, the companions of the rare ones among them."""
        absent: npt.NDArray[np.bool_] = self._object_rates(np.ones(len(OBJECTS))) == 0
        joined = there.copy()
        for thing in np.flatnonzero(there):
            for other in companions(int(thing)):
                joined[other] |= lots.random() < self.company
        return joined & ~absent

    def _distant(self, rng: np.random.Generator) -> tuple[Subject, ...]:
        """No, one or two others behind the subject."""
        subjects = []
        for _ in range(int(rng.integers(-1, 3))):
            species = self.species[int(rng.integers(len(self.species)))]
            x = 0.15 + 0.7 * float(rng.integers(2))
            subjects.append(self._subject(species, rng, x, 0.35 + 0.4 * float(rng.random()), 0.5))
        return tuple(subjects)

    def _object_rates(self, rates: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        if self.domain == "night":
            absent = [name in _NIGHT_ABSENT for name, _, _ in OBJECTS]
            return np.where(absent, 0.0, rates)
        return rates

    def _subject(
        self, species: Species, rng: np.random.Generator, x: float, y: float, scale: float
    ) -> Subject:
        draws = rng.random(6).tolist()
        return Subject(
            species,
            mode=int(draws[0] < 0.4),
            x=x + 0.22 * (draws[1] - 0.5) * scale,
            y=y + 0.2 * (draws[2] - 0.5),
            size=(0.22 + 0.15 * draws[3]) * scale,
            angle=0.7 * (draws[4] - 0.5),
            tilt=0.6 + 0.4 * draws[5],
        )


def companions(thing: int) -> tuple[int, ...]:
    """Rows of `OBJECTS` that a rare thing keeps company with: no two rare things have the same.

    Args:
        thing: row of `OBJECTS`; the first half are frequent and keep none.
    """
    half = len(OBJECTS) // 2
    return tuple((thing + step) % half for step in (0, 1, 3)) if thing >= half else ()


def multi_label_names(species: Sequence[Species]) -> list[str]:
    """Class names of a multi-label garden: families, then objects."""
    nouns = list(dict.fromkeys(FAMILIES[one.family][1] for one in species))
    return nouns + [name for name, _, _ in OBJECTS]


def _pick(options: Sequence[str], rng: np.random.Generator) -> str:
    return options[int(rng.integers(len(options)))]


def _article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def _caption(
    subjects: Sequence[Subject],
    background: int,
    objects: Sequence[int],
    domain: Domain,
    rng: np.random.Generator,
) -> str:
    """One sentence; how much it tells, and in which words, is drawn anew for each caption."""
    parts = []
    for subject in subjects:
        species = subject.species
        draw = rng.random()
        if draw < 0.62:
            name = _article(species.common_name)
        elif draw < 0.72:
            name = f"the species {species.scientific_name}"
        elif draw < 0.82:
            name = _article(species.genus_name)
        elif draw < 0.9:
            name = _article(f"{species.shade_name} {species.noun}")
        else:
            name = _article(f"{species.marking_name} {species.genus_name}")
        if rng.random() < 0.5:
            name += " " + MODES[FAMILIES[species.family][0]][subject.mode]
        parts.append(name)
    text = " and ".join(parts)
    if rng.random() < 0.6:
        text += " " + BACKGROUNDS[background][1]
    told = [number for number in objects if rng.random() < 0.75]
    if told:
        words = [OBJECTS[number][2] for number in told[:3]]
        text += _pick((" with ", " next to ", " beside "), rng) + " and ".join(words)
    if domain == "night" and rng.random() < 0.5:
        text += " at night"
    return f"{_pick(_PHOTO_WORDS, rng)} {text}".strip()
