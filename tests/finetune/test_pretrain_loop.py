"""A step of pretraining against open_clip's loss and torch's optimizer, without images."""

import math
from typing import Any, Literal, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss
from torch import Tensor, nn

from finetune.contrastive.loop import Training
from finetune.contrastive.pair_stream import Batch
from finetune.contrastive.text import TokenTable
from finetune.images.training_images import TrainingImages, VariedBatch
from finetune.losses import PairLossConfig
from finetune.losses.info_nce import InfoNceConfig
from finetune.losses.siglip import SiglipConfig
from finetune.optim import AdamWConfig
from heads.distributed import Group

from .pairs import NUM_PAIRS, dual_encoder, pairs

OPTIM = AdamWConfig(lr=1e-2, weight_decay=0.5, betas=(0.8, 0.9), eps=1e-3, clip_norm=0.02)


class Pixels:
    """Batches that are pixels already."""

    def inputs(self, batch: VariedBatch) -> Tensor:
        return batch.pixels


def batch() -> Batch:
    """All pairs; the first three images have one caption."""
    pixels = pairs()[0].float()
    which = np.arange(NUM_PAIRS)
    return Batch(0, VariedBatch(which, pixels, None), np.maximum(which, 2))


def training(
    model: nn.Module,
    loss: PairLossConfig | None = None,
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    optim: AdamWConfig = OPTIM,
    accumulate: int = 1,
) -> Training:
    ids = pairs()[1].numpy().astype(np.int32)
    texts = TokenTable(ids, np.full(NUM_PAIRS, ids.shape[1], np.int64))
    return Training(
        model,
        texts,
        cast(TrainingImages, Pixels()),
        loss or InfoNceConfig(),
        optim,
        group=Group(0, 1, torch.device("cpu")),
        precision=precision,
        accumulate=accumulate,
    )


def encoder(kind: str = "info_nce") -> Any:
    return dual_encoder(kind).float()


@pytest.mark.parametrize("accumulate", [1, 4])
def test_steps_are_open_clip_s_loss_and_torch_s_adamw(accumulate: int) -> None:
    model, other = encoder(), encoder()
    made = training(model, accumulate=accumulate)
    decayed = [p for p in other.parameters() if p.ndim > 1]
    plain = [p for p in other.parameters() if p.ndim < 2]
    groups = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, 1e-2, (0.8, 0.9), 1e-3, weight_decay=0.5)
    tokens = pairs()[1][batch().caption_ids]
    for _ in range(3):
        loss, norm = made.step(batch())
        optimizer.zero_grad()
        images = F.normalize(other.encode_image(batch().images.pixels), dim=-1)
        texts = F.normalize(other.encode_text(tokens), dim=-1)
        expected = ClipLoss()(images, texts, other.logit_scale.exp())
        expected.backward()
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=0)
        wanted = nn.utils.clip_grad_norm_(other.parameters(), 0.02)
        torch.testing.assert_close(norm, wanted, rtol=1e-4, atol=0)
        assert norm > 0.02, "else the limit was not tried"
        optimizer.step()
    for (name, found), value in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(found, value, rtol=1e-4, atol=2e-6, msg=name)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_limit_is_of_the_gradient_however_the_loss_is_scaled(
    precision: Literal["bf16", "fp16"],
) -> None:
    _, expected = training(encoder()).step(batch())
    made = training(encoder(), precision=precision)
    if precision == "fp16":  # its first scale overflows here, and the step is left out
        made.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    _, norm = made.step(batch())
    assert norm.item() == pytest.approx(expected.item(), rel=0.1)


def test_without_a_limit_gradients_are_only_measured() -> None:
    made = training(encoder(), optim=OPTIM.model_copy(update={"clip_norm": 0.0}))
    _, norm = made.step(batch())
    total = sum(float(p.grad.square().sum()) for p in made.parameters if p.grad is not None)
    assert norm.item() == pytest.approx(math.sqrt(total), rel=1e-5)


@pytest.mark.parametrize(("loss", "after"), [(InfoNceConfig(), math.log(100)), (SiglipConfig(), 6)])
def test_the_scale_is_put_back_after_every_step(loss: PairLossConfig, after: float) -> None:
    model = encoder(loss.kind)
    with torch.no_grad():
        model.logit_scale.fill_(6.0)
    training(model, loss, optim=OPTIM.model_copy(update={"lr": 1e-9})).step(batch())
    assert model.logit_scale.item() == pytest.approx(after, rel=1e-6)
