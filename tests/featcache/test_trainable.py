"""Every kind's towers opened for training: the same features, and LoRA in each of their blocks."""

import json
from types import SimpleNamespace

import pytest
import torch

from featcache.adapters.lora import LoraConfig
from featcache.backbones.base import FeatureRequest
from featcache.backbones.blip import BlipConfig
from featcache.backbones.blocks import timm_blocks
from featcache.backbones.open_clip import OpenClipConfig
from featcache.backbones.timm import TimmConfig
from featcache.errors import BackboneError

TEXTS = ["a cat", "the dog on the mat"]
TEXT_CFG = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
IMAGE_CFGS = {
    "vit": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16},
    "resnet": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 64},
    "timm": {
        "image_size": 160,
        "timm_model_name": "test_vit",
        "timm_pool": "token",
        "timm_proj": "linear",
    },
}


@pytest.fixture(scope="module")
def configs(tmp_path_factory, tiny_blip):
    folder = tmp_path_factory.mktemp("trainable")
    made = {
        "blip": BlipConfig(model=str(tiny_blip)),
        "timm": TimmConfig(model="test_vit", pretrained="random:2"),
        "timm-resnet": TimmConfig(model="test_resnet", pretrained="random:2"),
    }
    for name, vision in IMAGE_CFGS.items():
        file = folder / f"trainable-{name}.json"
        file.write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": TEXT_CFG}))
        made[f"clip-{name}"] = OpenClipConfig(model=str(file), pretrained="random:2")
    return made


@pytest.fixture(scope="module")
def _backbones():
    return {}


@pytest.fixture
def opened(configs, _backbones):
    """`opened(name)`: a backbone, and pixels of its size; restored after LoRA by its weights."""

    def of(name):
        if name not in _backbones:
            _backbones[name] = configs[name].open()
        backbone = _backbones[name]
        generator = torch.Generator().manual_seed(1)
        return backbone, torch.randn(2, 3, *backbone.spec.pixels.size, generator=generator)

    return of


KINDS = ("clip-vit", "clip-resnet", "clip-timm", "timm", "timm-resnet", "blip")
WITH_ATTENTION = tuple(kind for kind in KINDS if kind != "timm-resnet")


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_those_of_extraction(opened, kind):
    backbone, pixels = opened(kind)
    towers = backbone.trainable()
    name = "projected" if backbone.spec.projected_dim else "pooled"
    request = FeatureRequest(projected=name == "projected", pooled=name == "pooled")
    expected = backbone.encode_image(pixels, request)[name]
    found = towers.encode_image(pixels)
    assert found.shape == (2, towers.feature_dim)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)
    if backbone.spec.has_text:
        tokens = towers.tokenize(TEXTS)
        expected = backbone.encode_text(TEXTS)
        torch.testing.assert_close(towers.encode_text(tokens), expected, atol=2e-6, rtol=1e-5)
    else:
        with pytest.raises(BackboneError, match="reads no text"):
            towers.tokenize(TEXTS)


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_of_a_tower_moves_its_features_and_no_other(opened, kind):
    backbone, pixels = opened(kind)
    towers = backbone.trainable()
    towers.model.requires_grad_(True)
    towers.encode_image(pixels).square().sum().backward()
    of_image = {n for n, p in towers.model.named_parameters() if p.grad is not None}
    assert {towers.tower_of(name) for name in of_image} == {"image"}
    if backbone.spec.has_text:
        towers.model.zero_grad()
        towers.encode_text(towers.tokenize(TEXTS)).square().sum().backward()
        of_text = {n for n, p in towers.model.named_parameters() if p.grad is not None}
        assert {towers.tower_of(name) for name in of_text} == {"text"}
    towers.model.zero_grad()
    towers.model.requires_grad_(False)


@pytest.mark.parametrize("kind", WITH_ATTENTION)
def test_lora_in_every_block_starts_exact_learns_and_merges(opened, kind):
    backbone, pixels = opened(kind)
    towers = backbone.trainable()
    sites = tuple(towers.blocks["image"][0].sites)
    chosen = "both" if towers.blocks["text"] else "image"

    def encode():
        features = [towers.encode_image(pixels)]
        if chosen == "both":
            features.append(towers.encode_text(towers.tokenize(TEXTS)))
        return torch.cat(features)

    with torch.no_grad():
        expected = encode()
    adapter = LoraConfig(rank=2, sites=sites, towers=chosen).attach(towers)
    with torch.no_grad():
        adapter.eval()
        assert torch.equal(encode(), expected)
    for change in adapter.changes:
        torch.nn.init.normal_(change.b, std=0.1)
    found = encode()
    assert not torch.allclose(found.detach(), expected, atol=1e-3)
    found.square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in adapter.parameters())
    adapter.merge()
    torch.testing.assert_close(encode(), found.detach(), atol=1e-5, rtol=1e-5)
    adapter.unmerge()
    adapter.requires_grad_(False)
    for change in adapter.changes:
        torch.nn.init.zeros_(change.b)
    adapter.fold()
    with torch.no_grad():
        assert torch.equal(encode(), expected)


def test_a_tower_without_attention_is_refused(opened):
    towers = opened("timm-resnet")[0].trainable()
    with pytest.raises(BackboneError, match="image tower has no attention"):
        LoraConfig().attach(towers)


def test_a_matrix_that_a_tower_lacks_is_refused(opened):
    towers = opened("clip-resnet")[0].trainable()
    with pytest.raises(BackboneError, match=r"attnpool has no matrix fc1; .* q, k, v, out"):
        LoraConfig(sites=("q", "fc1")).attach(towers)


@pytest.mark.parametrize("kind", ["timm", "clip-timm"])
def test_prompts_enter_where_the_sequence_is_whole(opened, kind):
    backbone, pixels = opened(kind)
    towers = backbone.trainable()
    seen = []
    entry = towers.model.get_submodule(towers.prompt_entry)
    hook = entry.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    towers.encode_image(pixels)
    hook.remove()
    num_patches = (pixels.shape[-1] // towers.patch_size) ** 2
    assert seen[0].shape == (2, towers.num_prefix_tokens + num_patches, towers.width)


TINY = {"depth": 1, "embed_dim": 48, "num_heads": 3}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_small_patch16_dinov3", {"img_size": 32}),
        ("eva02_base_patch16_clip_224", {"img_size": 32}),
        ("vit_small_patch16_rope_224", {"img_size": 32}),
        ("vit_tiny_patch16_224", {"img_size": 32}),
    ],
)
def test_every_listed_matrix_of_timm_s_variants_is_read_where_it_is_listed(name, options):
    import timm

    model = timm.create_model(name, num_classes=0, **TINY, **options).eval()
    blocks = timm_blocks(model)
    towers = SimpleNamespace(model=model, name=name, require_blocks=lambda tower: blocks)
    pixels = torch.randn(1, 3, options["img_size"], options["img_size"])
    expected = model(pixels)
    adapter = LoraConfig(rank=2, sites=tuple(blocks[0].sites)).attach(towers)
    assert torch.equal(model(pixels), expected)
    for change in adapter.changes:
        torch.nn.init.normal_(change.b)
    found = model(pixels)
    found.square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in adapter.parameters())
    adapter.fold()
    torch.testing.assert_close(model(pixels), found.detach(), atol=1e-5, rtol=1e-5)


def test_an_attention_that_reads_past_its_layer_is_not_listed():
    import timm

    model = timm.create_model("eva_giant_patch14_224", img_size=28, **TINY)
    assert model.blocks[0].attn.q_bias is not None
    assert timm_blocks(model) == []
