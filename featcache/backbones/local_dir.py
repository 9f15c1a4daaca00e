"""A folder that open_clip opens: `open_clip_config.json` and `open_clip_model.safetensors`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from featcache.backbones.base import PixelSpec


def save_local_dir(
    folder: Path, state: Mapping[str, Tensor], config: dict[str, Any], pixels: PixelSpec
) -> None:
    """Writes what `open_clip.create_model_from_pretrained("local-dir:FOLDER")` opens.

    Args:
        folder: existing folder.
        state: tensors by name of a model built from `config`, on any device.
        config: open_clip model configuration.
        pixels: preprocessing that the model was trained with.
    """
    preprocess = {
        "size": list(pixels.size),
        "mode": "RGB",
        "mean": list(pixels.mean),
        "std": list(pixels.std),
        "interpolation": pixels.interpolation,
        "resize_mode": pixels.resize_mode,
        "fill_color": pixels.fill_color,
    }
    text = json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}, indent=2)
    (folder / "open_clip_config.json").write_text(text + "\n", encoding="utf-8")
    plain = {
        name: tensor.detach().to("cpu", copy=True).contiguous(memory_format=torch.contiguous_format)
        for name, tensor in state.items()
    }
    # Not save_file: it leaves a file that only its owner may read, whatever the umask.
    (folder / "open_clip_model.safetensors").write_bytes(save(plain, metadata={"format": "pt"}))


def readable_by_all(weights: Path) -> None:
    """Gives a file that a library wrote by `save_file` the mode that the umask gives any other.

    Args:
        weights: in a folder with a config.json, which was written in the ordinary way.
    """
    weights.chmod((weights.parent / "config.json").stat().st_mode)
