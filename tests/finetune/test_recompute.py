"""Recomputing activations changes neither gradients nor running statistics."""

import copy

import pytest
import torch
from torch import nn

from finetune.contrastive.architectures import build
from finetune.recompute import recompute_blocks

from .toy_pretraining import TINY_RN, TINY_VIT


@pytest.mark.parametrize(("config", "blocks"), [(TINY_VIT, 2), (TINY_RN, 5)])
def test_recomputed_equals_kept(config: dict[str, object], blocks: int) -> None:
    torch.manual_seed(0)
    kept = build(config).train()
    recomputed = copy.deepcopy(kept)
    assert recompute_blocks(recomputed) == blocks
    size = config["vision_cfg"]["image_size"]  # type: ignore[index]
    pixels, tokens = torch.randn(4, 3, size, size), torch.randint(1, 9, (4, 8))
    saved: list[int] = []
    for model in (kept, recomputed):
        numbers: list[int] = []

        def count(tensor: torch.Tensor, numbers: list[int] = numbers) -> torch.Tensor:
            numbers.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = model.encode_image(pixels).square().sum() + model.encode_text(tokens).sum()
        loss.backward()
        saved.append(sum(numbers))
    assert saved[1] < 0.6 * saved[0]  # weights are among them
    for (name, one), (_, other) in zip(
        kept.named_parameters(), recomputed.named_parameters(), strict=True
    ):
        if one.grad is None:
            assert other.grad is None, name
        else:
            torch.testing.assert_close(other.grad, one.grad, atol=1e-6, rtol=1e-4)
    for (name, one), (_, other) in zip(
        kept.named_buffers(), recomputed.named_buffers(), strict=True
    ):
        assert torch.equal(one, other), name
    assert all(isinstance(part, nn.Module) for part in recomputed.modules())
