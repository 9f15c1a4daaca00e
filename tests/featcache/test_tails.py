"""The last blocks on their own: what they make of cached tokens is what the whole tower makes."""

import copy
import json

import pytest
import torch

from featcache.backbones.base import FeatureRequest
from featcache.backbones.open_clip import OpenClipConfig
from featcache.errors import BackboneError

VISION = {"image_size": 32, "patch_size": 16, "width": 32, "layers": 3, "head_width": 16}
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
COCA = {
    "attentional_pool": True,
    "attn_pooler_heads": 2,
    "output_tokens": True,
}


def timm_tower(name, pool, proj, **options):
    return {
        "timm_model_name": name,
        "timm_model_pretrained": False,
        "timm_pool": pool,
        "timm_proj": proj,
        "image_size": 160,
        **options,
    }


# SigLIP's towers are timm's: pooled by an attention head, no class token, no projection.
TOWERS = {
    "clip": VISION,
    "average": {**VISION, "pool_type": "avg", "final_ln_after_pool": True},
    "scaled": {**VISION, "ls_init_value": 0.1, "no_ln_pre": True},
    "coca": {**VISION, **COCA},
    "two poolers": {**VISION, **COCA, "attentional_pool": "parallel"},
    "timm token": timm_tower("test_vit", "token", "linear"),
    "timm average": timm_tower("test_vit2", "avg", "mlp"),
    "siglip": timm_tower("test_vit3", "map", "none"),
    "registers": timm_tower("test_vit4", "avg", "linear"),
}


@pytest.fixture(scope="module")
def open_tower(tmp_path_factory):
    """Opens a tower of `TOWERS` with random weights, each once."""
    folder, opened = tmp_path_factory.mktemp("towers"), {}

    def build(kind, precision="fp32"):
        if (kind, precision) not in opened:
            vision = TOWERS[kind]
            width = {"siglip": 96, "two poolers": 32}.get(kind, 16)
            config = {"embed_dim": width, "vision_cfg": vision, "text_cfg": dict(TEXT)}
            if "attentional_pool" in vision:
                config["text_cfg"] |= {"embed_cls": True, "output_tokens": True}
                config["multimodal_cfg"] = {
                    "width": 32,
                    "heads": 2,
                    "layers": 1,
                    "context_length": 16,
                }
                config["custom_text"] = True
            file = folder / f"featcache-tail-{sorted(TOWERS).index(kind)}.json"
            file.write_text(json.dumps(config))
            options = OpenClipConfig(model=str(file), pretrained="random:3")
            backbone = opened[kind, precision] = options.open(precision=precision)
            if "timm" in kind or kind in ("siglip", "registers"):  # fresh blocks do almost nothing
                generator = torch.Generator().manual_seed(1)
                for parameter in backbone.model.visual.parameters():
                    parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        return opened[kind, precision]

    return build


def images(backbone, number=3):
    generator = torch.Generator().manual_seed(0)
    shape = (number, 3, *backbone.spec.pixels.size)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def direct(backbone, pixels):
    """The image features by open_clip alone."""
    mean = torch.tensor(backbone.spec.pixels.mean)[:, None, None]
    std = torch.tensor(backbone.spec.pixels.std)[:, None, None]
    with torch.no_grad():
        return backbone.model.encode_image((pixels.float() / 255 - mean) / std, normalize=False)


@pytest.mark.parametrize("kind", TOWERS)
def test_finished_tokens_are_the_projected_feature(open_tower, kind):
    backbone = open_tower(kind)
    spec, pixels = backbone.spec, images(backbone)
    expected = direct(backbone, pixels)
    assert spec.can_finish
    rows, columns = spec.token_grid
    length = spec.num_prefix_tokens + rows * columns
    for blocks in range(1, spec.num_layers + 1):
        request = FeatureRequest(pooled=spec.pooled_dim > 0, tokens=True, before_last=blocks)
        features = backbone.encode_image(pixels, request)
        assert features["tokens"].shape == (3, length, spec.token_dim)
        torch.testing.assert_close(features["projected"], expected, rtol=1e-5, atol=1e-5)
        finished = backbone.finish_from(features["tokens"], blocks)
        torch.testing.assert_close(finished, expected, rtol=1e-5, atol=1e-5)
        assert not finished.is_inference()
    # The tokens do differ between the blocks: equal features above are no accident.
    wrong = backbone.finish_from(features["tokens"], 1)
    assert (wrong - expected).norm() > 0.01 * expected.norm()


@pytest.mark.parametrize("kind", ["clip", "scaled"])
def test_sequence_is_what_a_loop_over_open_clips_blocks_gives(open_tower, kind):
    backbone = open_tower(kind)
    visual, pixels = backbone.model.visual, images(backbone)
    mean = torch.tensor(backbone.spec.pixels.mean)[:, None, None]
    std = torch.tensor(backbone.spec.pixels.std)[:, None, None]
    with torch.inference_mode():
        x = visual.conv1((pixels.float() / 255 - mean) / std).flatten(2).transpose(1, 2)
        x = torch.cat([visual.class_embedding.expand(3, 1, -1), x], 1)
        x = visual.ln_pre(x + visual.positional_embedding)
        for blocks in (3, 2, 1):  # position embedding and first norm are behind it
            request = FeatureRequest(tokens=True, before_last=blocks)
            found = backbone.encode_image(pixels, request)["tokens"]
            torch.testing.assert_close(found, x, rtol=1e-5, atol=1e-5)
            x = visual.transformer.resblocks[3 - blocks](x)


def test_the_sequence_starts_with_the_prefix_and_goes_on_with_the_patches(open_tower):
    backbone = open_tower("clip")
    pixels = images(backbone)

    def tokens(**options):
        return backbone.encode_image(pixels, FeatureRequest(tokens=True, **options))["tokens"]

    torch.testing.assert_close(tokens(before_last=1)[:, 1:], tokens(token_layer=2))


@pytest.mark.parametrize("kind", ["clip", "coca", "siglip"])
def test_a_tail_holds_the_last_blocks_only_and_a_copy_of_it_trains(open_tower, kind):
    backbone = open_tower(kind)
    pixels = images(backbone)
    request = FeatureRequest(tokens=True, before_last=1)
    features = backbone.encode_image(pixels, request)
    shared = backbone.tail(1)
    own = {id(p) for p in backbone.model.visual.parameters()}
    assert {id(p) for p in shared.parameters()} <= own
    assert not any(p.requires_grad for p in shared.parameters())
    names = {name.split(".")[0] for name, _ in shared.named_parameters()}
    assert names <= {"blocks", "rest", "head"}
    assert {n.split(".")[1] for n, _ in shared.named_parameters() if n[:7] == "blocks."} == {"0"}
    tail = copy.deepcopy(shared).requires_grad_(True)
    before = backbone.finish_from(features["tokens"], 1)
    tail(features["tokens"]).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in tail.parameters())
    with torch.no_grad():
        for parameter in tail.parameters():
            parameter -= 0.1 * parameter.grad.sign()
    assert torch.equal(backbone.finish_from(features["tokens"], 1), before)
    assert not torch.equal(tail(features["tokens"]), before)
    assert backbone.model.visual(pixels.float()) is not None  # nothing was taken out of the tower


def test_low_precision_finishes_in_its_own_arithmetic(open_tower):
    exact, fast = open_tower("clip"), open_tower("clip", "bf16")
    pixels = images(exact)
    features = fast.encode_image(pixels, FeatureRequest(tokens=True, before_last=2))
    finished = fast.finish_from(features["tokens"], 2)
    assert torch.equal(finished, features["projected"])
    cosine = torch.nn.functional.cosine_similarity(finished, direct(exact, pixels))
    assert cosine.min() > 0.999


def test_towers_that_cannot_be_cut_say_so(tmp_path, open_tower):
    config = {"embed_dim": 16, "text_cfg": TEXT}
    config["vision_cfg"] = {"layers": [1, 1, 1, 1], "width": 16, "image_size": 64}
    (tmp_path / "featcache-tail-rn.json").write_text(json.dumps(config))
    config["vision_cfg"] = timm_tower("test_vit_relpos", "avg", "linear")
    (tmp_path / "featcache-tail-relpos.json").write_text(json.dumps(config))
    for name in ("rn", "relpos"):
        file = tmp_path / f"featcache-tail-{name}.json"
        backbone = OpenClipConfig(model=str(file), pretrained="random").open()
        with pytest.raises(BackboneError, match="no plain vision transformer") as caught:
            backbone.encode_image(images(backbone), FeatureRequest(tokens=True, before_last=1))
        assert "\n" not in str(caught.value)
        with pytest.raises(BackboneError, match="no plain vision transformer"):
            backbone.finish_from(torch.zeros(1, 2, 3), 1)
    for blocks in (4, -1):
        with pytest.raises(BackboneError, match=rf"before_last:{blocks} .* to before_last:3"):
            open_tower("clip").tail(blocks)


@pytest.mark.parametrize("kind", TOWERS)
def test_every_tower_gives_what_open_clip_gives(open_tower, kind):
    backbone = open_tower(kind)
    visual, spec, pixels = backbone.model.visual, backbone.spec, images(backbone)
    request = FeatureRequest(pooled=spec.pooled_dim > 0, tokens=True)
    features = backbone.encode_image(pixels, request)
    mean = torch.tensor(spec.pixels.mean)[:, None, None]
    std = torch.tensor(spec.pixels.std)[:, None, None]
    with torch.no_grad():
        x = (pixels.float() / 255 - mean) / std
        inner = visual.forward_intermediates(x, indices=1, output_fmt="NLC")
    torch.testing.assert_close(features["tokens"], inner["image_intermediates"][0])
    expected = direct(backbone, pixels)
    torch.testing.assert_close(features["projected"], expected, rtol=1e-5, atol=1e-5)
    if spec.pooled_dim:
        project = visual.head if hasattr(visual, "head") else lambda pooled: pooled @ visual.proj
        by_hand = project(features["pooled"])
        torch.testing.assert_close(by_hand, expected, rtol=1e-4, atol=1e-5)


def test_siglips_text_tower(tmp_path):
    text = {"pool_type": "last", "no_causal_mask": True, "proj_bias": True}
    config = {
        "embed_dim": 96,
        "vision_cfg": TOWERS["siglip"],
        "text_cfg": {**TEXT, **text, "norm_kwargs": {"eps": 1e-6}},
        "custom_text": True,
        "init_logit_bias": -10,
        "init_logit_scale": 2.302585,
    }
    (tmp_path / "featcache-tail-text.json").write_text(json.dumps(config))
    file = str(tmp_path / "featcache-tail-text.json")
    backbone = OpenClipConfig(model=file, pretrained="random:3").open()
    texts = ["a cat", "a dog on a mat", "word " * 100]
    found = backbone.encode_text(texts)
    with torch.no_grad():
        expected = backbone.model.encode_text(backbone.tokenizer(texts), normalize=False)
    torch.testing.assert_close(found, expected)
    assert backbone.spec.logit_scale == pytest.approx(10, rel=1e-5)
    assert found.shape == (3, backbone.spec.projected_dim)
