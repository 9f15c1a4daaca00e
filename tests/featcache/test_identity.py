"""Fingerprints: equal for equal caches, different for every field, first difference named."""

from typing import Any

import pytest

from featcache.errors import CacheMismatchError
from featcache.identity import (
    BackboneIdentity,
    DatasetIdentity,
    Identity,
    differences,
    fingerprint,
    hash_strings,
    require_equal,
)

from ..conftest import sample_identity


def make() -> Identity:
    return sample_identity(
        DatasetIdentity(
            kind="folder",
            task="single_label",
            num_rows=3,
            rows="r",
            labels="l",
            classes="c",
            captions="t",
        ),
        BackboneIdentity(kind="open_clip", name="tiny", weights="w", architecture="a"),
        text=True,
    )


def leaves(record: dict[str, Any], prefix: str = "") -> list[str]:
    names = []
    for name, value in record.items():
        if isinstance(value, dict):
            names += leaves(value, f"{prefix}{name}.")
        else:
            names.append(prefix + name)
    return names


def changed(record: dict[str, Any], name: str) -> dict[str, Any]:
    head, _, rest = name.partition(".")
    if rest:
        return {**record, head: changed(record[head], rest)}
    other = {
        "precision": "bf16",
        "mode": "reference",
        "storage_dtype": "float32",
        "token_dtype": "int8",
        "multimodal": "states",
    }
    value = record[head]
    if head in other:
        return {**record, head: other[head]}
    if isinstance(value, bool):
        return {**record, head: not value}
    if isinstance(value, list):
        return {**record, head: [value[0] + 1, *value[1:]]}
    return {**record, head: value + 1 if isinstance(value, int | float) else value + "x"}


def test_equal_identities_have_equal_fingerprints_after_a_round_trip() -> None:
    identity = make()
    again = Identity.model_validate_json(identity.model_dump_json())
    assert again == identity
    assert again.fingerprint() == identity.fingerprint()
    require_equal(again, identity, "cache/x")


@pytest.mark.parametrize("name", [name for name in leaves(make().record()) if name != "format"])
def test_every_single_field_changes_the_fingerprint_and_is_named(name: str) -> None:
    identity = make()
    other = Identity.model_validate(changed(identity.record(), name))
    assert other.fingerprint() != identity.fingerprint()
    with pytest.raises(CacheMismatchError, match=rf"cache/x: {name} differs: the cache holds"):
        require_equal(other, identity, "cache/x")


def test_the_first_difference_is_named_in_field_order() -> None:
    found = changed(changed(make().record(), "precision"), "backbone.weights")
    names = [name for name, _, _ in differences(found, make().record())]
    assert names == ["backbone.weights", "precision"]


def test_moving_a_boundary_between_strings_changes_the_hash() -> None:
    assert hash_strings(["ab", "c"]) != hash_strings(["a", "bc"])
    assert hash_strings(["é"]) == hash_strings(["é"])
    assert hash_strings([]) != hash_strings([""])


def test_fingerprints_do_not_depend_on_key_order() -> None:
    assert fingerprint({"a": 1, "b": [2.5]}) == fingerprint({"b": [2.5], "a": 1})
    with pytest.raises(ValueError, match="Out of range float"):
        fingerprint({"a": float("nan")})
