import json
import shutil

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn.functional import cosine_similarity

from featcache.backbones import BACKBONES
from featcache.backbones.base import FeatureRequest
from featcache.backbones.open_clip import OpenClip, OpenClipConfig, _published_pixels
from featcache.backbones.weights import weights_hash
from featcache.errors import BackboneError

ALL = FeatureRequest(projected=True, pooled=True, tokens=True)


@pytest.fixture(scope="module")
def backbone(tiny_clip) -> OpenClip:
    return OpenClipConfig(model=f"local-dir:{tiny_clip}").open()


@pytest.fixture(scope="module")
def pixels():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (5, 3, 32, 32), generator=generator, dtype=torch.uint8)


def normalised(backbone, pixels):
    mean = torch.tensor(backbone.spec.pixels.mean)[:, None, None]
    std = torch.tensor(backbone.spec.pixels.std)[:, None, None]
    return (pixels.float() / 255 - mean) / std


def small(**changes):
    """An architecture of a few thousand weights."""
    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    vision = {"image_size": 32, "patch_size": 16, "width": 32, "layers": 1, "head_width": 16}
    return {"embed_dim": 16, "vision_cfg": {**vision, **changes}, "text_cfg": text}


def architecture_file(folder, name, **changes):
    file = folder / f"{name}.json"
    file.write_text(json.dumps(small(**changes)))
    return file


def test_it_is_registered():
    assert BACKBONES["open_clip"] is OpenClipConfig


def test_sizes_and_pixels_come_from_the_folder(backbone):
    spec = backbone.spec
    assert (spec.projected_dim, spec.pooled_dim, spec.token_dim) == (32, 64, 64)
    assert (spec.token_grid, spec.num_layers, spec.has_text) == ((4, 4), 2, True)
    assert spec.pixels.mean == (0.5, 0.4, 0.3)
    assert spec.pixels.size == (32, 32)
    assert spec.logit_scale == pytest.approx(1 / 0.07, rel=1e-5)


def test_one_pass_gives_what_open_clip_gives(backbone, pixels):
    model = backbone.model
    calls = []
    hook = model.visual.conv1.register_forward_hook(lambda *_: calls.append(1))
    features = backbone.encode_image(pixels, ALL)
    hook.remove()
    assert len(calls) == 1
    x = normalised(backbone, pixels)
    with torch.no_grad():
        torch.testing.assert_close(features["projected"], model.encode_image(x))
        torch.testing.assert_close(
            features["pooled"] @ model.visual.proj, features["projected"], rtol=1e-4, atol=1e-5
        )
        inner = model.visual.forward_intermediates(x, indices=[1], output_fmt="NLC")
    torch.testing.assert_close(features["tokens"], inner["image_intermediates"][0])
    assert model.visual.proj is not None


def test_float_pixels_are_taken_as_normalised(backbone, pixels):
    request = FeatureRequest()
    expected = backbone.encode_image(pixels, request)["projected"]
    found = backbone.encode_image(normalised(backbone, pixels), request)["projected"]
    torch.testing.assert_close(found, expected)


def test_memory_layout_of_the_pixels_does_not_change_a_bit(backbone, pixels):
    other = pixels.contiguous(memory_format=torch.channels_last)
    first, second = (backbone.encode_image(x, ALL) for x in (pixels, other))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_tokens_of_a_layer_and_pooled_tokens(backbone, pixels):
    def tokens(**options):
        return backbone.encode_image(pixels, FeatureRequest(tokens=True, **options))["tokens"]

    whole = tokens()
    assert torch.equal(tokens(token_layer=2), whole)
    assert not torch.equal(tokens(token_layer=1), whole)
    grid = whole.reshape(5, 2, 2, 2, 2, 64)
    by_hand = grid.mean(dim=(2, 4)).reshape(5, 4, 64)
    torch.testing.assert_close(tokens(token_pool=2), by_hand)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (FeatureRequest(tokens=True, token_layer=3), "token_layer 3 does not exist"),
        (FeatureRequest(tokens=True, token_pool=5), "grid:5 is finer than the 4x4"),
    ],
)
def test_a_feature_the_tower_lacks_is_named(backbone, pixels, request_, message):
    with pytest.raises(BackboneError, match=message):
        backbone.encode_image(pixels, request_)


def test_results_are_ordinary_tensors_and_weights_are_frozen(backbone, pixels):
    features = backbone.encode_image(pixels, ALL)
    text = backbone.encode_text(["a cat"])
    for tensor in (*features.values(), text):
        assert not tensor.is_inference()
        assert tensor.dtype == torch.float32
    assert not any(p.requires_grad for p in backbone.model.parameters())
    assert not backbone.model.training


def test_long_texts_are_cut_with_their_end_token_kept(backbone):
    texts = ["a cat", "word " * 200, ""]
    tokens = backbone.tokenizer(texts)
    assert tokens[1, -1] == tokens[0].max()  # the end token has the largest number
    features = backbone.encode_text(texts)
    assert features.shape == (3, 32)
    assert torch.isfinite(features).all()
    with torch.no_grad():
        torch.testing.assert_close(features, backbone.model.encode_text(tokens))


@pytest.mark.parametrize(("precision", "least"), [("bf16", 0.999), ("fp16", 0.99999)])
def test_low_precision_stays_close_to_fp32(tiny_clip, backbone, pixels, precision, least):
    fast = OpenClipConfig(model=f"local-dir:{tiny_clip}").open(precision=precision)
    assert fast.spec.identity == backbone.spec.identity  # hashed before the cast
    found, exact = fast.encode_image(pixels, ALL), backbone.encode_image(pixels, ALL)
    for name, value in found.items():
        assert value.dtype == torch.float32
        assert not torch.equal(value, exact[name])
        assert cosine_similarity(value, exact[name], dim=-1).min() > least
    texts = ["a cat", "a dog on a mat"]
    cosine = cosine_similarity(fast.encode_text(texts), backbone.encode_text(texts))
    assert cosine.min() > least


def test_hash_counts_every_weight_and_not_the_file(tiny_clip, backbone, tmp_path):
    copy = tmp_path / "moved"
    shutil.copytree(tiny_clip, copy)
    moved = OpenClipConfig(model=f"local-dir:{copy}").open()
    assert moved.spec.identity == backbone.spec.identity
    weights = load_file(copy / "open_clip_model.safetensors")
    weights["visual.ln_post.bias"][3] += 1e-6
    save_file(weights, copy / "open_clip_model.safetensors")
    changed = OpenClipConfig(model=f"local-dir:{copy}").open()
    assert changed.spec.identity.weights != backbone.spec.identity.weights
    assert changed.spec.identity.architecture == backbone.spec.identity.architecture


def test_hash_counts_names_shapes_and_types():
    base = torch.nn.Linear(2, 3, bias=False)
    hashes = {weights_hash(base)}
    for other in (torch.nn.Linear(3, 2, bias=False), torch.nn.Linear(2, 3, bias=False).double()):
        other.weight.data = base.weight.data.reshape(other.weight.shape).to(other.weight.dtype)
        hashes.add(weights_hash(other))
    hashes.add(weights_hash(torch.nn.Sequential(base)))
    assert len(hashes) == 4


def test_random_weights_by_name_only_and_by_seed(tmp_path):
    file = architecture_file(tmp_path, "featcache-test-vit")

    def weights(pretrained):
        config = OpenClipConfig(model=str(file), pretrained=pretrained)
        before = torch.random.get_rng_state()
        opened = config.open()
        assert torch.equal(torch.random.get_rng_state(), before)
        return opened.spec.identity.weights

    assert weights("random") == weights("random:0")
    assert weights("random:0") != weights("random:1")
    with pytest.raises(BackboneError, match="expected `random` or `random:SEED`"):
        weights("random:abc")
    with pytest.raises(BackboneError, match=r"needs weights.*it has none"):
        weights("")


def test_a_weights_file_gets_default_pixels(tmp_path, backbone):
    file = architecture_file(tmp_path, "featcache-test-file")
    model = OpenClipConfig(model=str(file), pretrained="random:5").open()
    torch.save(model.model.state_dict(), tmp_path / "weights.pt")
    loaded = OpenClipConfig(model=str(file), pretrained=str(tmp_path / "weights.pt")).open()
    assert loaded.spec.identity == model.spec.identity
    assert loaded.spec.pixels.mean == open_clip.OPENAI_DATASET_MEAN
    (tmp_path / "weights.pt").write_bytes(b"not weights")
    with pytest.raises(BackboneError, match="do not load"):
        OpenClipConfig(model=str(file), pretrained=str(tmp_path / "weights.pt")).open()


def test_a_weights_file_gets_the_pixels_of_its_architecture(tmp_path, monkeypatch):
    file = architecture_file(tmp_path, "featcache-test-published")
    model = OpenClipConfig(model=str(file), pretrained="random:5").open()
    torch.save(model.model.state_dict(), tmp_path / "weights.pt")
    published = open_clip.get_pretrained_cfg("ViT-B-16-SigLIP", "webli")
    monkeypatch.setattr(open_clip, "list_pretrained_tags_by_model", lambda name: ["webli"])
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda name, tag: published)
    loaded = OpenClipConfig(model=str(file), pretrained=str(tmp_path / "weights.pt")).open()
    assert loaded.spec.identity == model.spec.identity
    pixels = loaded.spec.pixels
    assert (pixels.mean, pixels.std) == ((0.5,) * 3, (0.5,) * 3)
    assert (pixels.interpolation, pixels.resize_mode) == ("bicubic", "squash")
    black = loaded.reference_transform()(Image.new("RGB", (50, 40)))
    assert black.unique().tolist() == [-1.0]


@pytest.mark.parametrize(
    ("name", "mean"),
    [
        ("ViT-B-16-SigLIP", (0.5, 0.5, 0.5)),
        ("MobileCLIP-B", (0.0, 0.0, 0.0)),
        ("ViT-B-32", open_clip.OPENAI_DATASET_MEAN),
        ("ViT-L-14", None),  # one of its tags was trained with another mean
        ("no-such-architecture", None),
    ],
)
def test_pixels_that_all_published_weights_share(name, mean):
    assert _published_pixels(name).get("mean") == mean


def test_another_architecture_under_a_known_name_is_refused(tmp_path):
    file = architecture_file(tmp_path, "ViT-B-32")
    with pytest.raises(BackboneError, match="already has another architecture named 'ViT-B-32'"):
        OpenClipConfig(model=str(file), pretrained="random").open()


@pytest.mark.parametrize(
    ("model", "pretrained", "message"),
    [
        ("ViT-B-32", "", r"pretrained is empty: ViT-B-32 needs weights; give one of its tags \(op"),
        ("ViT-B-33", "openai", "did you mean ViT-B-32"),
        ("ViT-B-32", "laion2b", "neither a file nor a tag of ViT-B-32; its tags: openai"),
        ("ViT-B-32", "openai", "set backbone.model ViT-B-32-quickgelu"),
        ("hf-hub:org/name", "openai", "leave backbone.pretrained empty"),
        ("local-dir:/no/such/folder", "", "no such folder"),
        ("/no/such/file.json", "random", "no such file"),
    ],
)
def test_mistakes_say_what_to_do(model, pretrained, message):
    with pytest.raises(BackboneError, match=message) as caught:
        OpenClipConfig(model=model, pretrained=pretrained).open()
    assert "\n" not in str(caught.value)


def test_text_in_the_place_of_weights(tmp_path):
    # Pickle reads letters as opcodes; which error comes out of that depends on the letters.
    model = str(architecture_file(tmp_path, "garbled"))
    for number, text in enumerate(("aeroplane 0\n", "0", "weights", "(((")):
        file = tmp_path / f"{number}.pt"
        file.write_text(text)
        with pytest.raises(BackboneError, match="do not load"):
            OpenClipConfig(model=model, pretrained=str(file)).open()


def test_a_folder_that_is_not_whole_is_refused(tiny_clip, tmp_path):
    config = OpenClipConfig(model=f"local-dir:{tmp_path}")
    with pytest.raises(BackboneError, match=r"no open_clip_config.json"):
        config.open()
    shutil.copy(tiny_clip / "open_clip_config.json", tmp_path)
    with pytest.raises(BackboneError, match="no weights in the folder"):
        config.open()
    (tmp_path / "open_clip_model.safetensors").write_bytes(b"\x00" * 40)
    with pytest.raises(BackboneError, match="do not load"):
        config.open()
    with pytest.raises(BackboneError, match="has its own weights"):
        OpenClipConfig(model=f"local-dir:{tiny_clip}", pretrained="openai").open()


def test_a_download_that_fails_is_one_line(monkeypatch):
    def refuse(*_, **__):
        raise OSError("no network here")

    monkeypatch.setattr("open_clip.factory.download_pretrained", refuse)
    with pytest.raises(BackboneError, match=r"cannot be fetched.*no network here.*local-dir"):
        OpenClipConfig(model="ViT-B-32", pretrained="laion2b_s34b_b79k").open()


def test_the_root_logger_is_left_alone(tmp_path, capfd):
    import logging

    handlers = list(logging.getLogger().handlers)
    file = architecture_file(tmp_path, "featcache-test-log")
    OpenClipConfig(model=str(file), pretrained="random").open()
    assert logging.getLogger().handlers == handlers
    assert "randomly" not in capfd.readouterr().err


def test_resnet_gives_projected_and_tokens_in_one_pass(tmp_path):
    file = architecture_file(
        tmp_path, "featcache-test-rn", layers=[1, 1, 1, 1], width=16, image_size=64
    )
    config = OpenClipConfig(model=str(file), pretrained="random")
    backbone = config.open()
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    features = backbone.encode_image(pixels, FeatureRequest(tokens=True))
    assert features["tokens"].shape == (2, 4, backbone.spec.token_dim)
    with torch.no_grad():
        direct = backbone.model.encode_image(normalised(backbone, pixels))
    torch.testing.assert_close(features["projected"], direct)
    with pytest.raises(BackboneError, match="no pooled feature"):
        backbone.encode_image(pixels, FeatureRequest(pooled=True))
    fast = config.open(precision="bf16").encode_image(pixels, FeatureRequest())["projected"]
    assert cosine_similarity(fast, direct).min() > 0.99


@pytest.mark.parametrize(("pool", "proj", "pooled"), [("avg", "linear", 192), ("token", "none", 0)])
def test_timm_towers(tmp_path, pool, proj, pooled):
    config = small()
    config["vision_cfg"] = {
        "timm_model_name": "vit_tiny_patch16_224",
        "timm_model_pretrained": False,
        "timm_pool": pool,
        "timm_proj": proj,
        "image_size": 224,
    }
    config["embed_dim"] = 192 if proj == "none" else 16
    file = tmp_path / f"featcache-test-timm-{pool}.json"
    file.write_text(json.dumps(config))
    backbone = OpenClipConfig(model=str(file), pretrained="random").open()
    assert backbone.spec.pooled_dim == pooled
    pixels = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    request = FeatureRequest(pooled=pooled > 0, tokens=True, token_pool=2)
    features = backbone.encode_image(pixels, request)
    assert features["tokens"].shape == (2, 4, 192)
    with torch.no_grad():
        direct = backbone.model.encode_image(normalised(backbone, pixels))
    torch.testing.assert_close(features["projected"], direct, rtol=1e-4, atol=1e-5)
    if pooled:
        by_hand = features["pooled"] @ backbone.model.visual.head.proj.weight.T
        torch.testing.assert_close(by_hand, direct, rtol=1e-4, atol=1e-5)


def test_coca_gives_a_vector_not_a_tuple(tmp_path):
    config = small(attentional_pool=True, attn_pooler_heads=2, output_tokens=True)
    config["text_cfg"] |= {"embed_cls": True, "output_tokens": True}
    config["multimodal_cfg"] = {"width": 32, "heads": 2, "layers": 1, "context_length": 16}
    config["custom_text"] = True
    file = tmp_path / "featcache-test-coca.json"
    file.write_text(json.dumps(config))
    backbone = OpenClipConfig(model=str(file), pretrained="random").open()
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    features = backbone.encode_image(pixels, FeatureRequest(pooled=True))
    with torch.no_grad():
        direct = backbone.model.encode_image(normalised(backbone, pixels), normalize=False)
    torch.testing.assert_close(features["projected"], direct)
    assert backbone.encode_text(["a cat"]).shape == (1, 16)
    assert (backbone.encode_text(["a cat"]).norm() - 1).abs() > 1e-3  # not normalised
