"""Coloured pictures with captions, and two small architectures: pretraining within a second."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from finetune.pretrain import PretrainConfig

COLORS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220)}

TINY_VIT = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
TINY_RN = {
    **TINY_VIT,
    "vision_cfg": {
        "image_size": 32,
        "layers": [1, 1, 1, 1],
        "width": 8,
        "head_width": 16,
        "patch_size": None,
    },
}


def write_toy(folder: Path) -> Path:
    """A table of 36 + 12 pictures with captions, and the architectures beside it."""
    random = np.random.default_rng(0)
    with (folder / "toy.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "split", "caption"])
        for row in range(48):
            name = list(COLORS)[row % 3]
            noise = random.integers(-25, 26, (20, 24, 3))
            pixels = (np.asarray(COLORS[name]) + noise).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{row}.png")
            extra = "on a table" if row % 2 else "in the sun"
            split = "train" if row < 36 else "val"
            writer.writerow([f"{row}.png", name, split, f"a {name} thing {extra}"])
    (folder / "vit.json").write_text(json.dumps(TINY_VIT))
    (folder / "rn.json").write_text(json.dumps(TINY_RN))
    return folder


def toy_config(toy: Path, **changes: Any) -> PretrainConfig:
    """40 steps of 8 pictures with the small transformer."""
    values: dict[str, Any] = {
        "dataset": {"kind": "table", "file": str(toy / "toy.csv")},
        "architecture": str(toy / "vit.json"),
        "out": str(toy / "out"),
        "steps": 40,
        "batch_size": 8,
        "log_every": 10,
        "validate_every": 0,
        "optim": {"lr": 5e-3},
        "precision": "fp32",
        "device": "cpu",
        "loading": {"num_readers": 2},
    }
    return PretrainConfig.model_validate({**values, **changes})
