"""Class text: encoded once, by the backbone that wrote the cache and no other."""

import os
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from featcache import class_text
from featcache.class_text import class_text_features, ensemble, open_cache_backbone
from featcache.errors import CacheError, CacheMismatchError
from featcache.reader import Cache, open_cache
from featcache.store import verify

Make = Callable[..., Any]
TEMPLATES = ("a photo of a {name}.", "genus {genus}")
TEXTS = ["a photo of a oak.", "a photo of a elm.", "a photo of a 日本."] + [
    f"genus {genus}" for genus in ("Quercus", "", "x")
]


class Encoder:
    """Encodes a text as (its length, its code points' sum)."""

    def __init__(self, cache: Cache, **changes: str) -> None:
        identity = cache.identity.backbone.model_copy(update=changes)
        self.spec = SimpleNamespace(identity=identity)
        self.precision = "fp32"
        self.batches: list[int] = []

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        self.batches.append(len(texts))
        return torch.tensor([[len(text), sum(map(ord, text))] for text in texts]).float()


def expected() -> np.ndarray[Any, Any]:
    flat = [[len(text), sum(map(ord, text))] for text in TEXTS]
    return np.asarray(flat, np.float32).reshape(2, 3, 2)


def test_features_are_encoded_once_and_kept(written: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(class_text, "TEXT_BATCH", 4)
    made = written()
    cache = open_cache(made.path)
    encoder = Encoder(cache)
    opened: list[Encoder] = []

    def open_backbone() -> Any:
        opened.append(encoder)
        return encoder

    first = class_text_features(cache, TEMPLATES, open_backbone)
    np.testing.assert_array_equal(first, expected())
    assert first.dtype == np.float32
    assert encoder.batches == [4, 2]
    again = class_text_features(open_cache(made.path), TEMPLATES, open_backbone)
    np.testing.assert_array_equal(again, first)
    assert len(opened) == 1
    assert verify(made.path) == []


def test_any_choice_of_known_templates_needs_no_text_tower(written: Make) -> None:
    cache = open_cache(written().path)
    encoder = Encoder(cache)
    class_text_features(cache, TEMPLATES, lambda: encoder)

    def refuse() -> Any:
        raise AssertionError("the text tower was opened")

    for order in ([1, 0], [1], [0, 1, 0]):
        chosen = [TEMPLATES[index] for index in order]
        found = class_text_features(open_cache(cache.path), chosen, refuse)
        np.testing.assert_array_equal(found, expected()[order])
    mixed = class_text_features(cache, [TEMPLATES[0], "one {name}", TEMPLATES[1]], lambda: encoder)
    np.testing.assert_array_equal(mixed[[0, 2]], expected())
    assert mixed[1, 0, 0] == len("one oak")
    assert encoder.batches == [6, 3], "only the new template's three sentences were encoded"


def test_equal_sentences_are_encoded_once(written: Make) -> None:
    cache = open_cache(written().path)
    encoder = Encoder(cache)
    features = class_text_features(cache, ["a {family}x", "a {name}", "a x"], lambda: encoder)
    assert encoder.batches == [4], "all classes share two of the three templates' sentence"
    assert features.shape == (3, 3, 2)
    np.testing.assert_array_equal(features[0], features[2])
    np.testing.assert_array_equal(features[2], [[3, sum(map(ord, "a x"))]] * 3)


def test_an_ensemble_is_the_weighted_mean_of_unit_vectors() -> None:
    generator = torch.Generator().manual_seed(0)
    given = torch.randn(3, 4, 5, generator=generator) * torch.tensor([1, 9, 100.0])[:, None, None]
    plain = given.numpy().astype(np.float64)
    for weights in (None, [2, 1, 0], [0.5, 0.5, 0.5]):
        shares = np.asarray(weights or [1, 1, 1]) / sum(weights or [1, 1, 1])
        for c in range(4):
            total = sum(
                share * plain[t, c] / np.linalg.norm(plain[t, c]) for t, share in enumerate(shares)
            )
            found = ensemble(given, weights)[c].numpy()
            np.testing.assert_allclose(found, total / np.linalg.norm(total), atol=1e-6)


def test_another_backbone_is_refused(written: Make) -> None:
    cache = open_cache(written().path)
    with pytest.raises(CacheMismatchError, match=r"backbone.weights differs: .* 'other'"):
        class_text_features(cache, TEMPLATES, lambda: Encoder(cache, weights="other"))
    assert not list((cache.path / "class_text").glob("*/c"))


def test_another_precision_is_refused(written: Make) -> None:
    cache = open_cache(written().path)
    encoder = Encoder(cache)
    encoder.precision = "bf16"
    with pytest.raises(
        CacheMismatchError, match="written in fp32, the opened backbone computes in bf16"
    ):
        class_text_features(cache, TEMPLATES, lambda: encoder)
    assert encoder.batches == []
    assert not list((cache.path / "class_text").glob("*/c"))


def test_a_cache_that_may_not_be_written_is_left_alone(
    written: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = open_cache(written().path)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    features = class_text_features(cache, TEMPLATES, lambda: Encoder(cache))
    np.testing.assert_array_equal(features, expected())
    assert not list((cache.path / "class_text").glob("*/c"))


def test_an_unknown_backbone_kind_is_named(written: Make) -> None:
    cache = open_cache(written().path)
    with pytest.raises(CacheError, match="backbone kind 'none', this installation has"):
        open_cache_backbone(cache)
