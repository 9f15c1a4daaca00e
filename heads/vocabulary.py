"""Text features of class names: of the classes trained on, and of others by name alone."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from featcache.caption_means import unit_rows
from featcache.class_text import class_text_features, open_cache_backbone
from featcache.errors import ConfigError
from featcache.reader import Cache
from heads.run_folder import LoadedRun


def class_prompts(cache: Cache, templates: Sequence[str], device: str) -> Tensor:
    """(T, C, P) float32 text features of a cache's class names, one for each template.

    They are kept in the cache, so that only the first call opens the backbone.

    Args:
        cache: one, or several joined; then the parts' features stand side by side, each of length
            1 as the image features are.
        templates: T format strings over class table columns.
        device: type of the device that encodes.
    """
    features = [
        class_text_features(one, templates, partial(open_cache_backbone, one, device))
        for one in cache.parts
    ]
    if len(features) > 1:
        features = [unit_rows(one) for one in features]
    return torch.from_numpy(np.concatenate(features, axis=-1))


def for_classes_of(run: LoadedRun, cache: Cache, device: torch.device) -> LoadedRun:
    """The run with the cache's classes in place of its own, if its head can be asked for any.

    The head itself is changed. A run whose classes are the cache's, or whose head knows its own
    only, is returned as it is; `LoadedRun.require_fits` then decides.

    Args:
        run: loaded.
        cache: with classes.
        device: its type encodes the names, unless the cache holds their features.

    Raises:
        ConfigError: if the tasks differ.
    """
    if cache.class_hash == run.record["class_hash"] or not run.head.any_classes:
        return run
    if cache.task != run.task:
        raise ConfigError(
            f"{cache.path}: the cache's task is {cache.task}, the head in {run.path} was trained "
            f"for {run.task}; choose a {run.task} cache"
        )
    run.head.replace_classes(class_prompts(cache, run.record["templates"], device.type))
    return replace(
        run,
        classes=cache.classes,
        record=run.record
        | {
            "class_hash": cache.class_hash,
            "classes": {str(name): column.tolist() for name, column in cache.classes.items()},
        },
    )


def unseen_classes(run: LoadedRun, cache: Cache) -> list[str]:
    """Names of a cache's classes that a run was not trained on."""
    known = set(run.class_names)
    return [name for name in map(str, cache.classes["name"]) if name not in known]
