"""Prompt templates: fallbacks, automatic choice, and misspelt fields."""

import pandas as pd
import pytest

from featcache.errors import ConfigError
from featcache.prompts import (
    TEMPLATES,
    choose,
    choose_zero_shot,
    expand,
    format_prompts,
    known_fields,
    template_fields,
)

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
        ("cifar10", ["name"], "cifar10"),
        ("flowers102", ["name"], "flowers102"),
        ("stanford_cars", ["name", "make", "model"], "vehicles"),
        ("stanford_cars", ["name"], "cars"),
        ("flowers102_few_shot", ["name"], "flowers102"),
        ("wordnet_folder", ["name", "wnid"], "imagenet_7"),
    ],
)
def test_choice(kind: str, columns: list[str], expected: str) -> None:
    assert choose(kind, columns) == expected


def test_zero_shot_sets_have_four_and_six_templates() -> None:
    assert [len(TEMPLATES[name]) for name in ("common", "scientific", "both")] == [4, 4, 6]
    for template in TEMPLATES["common"]:
        assert template_fields(template) == ["common_name"]


def test_a_zero_shot_baseline_uses_both_kinds_of_names() -> None:
    assert choose_zero_shot("table", ["name", "common_name", "scientific_name"]) == "both"
    assert choose_zero_shot("table", ["name", "common_name", "genus"]) == "biology"


def test_imagenet_sets_are_those_of_open_clip() -> None:
    from open_clip import zero_shot_metadata as theirs

    classes = pd.DataFrame({"name": ["tench"]})
    for name, functions in (
        ("imagenet", theirs.OPENAI_IMAGENET_TEMPLATES),
        ("imagenet_7", theirs.SIMPLE_IMAGENET_TEMPLATES),
    ):
        found = [texts[0] for texts in format_prompts(classes, TEMPLATES[name])]
        assert found == [function("tench") for function in functions]
    assert set(TEMPLATES["imagenet_7"]) < set(TEMPLATES["imagenet"])


def test_published_sets_have_their_sizes_and_no_foreign_field() -> None:
    sizes = {"imagenet": 80, "cifar10": 18, "cifar100": 18, "caltech101": 34, "ucf101": 48}
    sizes |= {"dtd": 8, "eurosat": 3, "fgvc_aircraft": 2, "flowers102": 1, "cars": 8}
    for name, size in sizes.items():
        assert len(TEMPLATES[name]) == size, name
        field = "readable_name" if name == "eurosat" else "name"
        assert {used for text in TEMPLATES[name] for used in template_fields(text)} == {field}
    assert TEMPLATES["ucf101"][0] == "a photo of a person {name}."
    assert TEMPLATES["ucf101"][-1] == "a demonstration of the person practicing {name}."


def test_names_and_templates_mix_in_order_and_only_once() -> None:
    assert expand("plain") == ["a photo of a {name}."]
    assert expand(["one {name}", "plain", "cars"]) == [
        "one {name}",
        "a photo of a {name}.",
        *TEMPLATES["cars"][1:],
    ]
    assert expand("the {name}") == ["the {name}"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("imagnet", "head.templates: no template set 'imagnet'; known: biology, birds"),
        (["plain", "imagnet"], "no template set 'imagnet'"),
        ([], "head.templates: found an empty list"),
        ("a {name", "expected '}' before end of string"),
    ],
)
def test_unknown_sets_are_named(names: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        expand(names, "head.templates")
    assert "\n" not in str(error.value)


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
