"""Make, model, type and year out of names such as "AM General Hummer SUV 2000".

Few-shot split files put the year first: "2000 AM General Hummer SUV".
"""

from collections.abc import Sequence

MAKES = ("AM General", "Aston Martin", "Land Rover")
"""Makes of two words; all others are the first word."""

TYPES = (
    "Regular Cab",
    "Extended Cab",
    "Crew Cab",
    "Club Cab",
    "Quad Cab",
    "SuperCab",
    "Cab",
    "Convertible",
    "Coupe",
    "Hatchback",
    "Minivan",
    "Sedan",
    "SUV",
    "Van",
    "Wagon",
)
"""Body types as they end a name, longer ones before their own endings."""


def car_metadata(names: Sequence[str]) -> dict[str, list[str]]:
    """Columns name, full_name, make, model, type, category and year of car classes.

    `category` is the general word for the type (a Crew Cab is a pickup); what a name does not say
    is "".
    """
    rows = [_parts(name) for name in names]
    columns = ("make", "model", "type", "category", "year")
    return {
        "name": list(names),
        "full_name": list(names),
        **{column: [row[number] for row in rows] for number, column in enumerate(columns)},
    }


def _parts(name: str) -> tuple[str, str, str, str, str]:
    words = name.split()
    end = next((end for end in (-1, 0) if words and _is_year(words[end])), None)
    year = "" if end is None else words.pop(end)
    rest = " ".join(words)
    make = next((two for two in MAKES if rest.startswith(two + " ")), words[0] if words else "")
    rest = rest.removeprefix(make).strip()
    body = next((kind for kind in TYPES if f" {rest}".endswith(" " + kind)), "")
    model = rest.removesuffix(body).strip()
    category = "pickup" if body.endswith("Cab") else body.lower() if body != "SUV" else body
    return make, model or rest, body, category, year


def _is_year(word: str) -> bool:
    return len(word) == 4 and word.isdigit()
