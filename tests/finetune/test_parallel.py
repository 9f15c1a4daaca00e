"""Two processes over gloo give the losses, gradients and steps of one with the whole batch."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from finetune.optim import param_groups
from finetune.parallel import PairTowers, alike_groups, all_rows, clip_norm, put, spread, whole
from heads.distributed import Group

from ..together import run_together
from .pairs import LOSSES, NUM_PAIRS, dual_encoder, features, gradients, whole_batch

ALONE = Group(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    """What each of two processes found; see `parallel_worker`."""
    folder = tmp_path_factory.mktemp("parallel")
    ends = run_together(2, str(Path(__file__).parent / "parallel_worker.py"), str(folder))
    assert [status for _, _, status in ends] == [0, 0], ends[0][1] + ends[1][1]
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
