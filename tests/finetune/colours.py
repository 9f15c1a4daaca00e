"""Pictures of three colours, and fine-tuning of a tiny CLIP on them."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from finetune.train import TrainConfig

COLORS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220)}

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


def make(folder: Path) -> Path:
    """A table of 48 train, 12 val and 12 test pictures of three colours, and an architecture."""
    random = np.random.default_rng(0)
    with (folder / "toy.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "split"])
        for row in range(72):
            name = list(COLORS)[row % 3]
            noise = random.integers(-60, 61, (20, 24, 3))
            pixels = (np.asarray(COLORS[name]) + noise).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{row}.png")
            split = "train" if row < 48 else "val" if row < 60 else "test"
            writer.writerow([f"{row}.png", name, split])
    (folder / "finetune-toy.json").write_text(json.dumps(TINY))
    return folder


def config(toy: Path, out: Path, **changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "dataset": {"kind": "table", "file": str(toy / "toy.csv")},
        "backbone": {"model": str(toy / "finetune-toy.json"), "pretrained": "random:3"},
        "out": str(out),
        "adapter": "full",
        "optim": {"lr": 1e-3, "epochs": 3, "batch_size": 16},
        "head": {"lr": 1e-2, "scaling": "l2", "fit_first": False},
        "device": "cpu",
        "report": False,
    }
    return TrainConfig.model_validate({**values, **changes})


def history_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
