"""Plain words for class names that are folders: EuroSAT's and SUN397's.

The words decide zero-shot figures, so they are the published ones.

Reference: Radford et al., Learning Transferable Visual Models From Natural Language Supervision,
2021; class names as listed with the paper's released models.
"""

from collections.abc import Sequence

EUROSAT_WORDS = {
    "AnnualCrop": "annual crop land",
    "Forest": "forest",
    "HerbaceousVegetation": "brushland or shrubland",
    "Highway": "highway or road",
    "Industrial": "industrial buildings or commercial buildings",
    "Pasture": "pasture land",
    "PermanentCrop": "permanent crop land",
    "Residential": "residential buildings or homes or apartments",
    "River": "river",
    "SeaLake": "lake or sea",
}
"""By folder name."""


def eurosat_metadata(names: Sequence[str]) -> dict[str, list[str]]:
    """Columns name and readable_name; what is none of the ten folders stays as it is."""
    words = [EUROSAT_WORDS.get(name, name) for name in names]
    return {"name": list(names), "readable_name": words}


def sun397_metadata(names: Sequence[str]) -> dict[str, list[str]]:
    """Columns name and readable_name: `apse/indoor` as "apse indoor", underscores as blanks."""
    words = [" ".join(name.replace("/", " ").replace("_", " ").split()) for name in names]
    return {"name": list(names), "readable_name": words}
