"""A batch in chunks gives the gradients of the batch at once."""

from typing import Any

import pytest
import torch
from torch import Tensor

from finetune.contrastive.gradient_cache import batch_norms, contrastive_step
from finetune.parallel import PairTowers, spread
from heads.distributed import Group

from .pairs import LOSSES, NUM_PAIRS, dual_encoder, gradients, normalised, pairs, whole_batch

ALONE = Group(0, 1, torch.device("cpu"))


def step(model: Any, kind: str, sizes: list[int], seed: int = 3, **options: Any) -> Tensor:
    """`contrastive_step` over all pairs in chunks of the given sizes."""
    towers = spread(PairTowers(model), ALONE)
    chunks = list(zip(*(side.split(sizes) for side in pairs()), strict=True))
    torch.manual_seed(seed)
    return contrastive_step(
        towers,
        lambda chunk: normalised(towers(*chunk)),
        chunks,
        lambda images, texts: LOSSES[kind].loss(images, texts, model.logit_scale, model.logit_bias),
        **options,
    )


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("sizes", [[NUM_PAIRS], [4, 4, 4], [5, 7], [1] * NUM_PAIRS])
def test_chunks_equal_one_large_batch(kind: str, sizes: list[int]) -> None:
    model, other = dual_encoder(kind), dual_encoder(kind)
    loss, expected = step(model, kind, sizes), whole_batch(other, kind)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for (name, found), wanted in zip(
        gradients(model).items(), gradients(other).values(), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12, msg=name)


def test_plain_accumulation_would_be_another_loss() -> None:
    """Why chunks need more than adding gradients up: negatives of other chunks would be lost."""
    model, other = dual_encoder("info_nce"), dual_encoder("info_nce")
    step(model, "info_nce", [6, 6])
    for half in (slice(0, 6), slice(6, 12)):
        pixels, tokens = (side[half] for side in pairs())
        images, texts = normalised((other.encode_image(pixels), other.encode_text(tokens)))  # type: ignore[operator]
        (LOSSES["info_nce"].loss(images, texts, other.logit_scale) / 2).backward()  # type: ignore[arg-type]
    found, accumulated = (gradients(one)["visual.proj"] for one in (model, other))
    assert (found - accumulated).norm() > 0.1 * found.norm()


@pytest.mark.parametrize(
    "vision",
    [
        {"patch_dropout": 0.5},  # draws at random
        {"layers": [1, 1, 1, 1], "width": 4, "patch_size": None, "image_size": 32},
    ],
    ids=["dropout", "batch_norm"],
)
def test_both_encodings_of_a_chunk_are_the_same(vision: dict[str, Any]) -> None:
    """Against one graph over all chunks, each encoded once: no repeated pass to go wrong."""
    model, other = (dual_encoder("info_nce", **vision) for _ in range(2))
    pixels, tokens = pairs()
    if vision.get("image_size") == 32:
        pixels = pixels.repeat(1, 1, 2, 2)
    chunks = [(pixels[:5], tokens[:5]), (pixels[5:], tokens[5:])]
    towers = spread(PairTowers(model), ALONE)
    torch.manual_seed(3)
    loss = contrastive_step(
        towers,
        lambda chunk: normalised(towers(*chunk)),
        chunks,
        lambda images, texts: LOSSES["info_nce"].loss(images, texts, model.logit_scale),  # type: ignore[arg-type]
    )
    torch.manual_seed(3)
    once = PairTowers(other)
    parts = [normalised(once(*chunk)) for chunk in chunks]
    images, texts = (torch.cat(side) for side in zip(*parts, strict=True))
    expected = LOSSES["info_nce"].loss(images, texts, other.logit_scale)  # type: ignore[arg-type]
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=0)
    for (name, found), wanted in zip(
        gradients(model).items(), gradients(other).values(), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12, msg=name)
    for (name, buffer), wanted in zip(model.named_buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(buffer, wanted, rtol=1e-12, atol=0, msg=name)
    assert bool(batch_norms(model)) == isinstance(vision.get("layers"), list)
    assert batch_norms(model.eval()) == []


def test_draws_go_on_behind_a_step() -> None:
    """What follows a step must not repeat the draws of the step."""
    model = dual_encoder("info_nce", patch_dropout=0.5)
    step(model, "info_nce", [6, 6])
    behind = torch.rand(3)
    torch.manual_seed(3)
    assert not torch.equal(torch.rand(3), behind)


def test_a_scaled_loss_scales_every_gradient_and_not_the_value() -> None:
    model, other = dual_encoder("info_nce"), dual_encoder("info_nce")
    loss = step(model, "info_nce", [6, 6], scaled=lambda value: value * 1024)
    assert loss == step(other, "info_nce", [6, 6])
    for found, wanted in zip(gradients(model).values(), gradients(other).values(), strict=True):
        torch.testing.assert_close(found, wanted * 1024)


def test_an_autocast_around_the_step_does_not_lose_gradients() -> None:
    """Casts of weights made in the pass without gradients would be found again in the other."""
    model = dual_encoder("info_nce").float()
    towers = spread(PairTowers(model), ALONE)
    pixels, tokens = pairs()
    chunks = [(pixels[i : i + 6].float(), tokens[i : i + 6]) for i in (0, 6)]
    with torch.autocast("cpu", torch.bfloat16):
        contrastive_step(
            towers,
            lambda chunk: normalised(towers(*chunk)),
            chunks,
            lambda images, texts: LOSSES["info_nce"].loss(images, texts, model.logit_scale),  # type: ignore[arg-type]
        )
    assert all(grad.abs().sum() > 0 for grad in gradients(model).values())


def test_no_chunk_is_refused() -> None:
    towers = spread(PairTowers(dual_encoder("info_nce")), ALONE)
    with pytest.raises(ValueError, match="no chunk"):
        contrastive_step(towers, lambda chunk: normalised(towers(*chunk)), [], torch.dot)
