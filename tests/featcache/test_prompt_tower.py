from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from featcache.backbones.base import Backbone
from featcache.backbones.blip import BlipConfig
from featcache.backbones.open_clip import OpenClipConfig
from featcache.backbones.prompt_tower import ClipPromptTower, PromptTower
from featcache.errors import BackboneError

from ..conftest import TINY_CLIP

TEXTS = ["a dog.", "a photo of a red garden gnome", "!", "one two three four five six seven"]


@pytest.fixture(params=["open_clip", "blip"])
def backbone(request: pytest.FixtureRequest) -> Backbone:
    if request.param == "blip":
        folder = request.getfixturevalue("tiny_blip")
        return BlipConfig(model=str(folder), max_text_tokens=12).open()
    folder = request.getfixturevalue("tiny_clip")
    return OpenClipConfig(model=f"local-dir:{folder}").open()


def encoded(tower: PromptTower, texts: list[str]) -> torch.Tensor:
    ids, lengths = tower.tokenize(texts)
    return tower.encode(tower.embed(ids), lengths)


def test_the_three_steps_make_encode_text(backbone: Backbone) -> None:
    tower = backbone.prompt_tower()
    assert tower.tokenize(TEXTS).lengths.unique().numel() > 2, "texts of several lengths"
    with torch.no_grad():
        found = encoded(tower, TEXTS)
    torch.testing.assert_close(found, backbone.encode_text(TEXTS), atol=2e-6, rtol=1e-5)


def test_what_stands_behind_the_end_is_not_read(backbone: Backbone) -> None:
    tower = backbone.prompt_tower()
    ids, lengths = tower.tokenize(TEXTS)
    embeddings = tower.embed(ids).clone()
    embeddings[~tower.tokenize(TEXTS).mask] = 77.0
    with torch.no_grad():
        found = tower.encode(embeddings, lengths)
    torch.testing.assert_close(found, backbone.encode_text(TEXTS), atol=2e-6, rtol=1e-5)


def test_f22_gradients_reach_embeddings_and_no_weight(backbone: Backbone) -> None:
    tower = backbone.prompt_tower()
    ids, lengths = tower.tokenize(TEXTS)
    embeddings = tower.embed(ids).clone().requires_grad_()
    tower.encode(embeddings, lengths).square().sum().backward()
    assert embeddings.grad is not None
    mask = tower.tokenize(TEXTS).mask
    assert (embeddings.grad[mask].abs().sum(-1) > 0).all()
    assert embeddings.grad[~mask].abs().sum() == 0
    model: Any = backbone.model  # type: ignore[attr-defined]
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())


def test_long_texts_keep_their_end(backbone: Backbone) -> None:
    tower = backbone.prompt_tower()
    (ids,), (length,) = tower.tokenize(["dog " * 100])
    (short,), (of_short,) = tower.tokenize(["dog"])
    assert length == tower.context_length
    assert ids[length - 1] == short[of_short - 1]


def test_a_model_with_a_text_module_of_its_own_works_alike(tiny_clip: Path) -> None:
    from open_clip import get_tokenizer
    from open_clip.model import CustomTextCLIP

    torch.manual_seed(0)
    model = CustomTextCLIP(**TINY_CLIP).eval().requires_grad_(False)
    tokenizer = get_tokenizer(f"local-dir:{tiny_clip}")
    tower = ClipPromptTower(model, tokenizer, torch.device("cpu"))
    with torch.no_grad():
        expected = model.encode_text(tokenizer(TEXTS))
        torch.testing.assert_close(encoded(tower, TEXTS), expected, atol=2e-6, rtol=1e-5)


def test_towers_without_a_place_for_prompts_are_refused_in_one_line() -> None:
    from open_clip.model import CustomTextCLIP

    siglip = {**TINY_CLIP["text_cfg"], "no_causal_mask": True, "pool_type": "last"}
    model = CustomTextCLIP(**{**TINY_CLIP, "text_cfg": siglip})
    with pytest.raises(BackboneError, match="pooling last: prompts are learned in causal"):
        ClipPromptTower(model, None, torch.device("cpu"))
    coca = CustomTextCLIP(**{**TINY_CLIP, "text_cfg": {**TINY_CLIP["text_cfg"], "embed_cls": True}})
    with pytest.raises(BackboneError, match="take head lmpt"):
        ClipPromptTower(coca, None, torch.device("cpu"))
    image_only = SimpleNamespace(
        spec=SimpleNamespace(identity=SimpleNamespace(name="vit", kind="timm"))
    )
    with pytest.raises(BackboneError, match="vit: prompts cannot be learned inside"):
        Backbone.prompt_tower(image_only)  # type: ignore[arg-type]
