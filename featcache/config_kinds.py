"""Fields told apart by `kind` on the command line: short forms of flags, and help of one kind.

`--head mop` stands for `--head.kind mop`. An option that several kinds have is one flag, with the
meanings of all in the help, unless the command names the kind: then the help is that kind's alone.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, Field, create_model

T = TypeVar("T", bound=BaseModel)


def nested_models(annotation: Any) -> list[type[BaseModel]]:
    """The models that a field's type consists of: one, several in a union, or none."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) is not None:
        return [model for part in get_args(annotation) for model in nested_models(part)]
    return []


def kind_fields(model: type[BaseModel], prefix: str = "") -> set[str]:
    """Dotted names of all fields told apart by `kind`."""
    found: set[str] = set()
    for name, field in model.model_fields.items():
        if field.discriminator is not None:
            found.add(prefix + name)
        for nested in nested_models(field.annotation):
            found |= kind_fields(nested, f"{prefix}{name}.")
    return found


def expand_kinds(model: type[BaseModel], arguments: list[str]) -> list[str]:
    """Turns `--head mop` into `--head.kind mop`."""
    kinds = {f"--{name}" for name in kind_fields(model)}
    expanded = []
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if flag in kinds and not value.startswith("{"):
            argument = f"{flag}.kind{equals}{value}"
        expanded.append(argument)
    return expanded


def chosen_kinds(
    model: type[BaseModel], arguments: Sequence[str], values: Mapping[str, Any]
) -> dict[str, str]:
    """The kinds that flags, or else the file's values, state, by the dotted name of the field."""
    chosen: dict[str, str] = {}
    for name in kind_fields(model):
        value: Any = values
        for part in name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        kind = value.get("kind") if isinstance(value, Mapping) else value
        for argument, after in pairwise([*arguments, ""]):
            flag, equals, given = argument.partition("=")
            if flag == f"--{name}.kind":
                kind = given if equals else after
        if isinstance(kind, str):
            chosen[name] = kind
    return chosen


def with_kinds(model: type[T], chosen: Mapping[str, str], prefix: str = "") -> type[T]:
    """`model` with the options of the chosen kinds alone; kinds that do not exist change nothing.

    Made for the help: the result has no default where a kind was chosen.
    """
    narrowed: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        members = nested_models(field.annotation)
        kind = chosen.get(prefix + name)
        if field.discriminator is not None:
            members = [m for m in members if kind in _names(m)]
            member = members[0] if members else None
        elif len(members) == 1:
            member = with_kinds(members[0], chosen, f"{prefix}{name}.")
            member = None if member is members[0] else member
        else:
            member = None
        if member is not None:
            narrowed[name] = (member, Field(description=field.description))
    return create_model(model.__name__, __base__=model, **narrowed) if narrowed else model


def _names(member: type[BaseModel]) -> set[str]:
    """The kind that a member of a union is chosen by, and its aliases."""
    return {str(member.model_fields["kind"].default), *getattr(member, "aliases", ())}


def _optional_flags(model: type[BaseModel]) -> set[str]:
    """Flags of fields that are true, false or left open, or that are so for one kind of several.

    pydantic-settings makes a `--no-` flag only of what is true or false whatever the kind.
    """
    plain: dict[str, list[bool]] = {}
    for flag, annotation in _annotations(model):
        parts = get_args(annotation) or (annotation,)
        plain.setdefault(flag, []).append(annotation is bool)
        if annotation is not bool and bool in parts:
            plain[flag] += [True, False]
    return {flag for flag, found in plain.items() if any(found) and not all(found)}


def _annotations(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Flag and type of each option; a flag comes once for each kind that has it."""
    for name, field in model.model_fields.items():
        yield f"--{prefix}{name}", field.annotation
        for nested in nested_models(field.annotation):
            yield from _annotations(nested, f"{prefix}{name}.")


def expand_optional_flags(model: type[BaseModel], arguments: list[str]) -> list[str]:
    """Turns `--x` and `--no-x` of such a field into what any other bool's mean."""
    flags = _optional_flags(model)
    expanded: list[str] = []
    for argument, after in pairwise([*arguments, "--"]):
        if argument in flags and after.startswith("--"):
            argument += "=true"
        elif argument.replace("--no-", "--", 1) in flags - {argument}:
            argument = argument.replace("--no-", "--", 1) + "=false"
        expanded.append(argument)
    return expanded


def kind_texts(model: type[BaseModel], prefix: str = "") -> dict[str, str]:
    """Help, by flag, of the options that not all kinds have, or that mean different things."""
    texts: dict[str, str] = {}
    for name, field in model.model_fields.items():
        members = nested_models(field.annotation)
        meanings: dict[str, dict[str, list[str]]] = {}
        for member in members:
            texts |= kind_texts(member, f"{prefix}{name}.")
            for option, part in member.model_fields.items() if field.discriminator else ():
                by_text = meanings.setdefault(f"--{prefix}{name}.{option}", {})
                kind = str(member.model_fields["kind"].default)
                by_text.setdefault(part.description or "", []).append(kind)
        for flag, by_text in meanings.items():
            if flag.endswith(".kind") or list(map(len, by_text.values())) == [len(members)]:
                continue
            texts[flag] = " ".join(f"[{', '.join(kinds)}] {t}" for t, kinds in by_text.items())
    return texts
