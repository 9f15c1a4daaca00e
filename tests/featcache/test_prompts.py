"""Prompt templates: fallbacks, automatic choice, and misspelt fields."""

import pandas as pd
import pytest

from featcache.errors import ConfigError
from featcache.prompts import TEMPLATES, choose, format_prompts, known_fields, template_fields

SPECIES = pd.DataFrame(
    {
        "name": ["Alpha_betus", "Gamma_deltus"],
        "common_name": ["blue alpha", ""],
        "scientific_name": ["alpha betus", "gamma deltus"],
        "genus": ["alpha", "gamma"],
        "family": ["alphidae", None],
        "order": ["lepidoptera", "coleoptera"],
        "count": [3, 4],
    }
)


def test_biology_templates_are_the_five_of_the_method() -> None:
    assert format_prompts(SPECIES, TEMPLATES["biology"]) == [
        ["a photo of blue alpha", "a photo of gamma deltus"],
        [
            "a wildlife photo of the species alpha betus",
            "a wildlife photo of the species gamma deltus",
        ],
        ["an organism belonging to genus alpha", "an organism belonging to genus gamma"],
        ["an organism belonging to family alphidae", "an organism belonging to family "],
        ["a species in the order lepidoptera", "a species in the order coleoptera"],
    ]


def test_vehicle_templates() -> None:
    cars = pd.DataFrame(
        {
            "name": ["Acme Rocket 1999"],
            "full_name": ["Acme Rocket coupe 1999"],
            "make": ["Acme"],
            "model": ["Rocket"],
            "type": ["coupe"],
            "category": ["sports"],
        }
    )
    assert choose("folder", list(cars.columns)) == "vehicles"
    assert [texts[0] for texts in format_prompts(cars, TEMPLATES["vehicles"])] == [
        "a photo of Acme Rocket coupe 1999",
        "Acme Rocket coupe 1999 car",
        "Acme Rocket",
        "coupe made by Acme",
        "sports vehicle Acme Rocket coupe 1999",
    ]


def test_names_fall_back() -> None:
    bare = pd.DataFrame({"name": ["traffic_light"]})
    fields = ["{common_name}", "{scientific_name}", "{species}", "{full_name}", "{name}"]
    assert format_prompts(bare, fields) == [["traffic light"]] * 5
    latin = pd.DataFrame({"name": ["x"], "scientific_name": ["alpha betus"]})
    assert format_prompts(latin, ["{common_name}"]) == [["alpha betus"]]


def test_underscores_become_blanks_unless_kept() -> None:
    assert format_prompts(SPECIES, ["{name}"])[0][0] == "Alpha betus"
    assert format_prompts(SPECIES, ["{name}"], keep_underscores=True)[0][0] == "Alpha_betus"


@pytest.mark.parametrize(
    ("kind", "columns", "expected"),
    [
        ("folder", ["name", "count"], "generic"),
        ("table", ["name", "genus"], "biology"),
        ("table", ["name", "make", "model", "genus"], "vehicles"),
        ("table", ["name", "make"], "generic"),
        ("garden", ["name", "genus"], "garden"),
        ("digits", ["name", "numeral"], "digits"),
    ],
)
def test_choice(kind: str, columns: list[str], expected: str) -> None:
    assert choose(kind, columns) == expected


def test_zero_shot_sets_have_four_and_six_templates() -> None:
    assert [len(TEMPLATES[name]) for name in ("common", "scientific", "both")] == [4, 4, 6]
    for template in TEMPLATES["common"]:
        assert template_fields(template) == ["common_name"]


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_every_set_formats_with_a_bare_class_table(name: str) -> None:
    prompts = format_prompts(pd.DataFrame({"name": ["cat", "dog"]}), TEMPLATES[name])
    assert [len(texts) for texts in prompts] == [2] * len(TEMPLATES[name])
    assert len(set(TEMPLATES[name])) == len(TEMPLATES[name])


@pytest.mark.parametrize(
    ("templates", "message"),
    [
        ([], "empty list"),
        (["a {nmae}"], "no class has 'nmae'; known fields: .*common_name"),
        (["a {count}"], "no class has 'count'"),
        (["a {name"], "expected '}' before end of string"),
        (["a {name.upper}"], "expected fields like .name."),
        (["a {name:>20}"], "expected fields like .name."),
        (["a {}"], "expected fields like .name."),
    ],
)
def test_template_mistakes(templates: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        format_prompts(SPECIES, templates)
    assert "\n" not in str(error.value)


def test_known_metadata_may_be_missing_and_own_columns_are_known() -> None:
    bare = pd.DataFrame({"name": ["cat"], "habitat": ["sofa"]})
    assert format_prompts(bare, ["{genus}|{habitat}|{{x}}"]) == [["|sofa|{x}"]]
    known = known_fields([*bare.columns, "count"])
    assert "habitat" in known
    assert "count" not in known
