"""Fine-tuning on toy pictures: learns, repeats, restores the best, and what it leaves is usable."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from featcache import extract
from featcache.extract_config import ExtractConfig
from finetune.train import TrainConfig, run
from heads import evaluate, predict

COLORS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220)}

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of 48 train, 12 val and 12 test pictures of three colours, and an architecture."""
    folder = tmp_path_factory.mktemp("toy")
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
        "head": {"lr": 1e-2, "scaling": "l2"},
        "device": "cpu",
    }
    return TrainConfig.model_validate({**values, **changes})


@pytest.fixture(scope="module")
def trained(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the image tower and a head."""
    out = tmp_path_factory.mktemp("trained") / "out"
    run(config(toy, out))
    return out


def metrics_of(out: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((out / "metrics.json").read_text())
    return values


def test_learns_and_reports_both_accuracies_of_all_parts(trained: Path) -> None:
    values = metrics_of(trained)
    assert values["test_acc_cls"] > 0.9
    for part in ("train", "val", "test"):
        assert 0 <= values[f"{part}_acc_txt"] <= 1
    assert sorted(path.name for path in trained.iterdir()) == [
        "adapter.json",
        "adapter.safetensors",
        "config.yaml",
        "curves.png",
        "head",
        "history.jsonl",
        "metrics.json",
        "report.html",
        "train.json",
    ]


def test_head_folder_predicts_and_evaluates_as_training_reported(
    toy: Path, trained: Path, tmp_path: Path
) -> None:
    """From images, and from a cache that the adapted backbone extracted."""
    values = metrics_of(trained)
    found = predict.run(
        predict.PredictConfig(run=trained / "head", images=toy, out=tmp_path / "p.csv", quiet=True)
    ).table.set_index("id")["class_1"]
    with (toy / "toy.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "test"]
    right = [found[row["path"]] == row["label"] for row in rows]
    assert np.mean(right) == values["test_acc_cls"]
    extract.run(
        ExtractConfig.model_validate(
            {
                "dataset": {"kind": "table", "file": str(toy / "toy.csv")},
                "backbone": {"kind": "adapted", "model": str(trained)},
                "cache": str(tmp_path / "cache"),
                "precision": "fp32",
                "device": "cpu",
            }
        )
    )
    for split in ("val", "test"):
        scores = evaluate.run(
            evaluate.EvaluateConfig(run=trained / "head", cache=tmp_path / "cache", split=split)
        )
        assert scores.metrics["top1"] == values[f"{split}_acc_cls"]
