"""Class prompts: named template sets, and class table rows formatted into sentences.

A template is a `str.format` string over a class's metadata, e.g. "a photo of a {common_name}.".
Fields that fall back, first non-empty wins:

    {common_name}      common_name, scientific_name, name
    {scientific_name}  scientific_name, species, name
    {species}          common_name, species, scientific_name, name
    {full_name}        full_name, name
    {readable_name}    readable_name, name

`{species}` prefers the common name, so that it never repeats `{scientific_name}` when both exist.
Any other field is the class table's column of that name. A missing value formats to "". A field
that is neither a column nor known here is a misspelling, and an error.
"""

from collections.abc import Mapping, Sequence
from string import Formatter

import pandas as pd

from featcache.errors import ConfigError
from featcache.prompt_sets import PUBLISHED

TEMPLATES: dict[str, tuple[str, ...]] = {
    "plain": ("a photo of a {name}.",),
    "generic": (
        "a photo of a {name}.",
        "a photo of the {name}.",
        "a close-up photo of a {name}.",
        "a picture showing a {name}.",
        "a small photo of one {name}.",
    ),
    "biology": (
        "a photo of {species}",
        "a wildlife photo of the species {scientific_name}",
        "an organism belonging to genus {genus}",
        "an organism belonging to family {family}",
        "a species in the order {order}",
    ),
    "vehicles": (
        "a photo of {full_name}",
        "{full_name} car",
        "{make} {model}",
        "{type} made by {make}",
        "{category} vehicle {full_name}",
    ),
    "common": (
        "a photo of a {common_name}.",
        "a wildlife photo of a {common_name}.",
        "a close-up photo of a {common_name}.",
        "a {common_name} in the wild.",
    ),
    "scientific": (
        "a photo of a {scientific_name}.",
        "a wildlife photo of the species {scientific_name}.",
        "a close-up photo of a {scientific_name}.",
        "{scientific_name} in the wild.",
    ),
    "both": (
        "a photo of a {common_name}.",
        "a close-up photo of a {common_name}.",
        "a {common_name} in the wild.",
        "a photo of a {scientific_name}.",
        "a wildlife photo of the species {scientific_name}.",
        "{common_name}, also known as {scientific_name}.",
    ),
    "garden": (
        "a photo of a {common_name}.",
        "a {common_name} in a garden.",
        "a close-up of a {common_name}.",
        "a picture of a {common_name} with other things around it.",
    ),
    "flowers": (
        "A photo of {name}.",
        "A photo of the flower {name}.",
        "A botanical photo of {name}.",
        "An example of the flower type {name}.",
    ),
    "digits": (
        "a scan of the handwritten digit {name}.",
        "a handwritten {numeral}.",
        "the number {name} written by hand.",
    ),
    **PUBLISHED,
}
"""Template sets by name. `common`, `scientific` and `both` are zero-shot baselines by the kind of
name they use; the sets of `prompt_sets` belong to published datasets; the others suit one kind of
class table."""

FALLBACKS: dict[str, tuple[str, ...]] = {
    "common_name": ("common_name", "scientific_name", "name"),
    "scientific_name": ("scientific_name", "species", "name"),
    "species": ("common_name", "species", "scientific_name", "name"),
    "full_name": ("full_name", "name"),
    "readable_name": ("readable_name", "name"),
}
"""Columns that a field is looked up in, in this order."""

_METADATA = ("class", "phylum", "kingdom", "numeral")


_SET_OF_KIND = {"stanford_cars": "cars", "wordnet_folder": "imagenet_7"}
"""Sets that suit a dataset kind of another name, if its class table says nothing better."""


def choose(kind: str, columns: Sequence[str]) -> str:
    """Name of the template set that suits a dataset.

    Args:
        kind: dataset kind; a set of the same name (`garden`, `cifar10`) wins.
        columns: columns of the class table; make and model mean vehicles; genus, family or order
            biology; anything else the kind's nearest set, or generic.
    """
    kind = kind.removesuffix("_few_shot")  # another split of the same classes
    if kind in TEMPLATES:
        return kind
    if {"make", "model"} <= set(columns):
        return "vehicles"
    if {"genus", "family", "order"} & set(columns):
        return "biology"
    return _SET_OF_KIND.get(kind, "generic")


def choose_zero_shot(kind: str, columns: Sequence[str]) -> str:
    """Name of the set for a zero-shot baseline: `both` where classes have both kinds of names."""
    return "both" if {"common_name", "scientific_name"} <= set(columns) else choose(kind, columns)


def expand(names: str | Sequence[str], option: str = "templates") -> list[str]:
    """The templates that names of sets and own format strings mean, in order, each once.

    Args:
        names: one or several; what contains a brace is a template, anything else a set's name.
        option: what error messages call the option.

    Raises:
        ConfigError: for a name that no set has, or when nothing is left.
    """
    found: list[str] = []
    for name in [names] if isinstance(names, str) else names:
        if "{" in name or "}" in name:
            template_fields(name)  # a mistake is named before anything is encoded
            found.append(name)
        elif name in TEMPLATES:
            found += TEMPLATES[name]
        else:
            raise ConfigError(
                f"{option}: no template set {name!r}; known: {', '.join(sorted(TEMPLATES))}, or "
                'give templates such as "a photo of a {name}." (one with a comma as a JSON list)'
            )
    if not found:
        raise ConfigError(f"{option}: found an empty list of prompt templates; give at least one")
    return list(dict.fromkeys(found))


def format_prompts(
    classes: pd.DataFrame, templates: Sequence[str], keep_underscores: bool = False
) -> list[list[str]]:
    """T lists of C sentences: each template formatted with each class's metadata.

    Args:
        classes: C rows with a `name` column; other columns are metadata.
        templates: T format strings.
        keep_underscores: leave `_` in names as it is; by default it becomes a blank.

    Raises:
        ConfigError: no templates, a template that is no format string, or one with a field that
            neither the class table nor the fallbacks know.
    """
    if not templates:
        raise ConfigError("found an empty list of prompt templates; expected at least one")
    columns = {
        str(name): _texts(classes[name], keep_underscores)
        for name in classes.columns
        if name != "count"
    }
    return [_format(template, columns, len(classes)) for template in templates]


def template_fields(template: str) -> list[str]:
    """Names of the fields in a template, in order, each once.

    Raises:
        ConfigError: unbalanced braces, or a field that is more than a name.
    """
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(f"template {template!r}: {error}; write {{name}} for a field") from None
    fields = []
    for _, field, spec, conversion in parts:
        if field is None:
            continue
        if not field.isidentifier() or spec or conversion:
            raise ConfigError(
                f"template {template!r}: expected fields like {{name}}, no formatting"
            )
        fields.append(field)
    return list(dict.fromkeys(fields))


def known_fields(columns: Sequence[str]) -> list[str]:
    """Fields that a template may use with a class table of these columns, sorted."""
    used = {field for texts in TEMPLATES.values() for text in texts for field in _names(text)}
    return sorted({*columns, *FALLBACKS, *used, *_METADATA} - {"count"})


def _names(template: str) -> list[str]:
    return [field for _, field, _, _ in Formatter().parse(template) if field]


def _texts(column: "pd.Series[str]", keep_underscores: bool) -> list[str]:
    texts = [str(value) for value in column.fillna("")]
    if not keep_underscores:
        texts = [text.replace("_", " ") for text in texts]
    return [" ".join(text.split()) for text in texts]


def _format(template: str, columns: Mapping[str, list[str]], num_classes: int) -> list[str]:
    values: dict[str, list[str]] = {}
    for field in template_fields(template):
        known = known_fields(list(columns))
        if field not in known:
            raise ConfigError(
                f"template {template!r}: no class has {field!r}; known fields: {', '.join(known)}"
            )
        sources = [columns[name] for name in FALLBACKS.get(field, (field,)) if name in columns]
        values[field] = [
            next((source[index] for source in sources if source[index]), "")
            for index in range(num_classes)
        ]
    return [
        template.format_map({field: texts[index] for field, texts in values.items()})
        for index in range(num_classes)
    ]
