"""Faults of earlier training programs, each shown to be gone from a whole training."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from featcache.adapter_folder import attach, read_adapter
from featcache.backbones.open_clip import OpenClipConfig, _published_pixels
from featcache.images import load_pixels
from finetune.train import TrainConfig, run
from finetune.tuning import loop as tuning_loop
from finetune.tuning.loop import Fit

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of 12 train, 6 val and 6 test pictures, bright and dark, and an architecture."""
    folder = tmp_path_factory.mktemp("toy")
    random = np.random.default_rng(0)
    with (folder / "toy.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "split"])
        for row in range(24):
            pixels = random.integers(0, 128, (20, 24, 3), dtype=np.uint8) + np.uint8(row % 2 * 127)
            Image.fromarray(pixels).save(folder / f"{row}.png")
            split = "train" if row < 12 else "val" if row < 18 else "test"
            writer.writerow([f"{row}.png", ("dark", "bright")[row % 2], split])
    (folder / "faults-toy.json").write_text(json.dumps(TINY))
    return folder


def config(toy: Path, out: Path, **changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "dataset": {"kind": "table", "file": str(toy / "toy.csv")},
        "backbone": {"model": str(toy / "faults-toy.json"), "pretrained": "random:3"},
        "out": str(out),
        "adapter": {"kind": "lora", "rank": 2},
        "optim": {"lr": 1e-2, "epochs": 3, "batch_size": 6},
        "head": {"lr": 1e-2},
        "device": "cpu",
        "quiet": True,
        "report": False,
    }
    return TrainConfig.model_validate({**values, **changes})


def test_f25_the_best_adapter_and_the_best_head_are_of_one_epoch(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of four epochs is made the best: both must be that epoch's, not the last's."""
    after: list[dict[str, torch.Tensor]] = []
    save, measure = Fit.save, tuning_loop.measure

    def noting(fitted: Fit, path: Path) -> None:
        after.append(fitted.tuned.copied())
        save(fitted, path)

    def second_best(*options: Any) -> Any:
        measured = measure(*options)
        values = [0.5, 0.9, 0.7, 0.6]
        measured.accuracy["cls"] = values[len(after)]
        return measured

    monkeypatch.setattr(Fit, "save", noting)
    monkeypatch.setattr(tuning_loop, "measure", second_best)
    out = tmp_path / "out"
    optim = {"lr": 1e-2, "epochs": 4, "batch_size": 6}
    run(config(toy, out, optim=optim, stop={"patience": 10}))
    assert len(after) == 4
    best, last = after[1], after[3]
    adapter = load_file(out / "adapter.safetensors")
    written = {f"adapter/{name}": tensor for name, tensor in adapter.items()}
    assert written.keys() == {name for name in best if name.startswith("adapter/")}
    for name, tensor in written.items():
        assert torch.equal(tensor, best[name]), name
        assert not torch.equal(tensor, last[name]), "the epochs do not differ: nothing is shown"
    head = load_file(next((out / "head").glob("*.safetensors")))
    weights = [tensor for name, tensor in best.items() if tensor.shape == (2, 16)]
    assert len(weights) == 1, "one matrix of two classes and 16 features"
    found = [tensor for tensor in head.values() if tensor.numel() == weights[0].numel()]
    assert [torch.equal(tensor.view(2, 16), weights[0]) for tensor in found] == [True]


def test_f50_f51_a_result_holds_the_trained_tensors_alone_and_no_pickle(
    toy: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run(config(toy, out, optim={"lr": 1e-2, "epochs": 1, "batch_size": 6}))
    files = [file for file in out.rglob("*") if file.is_file()]
    plain = {".json", ".jsonl", ".yaml", ".csv", ".png", ".html", ".safetensors"}
    assert {file.suffix for file in files} <= plain
    starts = {file.read_bytes()[:2] for file in files}
    assert not starts & {b"PK", b"\x80\x02", b"\x80\x04", b"\x80\x05"}, "a pickle or a zip of one"
    base = OpenClipConfig(model=str(toy / "faults-toy.json"), pretrained="random:3").open()
    held = read_adapter(out)
    adapter = attach(held, base)
    count = sum(tensor.numel() for tensor in adapter.state().values())
    # Two blocks: A of q, k, v (3r x 32) and out (r x 32), B of as many rows.
    assert count == 2 * (3 * 2 * 32 + 3 * 32 * 2 + 2 * 32 + 32 * 2)
    assert (out / "adapter.safetensors").stat().st_size < 4 * count + 2048


def test_f19_a_clip_tower_gets_clips_own_pixels(toy: Path) -> None:
    for name in ("ViT-B-32", "ViT-B-16", "RN50"):
        published = _published_pixels(name)
        assert published["mean"] == open_clip.OPENAI_DATASET_MEAN
        assert (published["resize_mode"], published["interpolation"]) == ("shortest", "bicubic")
    backbone = OpenClipConfig(model=str(toy / "faults-toy.json"), pretrained="random:3").open()
    towers = backbone.trainable()
    file = toy / "0.png"
    with Image.open(file) as image:
        wide = image.resize((40, 20))  # a squash would show
    wide.save(file.with_name("wide.png"))
    transform = open_clip.image_transform(16, is_train=False)
    with torch.no_grad():
        expected = backbone.model.encode_image(transform(wide.convert("RGB"))[None])
        pixels = load_pixels((toy / "wide.png").read_bytes(), backbone.spec.pixels)
        found = towers.encode_image(pixels)
        normal = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        mean, std = (one[:, None, None] for one in normal)
        squashed = pixels.float() / 255
        foreign = backbone.model.encode_image((squashed - mean) / std)
    difference = (found - expected).abs().max()
    assert difference < 0.05 * (foreign - expected).abs().max()
