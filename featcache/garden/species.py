"""Species of the drawn garden: a four-level taxonomy in which every level is visible.

Order and family fix the body plan, the genus a palette and the number of parts, the species a
shade and a marking. Neighbouring species of a genus differ in exactly one of the last two, so they
look alike. All names are made of ordinary words: "crimson spotted fire bell".
"""

from dataclasses import dataclass

FAMILIES: tuple[tuple[str, str, str], ...] = (
    # order, noun of the family, Latin stem of the genus
    ("open flowers", "daisy", "aster"),
    ("flower spikes", "bell", "campana"),
    ("mushrooms", "cap", "tegula"),
    ("butterflies", "wing", "alaria"),
    ("open flowers", "rose", "rosina"),
    ("flower spikes", "torch", "faxia"),
    ("mushrooms", "cup", "calix"),
    ("butterflies", "tail", "caudina"),
)
"""Body plans; a garden of fewer families takes the first ones, which have different orders."""

Rgb = tuple[int, int, int]

PALETTES: dict[str, tuple[str, tuple[tuple[str, Rgb], ...], Rgb]] = {
    # word of the genus: Latin prefix, shades, colour of the markings
    "fire": (
        "Igni",
        (
            ("crimson", (196, 24, 44)),
            ("scarlet", (226, 52, 30)),
            ("ruby", (168, 20, 66)),
            ("rust", (186, 66, 26)),
        ),
        (255, 214, 120),
    ),
    "sea": (
        "Mari",
        (
            ("azure", (58, 128, 232)),
            ("teal", (36, 158, 178)),
            ("navy", (48, 74, 176)),
            ("aqua", (88, 190, 206)),
        ),
        (238, 246, 255),
    ),
    "sun": (
        "Soli",
        (
            ("golden", (250, 190, 34)),
            ("amber", (242, 152, 28)),
            ("lemon", (248, 226, 84)),
            ("honey", (222, 170, 66)),
        ),
        (142, 44, 16),
    ),
    "plum": (
        "Pruni",
        (
            ("violet", (134, 68, 208)),
            ("purple", (158, 44, 164)),
            ("lilac", (178, 130, 226)),
            ("indigo", (92, 58, 176)),
        ),
        (255, 228, 150),
    ),
    "moon": (
        "Luni",
        (
            ("ivory", (250, 240, 212)),
            ("silver", (214, 222, 236)),
            ("pearl", (244, 228, 236)),
            ("cream", (250, 226, 168)),
        ),
        (122, 60, 132),
    ),
    "berry": (
        "Bacci",
        (
            ("pink", (246, 128, 172)),
            ("magenta", (220, 46, 134)),
            ("coral", (250, 122, 104)),
            ("peach", (252, 176, 142)),
        ),
        (110, 14, 66),
    ),
}
"""Palettes of the genera."""

MARKINGS: tuple[tuple[str, str], ...] = (
    ("plain", "simplex"),
    ("spotted", "maculata"),
    ("edged", "marginata"),
    ("striped", "lineata"),
    ("slender", "gracilis"),
    ("ringed", "annulata"),
    ("tipped", "apicata"),
    ("broad", "lata"),
)
"""What tells species of a genus apart, and its Latin epithet."""

_SHADES = 4
MAX_SPECIES = len(FAMILIES) * len(PALETTES) * len(MARKINGS) * _SHADES
"""All combinations."""


@dataclass(frozen=True)
class Species:
    """One class of the garden.

    Attributes:
        index: class index.
        family: row of `FAMILIES`.
        palette: key of `PALETTES`.
        shade: row of the palette's shades.
        marking: row of `MARKINGS`.
        parts: added to the family's usual number of petals, blossoms or segments.
    """

    index: int
    family: int
    palette: str
    shade: int
    marking: int
    parts: int

    @property
    def noun(self) -> str:
        """The family's noun: "bell"."""
        return FAMILIES[self.family][1]

    @property
    def genus_name(self) -> str:
        """The genus in ordinary words: "fire bell"."""
        return f"{self.palette} {self.noun}"

    @property
    def common_name(self) -> str:
        """The species in ordinary words: "crimson spotted fire bell"."""
        return f"{self.shade_name} {self.marking_name} {self.genus_name}"

    @property
    def shade_name(self) -> str:
        """Word for the colour."""
        return PALETTES[self.palette][1][self.shade][0]

    @property
    def marking_name(self) -> str:
        """Word for the marking."""
        return MARKINGS[self.marking][0]

    @property
    def genus(self) -> str:
        """Latin name of the genus, the first word of the scientific name."""
        return PALETTES[self.palette][0] + FAMILIES[self.family][2]

    @property
    def scientific_name(self) -> str:
        """Latin name; species of one marking differ in a word for the shade."""
        return f"{self.genus} {MARKINGS[self.marking][1]} {self.shade_name}"

    @property
    def color(self) -> Rgb:
        """Main colour."""
        return PALETTES[self.palette][1][self.shade][1]

    @property
    def mark_color(self) -> Rgb:
        """Colour of the marking."""
        return PALETTES[self.palette][2]

    def row(self) -> dict[str, str]:
        """The species' row in the class table."""
        return {
            "name": self.common_name,
            "common_name": self.common_name,
            "scientific_name": self.scientific_name,
            "genus": self.genus_name,
            "family": self.noun,
            "order": FAMILIES[self.family][0],
        }


def make_species(num_species: int) -> list[Species]:
    """The garden's species, families spread evenly; depends on the number alone.

    Args:
        num_species: C, 2..`MAX_SPECIES`.
    """
    num_families = max(1, min(len(FAMILIES), num_species // 5))
    palettes = list(PALETTES)
    species: list[Species] = []
    for family in range(num_families):
        members = num_species // num_families + (family < num_species % num_families)
        capacity = len(MARKINGS) * _SHADES
        genera = max(1, round(members / 3), -(-members // capacity))
        genera = min(genera, len(palettes))
        for genus in range(genera):
            palette = palettes[(2 * family + genus + family // 3) % len(palettes)]
            count = members // genera + (genus < members % genera)
            for rank in range(count):
                shade, marking = _stairs(rank, start=family + 3 * genus)
                species.append(Species(len(species), family, palette, shade, marking, genus % 3))
    return species


def _stairs(rank: int, start: int) -> tuple[int, int]:
    """(shade, marking) of a genus's species: neighbours differ in one of the two, all differ.

    The walk goes through squares of shades and markings: (0,0) (0,1) (1,1) (1,0) (0,2) …
    """
    block, step = divmod(rank, _SHADES * 2)
    pair = (2 * block + start) % len(MARKINGS)
    order = ((0, 0), (0, 1), (1, 1), (1, 0), (2, 0), (2, 1), (3, 1), (3, 0))
    shade, side = order[step]
    return (shade + start) % _SHADES, (pair + side) % len(MARKINGS)
