"""Dual encoders from scratch: which architecture, and how to build it.

An architecture is a name that open_clip knows (`RN50`, `ViT-B-32`), one of the small `PRESETS`, or
the path of a JSON file with `embed_dim`, `vision_cfg` and `text_cfg`.
"""

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
from torch import Tensor, nn

from featcache.errors import ConfigError

INITIAL_LOGIT_SCALE = math.log(1 / 0.07)
"""What open_clip starts from, if a configuration says nothing."""

Tokenizer = Callable[[list[str]], Tensor]
"""Texts to (n, context length) int64 token ids; longer texts are cut and keep their end token."""

PRESETS: dict[str, dict[str, Any]] = {
    "demo-rn": {
        "embed_dim": 128,
        "vision_cfg": {
            "image_size": 64,
            "layers": [1, 1, 1, 1],
            "width": 24,
            "head_width": 64,
            "patch_size": None,
        },
        "text_cfg": {
            "context_length": 32,
            "vocab_size": 49408,
            "width": 128,
            "heads": 2,
            "layers": 2,
        },
    },
    "demo-vit": {
        "embed_dim": 128,
        "vision_cfg": {
            "image_size": 64,
            "layers": 4,
            "width": 192,
            "head_width": 64,
            "patch_size": 16,
        },
        "text_cfg": {
            "context_length": 32,
            "vocab_size": 49408,
            "width": 128,
            "heads": 2,
            "layers": 2,
        },
    },
    "rn50-6": {
        "embed_dim": 1024,
        "vision_cfg": {
            "image_size": 224,
            "layers": [3, 4, 6, 3],
            "width": 64,
            "head_width": 64,
            "patch_size": None,
        },
        "text_cfg": {
            "context_length": 77,
            "vocab_size": 49408,
            "width": 512,
            "heads": 8,
            "layers": 6,
        },
    },
}
"""demo-rn, demo-vit: towers for 64 × 64 pixel images that learn within a minute or two on two CPU
cores. rn50-6: CLIP's RN50 with half the layers in its text tower, 83 M parameters."""


def model_config(
    architecture: str, image_size: int | None = None, context_length: int | None = None
) -> dict[str, Any]:
    """The open_clip model configuration behind a name or file.

    Args:
        architecture: preset, open_clip name, or path ending in `.json`.
        image_size: pixels; overrides the configuration's.
        context_length: tokens; overrides the configuration's.

    Raises:
        ConfigError: unknown name, unreadable file, or an architecture that needs what is not
            offered here (a tokenizer from the hub, a captioning decoder).
    """
    if architecture.endswith(".json"):
        config = _read_json(Path(architecture))
    elif architecture in PRESETS:
        config = copy.deepcopy(PRESETS[architecture])
    else:
        found: dict[str, Any] | None = open_clip.get_model_config(architecture.replace("/", "-"))
        if found is None:
            raise ConfigError(
                f"architecture: {architecture!r} is neither a preset ({', '.join(PRESETS)}), an "
                "open_clip name (python -c 'import open_clip; print(open_clip.list_models())') "
                "nor a .json file"
            )
        config = found
    check_dual_encoder(architecture, config)
    text = config["text_cfg"]
    if image_size is not None:
        config["vision_cfg"]["image_size"] = image_size
    if context_length is not None:
        text["context_length"] = context_length
    vision = config["vision_cfg"]
    if vision.get("timm_model_pretrained"):
        vision["timm_model_pretrained"] = False  # never a silent download of other weights
    return config


def check_dual_encoder(name: str, config: dict[str, Any]) -> None:
    """Checks that a configuration is of two towers with CLIP's own tokenizer.

    Raises:
        ConfigError: if not.
    """
    text = config["text_cfg"]
    if text.get("hf_model_name") or text.get("hf_tokenizer_name"):
        raise ConfigError(
            f"architecture: {name} takes its text tower or tokenizer from a model hub; "
            "pretraining knows architectures with CLIP's own tokenizer (RN50, ViT-B-32, …)"
        )
    if "multimodal_cfg" in config:
        raise ConfigError(
            f"architecture: {name} has a captioning decoder, which InfoNCE does not train; "
            "choose a dual encoder (RN50, ViT-B-32, …)"
        )


def with_logits(config: dict[str, Any], scale: float, bias: float | None) -> dict[str, Any]:
    """The configuration with the logit scale and bias that training starts from.

    Args:
        config: open_clip model configuration; not changed.
        scale: natural logarithm of the scale.
        bias: None = the model has none.
    """
    config = {k: v for k, v in config.items() if k not in ("init_logit_scale", "init_logit_bias")}
    if scale != INITIAL_LOGIT_SCALE:
        config["init_logit_scale"] = scale
    if bias is not None:
        config["init_logit_bias"] = bias
    return config


def build(config: dict[str, Any]) -> nn.Module:
    """The model with open_clip's own initialisation, from torch's global random generator.

    Args:
        config: what `model_config` returned; not changed.

    Raises:
        ConfigError: if open_clip refuses the configuration.
    """
    arguments = copy.deepcopy(config)
    custom_text = arguments.pop("custom_text", False)
    model_class = open_clip.CustomTextCLIP if custom_text else open_clip.CLIP
    try:
        model: nn.Module = model_class(**arguments)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"architecture: open_clip cannot build it: {reason}") from None
    return model


def tokenizer(config: dict[str, Any]) -> Tokenizer:
    """CLIP's byte-pair tokenizer at the architecture's context length."""
    text = config["text_cfg"]
    length = text.get("context_length", 77)
    made: Tokenizer = open_clip.SimpleTokenizer(
        context_length=length, **text.get("tokenizer_kwargs", {})
    )
    return made


def image_size(model: nn.Module) -> tuple[int, int]:
    """Height and width in pixels that the image tower takes."""
    size = model.visual.image_size  # type: ignore[union-attr]
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))  # type: ignore


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ConfigError(f"architecture: {file}: no such file")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"architecture: {file}: not JSON ({error})") from None
    if isinstance(config, dict):
        config = config.get("model_cfg", config)
    missing = [
        name
        for name in ("embed_dim", "vision_cfg", "text_cfg")
        if not isinstance(config, dict) or name not in config
    ]
    if missing:
        raise ConfigError(f"architecture: {file}: no {', '.join(missing)}; see open_clip's configs")
    return dict(config)
