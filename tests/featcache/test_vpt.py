"""Prompts: the tower with them against the equations, and what extraction makes of them."""

import copy
import json
import math
from dataclasses import replace

import pytest
import torch

from featcache.adapter_folder import write_adapter
from featcache.adapters.vpt import VptConfig
from featcache.backbones.adapted import AdaptedConfig
from featcache.backbones.base import FeatureRequest
from featcache.backbones.open_clip import OpenClipConfig
from featcache.backbones.timm import TimmConfig
from featcache.errors import BackboneError
from featcache.extract import ExtractConfig, run
from featcache.images import load_pixels
from featcache.reader import open_cache

ARCHITECTURE = {
    "embed_dim": 16,
    "vision_cfg": {
        "image_size": 32,
        "layers": 3,
        "width": 32,
        "head_width": 16,
        "patch_size": 8,
    },
    "text_cfg": {
        "context_length": 16,
        "vocab_size": 49408,
        "width": 32,
        "heads": 2,
        "layers": 1,
    },
}
RESNET = {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32}
EPS = 1e-5


@pytest.fixture
def base(tmp_path):
    file = tmp_path / "vpt-tiny.json"
    file.write_text(json.dumps(ARCHITECTURE))
    return OpenClipConfig(model=str(file), pretrained="random:3")


def pixels(count=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)


def norm(x, layer):
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + EPS)
    return scaled * layer["weight"] + layer["bias"]


def below(weights, prefix):
    return {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}


def block(x, weights, heads):
    """One image's (L, W) sequence through a block, written out."""
    y = norm(x, below(weights, "ln_1."))
    q, k, v = (y @ weights["attn.in_proj_weight"].T + weights["attn.in_proj_bias"]).chunk(3, -1)
    mixed = []
    for a, b, c in zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1), strict=True):
        mixed.append(torch.softmax(a @ b.T / math.sqrt(a.shape[-1]), -1) @ c)
    out = torch.cat(mixed, -1) @ weights["attn.out_proj.weight"].T
    x = x + out + weights["attn.out_proj.bias"]
    y = norm(x, below(weights, "ln_2.")) @ weights["mlp.c_fc.weight"].T + weights["mlp.c_fc.bias"]
    y = y * 0.5 * (1 + torch.erf(y / math.sqrt(2)))
    return x + y @ weights["mlp.c_proj.weight"].T + weights["mlp.c_proj.bias"]


def reference(backbone, prompts, images):
    """Features of each image, and patch tokens behind each block, from the equations in float64.

    Shallow: [x, Z, E] = block_i([x, Z, E]). Deep: [x, _, E] = block_i([x, P_i, E]).
    """
    weights = {k: v.double() for k, v in below(backbone.model.state_dict(), "visual.").items()}
    spec = backbone.spec.pixels
    mean, std = (torch.tensor(v).double()[:, None, None] for v in (spec.mean, spec.std))
    num_tokens, features, layers = prompts.shape[1], [], []
    for image in (images.double() / 255 - mean) / std:
        patches = [
            (image[:, top : top + 8, left : left + 8] * weights["conv1.weight"]).sum((1, 2, 3))
            for top in range(0, 32, 8)
            for left in range(0, 32, 8)
        ]
        x = torch.stack([weights["class_embedding"], *patches])
        x = x + weights["positional_embedding"]
        x = torch.cat([x[:1], prompts[0].double(), x[1:]])
        x = norm(x, below(weights, "ln_pre."))
        seen = []
        for i in range(3):
            if i and len(prompts) > 1:
                x = torch.cat([x[:1], prompts[i].double(), x[1 + num_tokens :]])
            x = block(x, below(weights, f"transformer.resblocks.{i}."), heads=2)
            seen.append(x[1 + num_tokens :])
        features.append(norm(x, below(weights, "ln_post."))[0] @ weights["proj"])
        layers.append(torch.stack(seen))
    return torch.stack(features), torch.stack(layers)


@pytest.mark.parametrize("deep", [False, True])
def test_features_tokens_and_gradients_follow_the_equations(base, deep):
    backbone = base.open()
    torch.manual_seed(5)
    towers = backbone.trainable()
    adapter = VptConfig(num_tokens=4, deep=deep).attach(towers)
    prompts = adapter.state()["prompts"]
    assert prompts.shape == (3 if deep else 1, 4, 32)
    expected, layers = reference(backbone, prompts, pixels())
    found = towers.encode_image(pixels())
    assert torch.allclose(found.double(), expected, atol=1e-5)
    own = prompts.detach().clone().requires_grad_()
    reference(backbone, own, pixels())[0].square().sum().backward()
    found.square().sum().backward()
    assert torch.allclose(prompts.grad, own.grad, atol=1e-4, rtol=1e-4)
    assert own.grad.abs().amax((1, 2)).min() > 1e-4  # every block's prompts act
    for layer in range(3):
        request = FeatureRequest(tokens=True, token_layer=layer + 1)
        read = backbone.encode_image(pixels(), request)
        assert read["tokens"].shape == (3, 16, 32)
        assert torch.allclose(read["tokens"].double(), layers[:, layer], atol=1e-5)
        assert torch.allclose(read["projected"].double(), expected, atol=1e-5)
    pooled = backbone.encode_image(pixels(), FeatureRequest(tokens=True, token_pool=2))
    assert pooled["tokens"].shape == (3, 4, 32)


def test_only_prompts_get_gradients_and_they_start_in_their_range(base):
    backbone = base.open()
    towers = backbone.trainable()
    adapter = VptConfig(num_tokens=50, deep=True).attach(towers)
    towers.encode_image(pixels()).sum().backward()
    assert [n for n, p in backbone.model.named_parameters() if p.grad is not None] == [
        "visual.inserted_prompts.values"
    ]
    assert list(adapter.trained_parameters()) == ["prompts"]
    values, limit = adapter.state()["prompts"].detach(), math.sqrt(6 / (3 * 8**2 + 32))
    assert values.abs().max() <= limit
    assert values.abs().max() > 0.98 * limit
    assert abs(float(values.std()) - limit / math.sqrt(3)) < 0.02 * limit


def test_checkpointing_a_copy_and_autocast_keep_the_prompts(base):
    backbone = base.open()
    towers = backbone.trainable()
    adapter = VptConfig(num_tokens=2, deep=True).attach(towers)
    prompts = adapter.state()["prompts"]
    expected = towers.encode_image(pixels())
    expected.square().sum().backward()
    gradient, prompts.grad = prompts.grad.clone(), None
    model = backbone.model
    model.set_grad_checkpointing(True)
    model.train()
    found = towers.encode_image(pixels())
    found.square().sum().backward()
    assert torch.equal(found, expected)
    assert torch.allclose(prompts.grad, gradient, atol=1e-6)
    model.eval()
    copied = copy.deepcopy(model)
    with torch.no_grad():
        prompts.zero_()
        x = torch.randn(2, 3, 32, 32)
        assert not torch.allclose(copied.visual(x), model.visual(x), atol=1e-4)
        copied.visual.inserted_prompts.values.zero_()
        assert torch.equal(copied.visual(x), model.visual(x))
        with torch.autocast("cpu", torch.bfloat16):
            half = towers.encode_image(x)
        assert half.dtype == torch.bfloat16
        assert torch.allclose(half.float(), model.visual(x), atol=0.1)


def test_dropout_acts_in_training_only(base):
    backbone = base.open()
    towers = backbone.trainable()
    adapter = VptConfig(num_tokens=4, dropout=0.5).attach(towers)
    backbone.model.train()
    images = pixels(1).repeat(2, 1, 1, 1)
    with torch.no_grad():
        rows = towers.encode_image(images)
        assert not torch.allclose(rows[0], rows[1], atol=1e-4)  # each image its own draw
        adapter.fold()
        rows = towers.encode_image(images)
        assert torch.allclose(rows[0], rows[1], atol=1e-6)


@pytest.mark.parametrize("deep", [False, True])
def test_the_folder_opens_as_the_trained_backbone(base, tmp_path, deep):
    backbone = base.open()
    config = VptConfig(num_tokens=3, deep=deep)
    adapter = config.attach(backbone.trainable())
    folder = tmp_path / "v"
    folder.mkdir()
    write_adapter(folder, base, base.open(), config, adapter.state())
    assert (folder / "adapter.safetensors").stat().st_size < 400 + 4 * adapter.state()[
        "prompts"
    ].numel()
    opened = AdaptedConfig(model=str(folder)).open()
    request = FeatureRequest(tokens=True, pooled=True)
    found, expected = (b.encode_image(pixels(), request) for b in (opened, backbone))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    plain = base.open().encode_image(pixels(), request)
    assert not torch.allclose(found["projected"], plain["projected"], atol=1e-3)
    assert not opened.spec.can_finish
    with pytest.raises(BackboneError, match="cannot be run on their own"):
        opened.encode_image(pixels(), replace(request, before_last=1))
    opened.move("cpu", "bf16")
    half = opened.encode_image(pixels(), request)
    assert torch.allclose(half["projected"], found["projected"], atol=0.1)
    assert opened.model.visual.inserted_prompts.values.dtype == torch.bfloat16


def test_a_cache_holds_patches_and_no_prompts(base, tmp_path, image_folder):
    config, backbone = VptConfig(num_tokens=3, deep=True), base.open()
    adapter = config.attach(backbone.trainable())
    folder = tmp_path / "v"
    folder.mkdir()
    write_adapter(folder, base, backbone, config, adapter.state())
    options = {
        "dataset": {"root": str(image_folder)},
        "backbone": {"kind": "adapted", "model": str(folder)},
        "cache": str(tmp_path / "cache"),
        "features": {"tokens": "all", "token_layer": 2, "storage_dtype": "float32"},
        "device": "cpu",
        "precision": "fp32",
    }
    run(ExtractConfig.model_validate(options))
    cache = open_cache(tmp_path / "cache")
    assert cache.identity.backbone.kind == "adapted"
    files = [(image_folder / path).read_bytes() for path in cache.paths]
    images = torch.stack([load_pixels(file, backbone.spec.pixels)[0] for file in files])
    expected = backbone.encode_image(images, FeatureRequest(tokens=True, token_layer=2))
    for name in ("tokens", "projected"):
        found = torch.from_numpy(cache.array(f"image/{name}").read())
        assert torch.allclose(found, expected[name], atol=1e-5)


@pytest.mark.parametrize("name", ["test_vit", "test_vit4"])  # class token; registers, no class
@pytest.mark.parametrize("deep", [False, True])
def test_timm_towers_put_prompts_behind_their_prefix_tokens(name, deep):
    backbone = TimmConfig(model=name, pretrained="random:2").open()
    towers, model = backbone.trainable(), backbone.model
    with torch.no_grad():  # fresh blocks do almost nothing
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    adapter = VptConfig(num_tokens=3, deep=deep).attach(towers)
    prompts, prefix = adapter.state()["prompts"], model.num_prefix_tokens
    x = torch.randn(2, 3, *backbone.spec.pixels.size)
    found = backbone.encode_image(x, FeatureRequest(projected=False, pooled=True, tokens=True))
    plain = TimmConfig(model=name, pretrained="random:2").open().model
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "prompts" not in k})
    with torch.no_grad():
        sequence = plain._pos_embed(plain.patch_embed(x))
        own = prompts[0].expand(2, -1, -1)
        sequence = torch.cat([sequence[:, :prefix], own, sequence[:, prefix:]], 1)
        sequence = plain.norm_pre(sequence)
        for i, layer in enumerate(plain.blocks):
            if i and deep:
                sequence[:, prefix : prefix + 3] = prompts[i]
            sequence = layer(sequence)
        sequence = torch.cat([sequence[:, :prefix], sequence[:, prefix + 3 :]], 1)
        expected = plain.forward_head(plain.norm(sequence), pre_logits=True)
    assert torch.allclose(found["pooled"], expected, atol=1e-5)
    assert torch.allclose(found["tokens"], sequence[:, prefix:], atol=1e-5)
    assert torch.allclose(towers.encode_image(x), expected, atol=1e-5)


def test_towers_without_patches_and_second_prompts_are_refused(tmp_path, base):
    file = tmp_path / "vpt-resnet.json"
    file.write_text(json.dumps({**ARCHITECTURE, "vision_cfg": RESNET}))
    resnet = OpenClipConfig(model=str(file), pretrained="random").open()
    with pytest.raises(BackboneError, match="no plain vision transformer, prompts cannot"):
        VptConfig().attach(resnet.trainable())
    backbone = base.open()
    VptConfig().attach(backbone.trainable())
    with pytest.raises(BackboneError, match="already has prompts"):
        VptConfig().attach(backbone.trainable())
