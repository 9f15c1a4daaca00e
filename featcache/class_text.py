"""Class text features of a cache: encoded once by the cache's own backbone, then kept in it."""

import os
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from featcache.backbones import BACKBONES
from featcache.backbones.base import Backbone
from featcache.errors import CacheError, CacheMismatchError
from featcache.identity import Precision, differences, fingerprint
from featcache.prompts import format_prompts
from featcache.reader import Cache

TEXT_BATCH = 256
"""Prompts encoded at a time."""


def class_text_features(
    cache: Cache, templates: Sequence[str], open_backbone: Callable[[], Backbone]
) -> npt.NDArray[np.float32]:
    """Text features of every class in every template, not normalised.

    They are kept in the cache under `class_text/`; the backbone is opened only when these prompts
    have not been encoded before. A cache that may not be written is left as it is.

    Args:
        cache: an opened cache.
        templates: T format strings over the class table's columns.
        open_backbone: opens the encoder that wrote the cache; see `open_cache_backbone`.

    Returns:
        (T, C, P) float32.

    Raises:
        ConfigError: if a template names an unknown field.
        CacheMismatchError: if the opened backbone is not the one that wrote the cache.
        BackboneError: if the backbone has no text tower.
    """
    prompts = format_prompts(cache.classes, templates)
    weights = cache.identity.backbone.weights
    name = f"class_text/{fingerprint([prompts, weights, cache.identity.precision])}"
    if cache.has(name):
        return np.asarray(cache.array(name).read(), dtype=np.float32)
    backbone = open_backbone()
    require_backbone(cache, backbone)
    features = _encode(backbone, [text for texts in prompts for text in texts])
    features = features.reshape(len(prompts), cache.num_classes, -1)
    if os.access(cache.path, os.W_OK) and os.access(cache.path.parent, os.W_OK):
        kept = {
            "templates": list(templates),
            "class_hash": cache.class_hash,
            "weights": weights,
            "precision": backbone.precision,
        }
        cache.store.put_array(name, features, kept)
    return features


def open_cache_backbone(
    cache: Cache, device: str = "cpu", precision: Precision | None = None
) -> Backbone:
    """The encoder that wrote a cache, from the options recorded in it.

    Args:
        cache: an opened cache.
        device: where to put it.
        precision: None = the cache's own.

    Raises:
        BackboneError: if its weights are not where they were.
        CacheMismatchError: if other weights lie there now.
    """
    record = cache.attributes["backbone"]
    if record.get("kind") not in BACKBONES:
        raise CacheError(
            f"{cache.path}: written by backbone kind {record.get('kind')!r}, this installation has "
            f"{', '.join(BACKBONES)}; install the extra that brings it"
        )
    config = BACKBONES[record["kind"]].model_validate(record)
    backbone = config.open(device, precision or cache.identity.precision)
    require_backbone(cache, backbone)
    return backbone


def require_backbone(cache: Cache, backbone: Backbone) -> None:
    """Checks that a backbone is the one that wrote a cache.

    Raises:
        CacheMismatchError: naming the first differing field.
    """
    found = cache.identity.backbone.record()
    for name, have, opened in differences(found, backbone.spec.identity.record()):
        raise CacheMismatchError(
            f"{cache.path}: backbone.{name} differs: the cache was written with {have!r}, the "
            f"opened backbone has {opened!r}; put the original weights back, or extract anew"
        )


def _encode(backbone: Backbone, texts: list[str]) -> npt.NDArray[np.float32]:
    parts = []
    with torch.inference_mode():
        for start in range(0, len(texts), TEXT_BATCH):
            encoded = backbone.encode_text(texts[start : start + TEXT_BATCH])
            parts.append(encoded.float().cpu().numpy())
    return np.concatenate(parts)
