"""Class text features of a cache: encoded once by the cache's own backbone, then kept in it."""

import contextlib
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from featcache.backbones import BACKBONES
from featcache.backbones.base import Backbone, BackboneConfig
from featcache.backbones.prompt_tower import PromptTower
from featcache.errors import CacheError, CacheMismatchError, ConfigError, StorageDeniedError
from featcache.identity import Precision, differences, fingerprint
from featcache.prompts import format_prompts
from featcache.reader import Cache

TEXT_BATCH = 256
"""Prompts encoded at a time."""


def class_text_features(
    cache: Cache, templates: Sequence[str], open_backbone: Callable[[], Backbone]
) -> npt.NDArray[np.float32]:
    """Text features of every class in every template, not normalised.

    Each template's features are kept in the cache under `class_text/`, by the sentences it makes,
    so that any choice, order or weighting of known templates needs no text tower: the backbone is
    opened only for templates that have not been encoded before. A cache that may not be written is
    left as it is.

    Args:
        cache: an opened cache.
        templates: T format strings over the class table's columns.
        open_backbone: opens the encoder that wrote the cache; see `open_cache_backbone`.

    Returns:
        (T, C, P) float32.

    Raises:
        ConfigError: if a template names an unknown field.
        CacheMismatchError: if the opened backbone is not the one that wrote the cache, or computes
            in another precision: what is kept here stands beside features of the cache's own.
        BackboneError: if the backbone has no text tower.
    """
    prompts = format_prompts(cache.classes, templates)
    names = [text_array_name(cache, texts) for texts in prompts]
    held = dict.fromkeys(name for name in names if cache.has(name))
    missing = {
        name: (template, texts)
        for name, template, texts in zip(names, templates, prompts, strict=True)
        if name not in held
    }
    features = {name: np.asarray(cache.array(name).read(), np.float32) for name in held}
    if missing:
        backbone = open_backbone()
        require_backbone(cache, backbone)
        if backbone.precision != cache.identity.precision:
            raise CacheMismatchError(
                f"{cache.path}: precision differs: the cache was written in "
                f"{cache.identity.precision}, the opened backbone computes in "
                f"{backbone.precision}; open it in {cache.identity.precision}, so that class text "
                "and images compare"
            )
        encoded = encode_prompts(backbone, [texts for _, texts in missing.values()])
        features |= dict(zip(missing, encoded, strict=True))
        if cache.store.may_add_arrays():
            with contextlib.suppress(StorageDeniedError):
                for name, (template, _) in missing.items():
                    kept = {
                        "template": template,
                        "class_hash": cache.class_hash,
                        "weights": cache.identity.backbone.weights,
                        "precision": backbone.precision,
                    }
                    cache.store.put_array(name, features[name], kept)
    return np.stack([features[name] for name in names])


def encode_prompts(backbone: Backbone, prompts: Sequence[Sequence[str]]) -> npt.NDArray[np.float32]:
    """(T, C, P) features, not normalised, of T lists of C sentences; equal ones are run once.

    Args:
        backbone: with a text tower.
        prompts: see `featcache.prompts.format_prompts`.

    Raises:
        BackboneError: if the backbone has no text tower.
    """
    distinct = {text: i for i, text in enumerate(dict.fromkeys(t for row in prompts for t in row))}
    texts, parts = list(distinct), []
    with torch.inference_mode():
        for start in range(0, len(texts), TEXT_BATCH):
            encoded = backbone.encode_text(texts[start : start + TEXT_BATCH])
            parts.append(encoded.float().cpu().numpy())
    features = np.concatenate(parts)
    index = np.asarray([[distinct[text] for text in row] for row in prompts])
    found: npt.NDArray[np.float32] = features[index]
    return found


def text_array_name(cache: Cache, texts: Sequence[str]) -> str:
    """Array that holds the features of one template's C sentences."""
    weights, precision = cache.identity.backbone.weights, cache.identity.precision
    return f"class_text/{fingerprint([list(texts), weights, precision])}"


def ensemble(prompts: Tensor, weights: Sequence[float] | None = None) -> Tensor:
    """(C, P) unit class vectors: templates normalised, averaged, normalised again.

    Reference: Radford et al., Learning Transferable Visual Models From Natural Language
    Supervision, 2021, section 3.1.4.

    Args:
        prompts: (T, C, P) float32, not normalised.
        weights: T shares of the mean, each 0 or more; None = equal.
    """
    unit = F.normalize(prompts, dim=-1)
    if weights is None:
        return F.normalize(unit.mean(0), dim=-1)
    share = torch.as_tensor(weights, dtype=unit.dtype, device=unit.device)
    return F.normalize(torch.einsum("t,tcp->cp", share / share.sum(), unit), dim=-1)


def recorded_backbone(cache: Cache) -> BackboneConfig:
    """The options that opened the encoder which wrote a cache.

    Raises:
        CacheError: if this installation does not know that kind.
    """
    record = cache.attributes["backbone"]
    if record.get("kind") not in BACKBONES:
        raise CacheError(
            f"{cache.path}: written by backbone kind {record.get('kind')!r}, this installation has "
            f"{', '.join(BACKBONES)}; install the extra that brings it"
        )
    return BACKBONES[record["kind"]].model_validate(record)


def open_cache_backbone(
    cache: Cache, device: str = "cpu", precision: Precision | None = None
) -> Backbone:
    """The encoder that wrote a cache, from the options recorded in it.

    Args:
        cache: an opened cache.
        device: where to put it.
        precision: None = the cache's own.

    Raises:
        CacheError: if this installation does not know it.
        BackboneError: if its weights are not where they were.
        CacheMismatchError: if other weights lie there now.
    """
    config = recorded_backbone(cache)
    backbone = config.open(device, precision or cache.identity.precision)
    require_backbone(cache, backbone)
    return backbone


def open_prompt_tower(cache: Cache, device: str = "cpu") -> PromptTower:
    """The text tower of the encoder that wrote a cache, in float32, to learn prompts in.

    Raises:
        ConfigError: if several caches are joined: each has a tower of its own.
        BackboneError: if the tower takes no token embeddings, or its weights are not there.
        CacheMismatchError: if other weights lie there now.
    """
    if len(cache.parts) > 1:
        raise ConfigError(
            f"{cache.path}: prompts are learned in one text tower, a join of {len(cache.parts)} "
            "caches has as many; train on one cache, or take head lmpt"
        )
    return open_cache_backbone(cache.parts[0], device, "fp32").prompt_tower()


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
