"""Two processes over gloo give the losses, gradients and steps of one with the whole batch."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from featcache.errors import ConfigError
from finetune import pretrain
from finetune.optim import param_groups
from finetune.parallel import PairTowers, alike_groups, all_rows, clip_norm, put, spread, whole
from finetune.pretrain import PretrainConfig
from heads.distributed import Group

from ..together import free_port, run_together
from .pairs import (
    DIM,
    LOSSES,
    NUM_PAIRS,
    TEXT,
    VISION,
    dual_encoder,
    features,
    gradients,
    whole_batch,
)

ALONE = Group(0, 1, torch.device("cpu"))


RUNS: dict[str, dict[str, Any]] = {
    "ddp": {"strategy": "ddp", "loss": {"kind": "info_nce"}, "accumulate": 2},
    "fsdp": {"strategy": "fsdp", "loss": {"kind": "siglip"}},
}
"""Pretrainings by two processes, and what they are asked for besides `pretraining`."""


def pretraining(folder: Path, name: str, **options: Any) -> PretrainConfig:
    """A few steps on 24 noise pictures, which are made if need be."""
    table = folder / "pairs.csv"
    if not table.exists():
        random = np.random.default_rng(0)
        rows = ["path,label,split,caption"]
        for row in range(24):
            pixels = random.integers(0, 256, (18, 18, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{row}.png")
            rows.append(f"{row}.png,noise,{'train' if row < 16 else 'val'},noise number {row}")
        table.write_text("\n".join(rows))
        model = {
            "embed_dim": DIM,
            "vision_cfg": VISION,
            "text_cfg": {**TEXT, "vocab_size": 49408},
        }
        (folder / "model.json").write_text(json.dumps(model))
    values = {
        "dataset": {"kind": "table", "file": str(table)},
        "architecture": str(folder / "model.json"),
        "out": str(folder / name),
        "steps": 3,
        "batch_size": 8,
        "log_every": 1,
        # Not the usual one: it makes a whole step of a gradient that is zero but for rounding.
        # No decay either: whole embeddings, as shards are, decay in words that never occur too.
        "optim": {"lr": 1e-2, "eps": 1e-3, "weight_decay": 0.0},
        "precision": "fp32",
        "device": "cpu",
    }
    return PretrainConfig.model_validate({**values, **options})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What each of two processes found and trained; see `parallel_worker`."""
    folder = tmp_path_factory.mktemp("parallel")
    jobs: list[str] = []
    for name, options in RUNS.items():
        file = folder / f"{name}.yaml"
        file.write_text(pretraining(folder, name, **options).to_yaml())
        jobs += [str(file), str(free_port())]
    worker = Path(__file__).parent / "parallel_worker.py"
    ends = run_together(2, str(worker), str(folder), *jobs)
    assert [status for _, _, status in ends] == [0, 0], ends[0][1] + ends[1][1]
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, Tensor]]:
    """What each process found."""
    return [load_file(folder / f"{rank}.safetensors") for rank in range(2)]


@pytest.mark.parametrize("form", ["whole", "rows", "open_clip"])
@pytest.mark.parametrize("kind", LOSSES)
def test_loss_and_gradients_by_features_are_those_of_the_whole_batch(
    found: list[dict[str, Tensor]], kind: str, form: str
) -> None:
    """open_clip's own losses over two processes, which autograd sees through, agree too."""
    sides = [features(NUM_PAIRS, seed).requires_grad_() for seed in (0, 1)]
    scale = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    bias = torch.tensor(-2.0, dtype=torch.float64, requires_grad=True)
    learned = [scale, bias] if kind == "siglip" else [scale]
    loss = LOSSES[kind].loss(*sides, *learned)
    loss.backward()
    expected = {"loss": loss.detach(), "scale": scale.grad}
    if kind == "siglip":
        expected["bias"] = bias.grad
    for rank, own in enumerate(found):
        wanted = {
            **expected,
            "images": sides[0].grad.chunk(2)[rank],  # type: ignore[union-attr]
            "texts": sides[1].grad.chunk(2)[rank],  # type: ignore[union-attr]
        }
        for name, value in wanted.items():
            torch.testing.assert_close(
                own[f"{kind}.{form}.{name}"], value, rtol=1e-10, atol=1e-12, msg=f"{rank} {name}"
            )


@pytest.mark.parametrize("num_chunks", [1, 3])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("kind", LOSSES)
def test_a_step_has_the_gradients_of_one_process_with_the_whole_batch(
    found: list[dict[str, Tensor]], kind: str, strategy: str, num_chunks: int
) -> None:
    model = dual_encoder(kind)
    wanted = {"loss": whole_batch(model, kind), **gradients(model)}
    for rank, own in enumerate(found):
        for name, value in wanted.items():
            torch.testing.assert_close(
                own[f"{kind}.{strategy}.{num_chunks}.{name}"],
                value,
                rtol=1e-9,
                atol=1e-12,
                msg=f"process {rank}: {name}",
            )


def test_shards_train_and_go_on_from_a_saved_state_as_one_process(
    found: list[dict[str, Tensor]],
) -> None:
    model: Any = dual_encoder("siglip")
    optimizer = torch.optim.AdamW(param_groups(model, 0.1), lr=1e-2)
    for part in range(2):
        optimizer.zero_grad()
        whole_batch(model, "siglip")
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        assert norm > 1, "else the limit was not tried"
        optimizer.step()
        for own in found:
            torch.testing.assert_close(own[f"norm.{part}"], norm, rtol=1e-9, atol=0)
            assert own[f"clipped.{part}"].item() == pytest.approx(0.1, rel=1e-4)
            assert own[f"share.{part}"] < 0.6, "each process holds about half of the weights"
    for own in found:
        for name, value in model.state_dict().items():
            torch.testing.assert_close(own[f"trained.{name}"], value, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", RUNS)
def test_pretraining_by_two_processes_is_that_of_one(folder: Path, name: str) -> None:
    """Gradient caching and shards included: same losses, same weights, one result folder."""
    report = pretrain.run(pretraining(folder, f"{name}-alone", loss=RUNS[name]["loss"]))
    alone, together = (
        [json.loads(line) for line in (where / "history.jsonl").read_text().splitlines()]
        for where in (report.folder, folder / name)
    )
    assert len(alone) == len(together) == 3
    for one, other in zip(alone, together, strict=True):
        for key in ("loss", "grad_norm", "logit_scale"):
            assert other[key] == pytest.approx(one[key], rel=1e-5), key
    assert alone[0]["loss"] - alone[-1]["loss"] > 0.01, "else it has not trained"
    assert together[-1]["validation"] == pytest.approx(alone[-1]["validation"], abs=1e-6)
    weights = [
        load_file(where / "open_clip_model.safetensors") for where in (report.folder, folder / name)
    ]
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, rtol=1e-4, atol=1e-5, msg=key)


def test_shards_in_float16_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"no loss scaling for fp16.*bf16"):
        pretrain.run(pretraining(folder, "fp16", strategy="fsdp", precision="fp16"))


def test_a_process_alone_keeps_its_module() -> None:
    model = dual_encoder("info_nce")
    towers = spread(PairTowers(model), ALONE, strategy="fsdp")
    assert towers.module is not model
    assert not any(hasattr(parameter, "placements") for parameter in model.parameters())
    values = features(4, 0).requires_grad_()
    assert torch.equal(all_rows(values, ALONE), values)
    assert not all_rows(values, ALONE).requires_grad


def test_whole_tensors_are_left_as_they_are() -> None:
    value = torch.arange(3.0)
    assert whole(value) is value
    target = nn.Parameter(torch.zeros(3))
    put(target, value)
    assert torch.equal(target.detach(), value)
    groups = [{"params": [target], "weight_decay": 0.5}, {"params": [], "weight_decay": 0.0}]
    assert alike_groups(groups) == groups


def test_clipping_plain_gradients_is_torch_s() -> None:
    parameters = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2, 2))]
    parameters[0].grad, parameters[1].grad = torch.ones(3), torch.ones(2, 2)
    assert clip_norm(parameters, float("inf")).item() == pytest.approx(7**0.5)
    assert clip_norm(parameters, 1.0).item() == pytest.approx(7**0.5)
    assert clip_norm(parameters, 1.0).item() == pytest.approx(1.0, rel=1e-5)
