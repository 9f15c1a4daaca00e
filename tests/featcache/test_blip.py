import io
import json
import math
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn.functional import adaptive_avg_pool2d, cosine_similarity, normalize

from featcache.backbones import BACKBONES
from featcache.backbones.base import FeatureRequest
from featcache.backbones.blip import PRESETS, Blip, BlipConfig
from featcache.backbones.open_clip import OpenClipConfig
from featcache.errors import BackboneError
from featcache.images import load_pixels

ALL = FeatureRequest(projected=True, pooled=True, tokens=True, multimodal="states", itm=True)
TEXTS = ["a cat", "the dog of the cat, a photo", "a " * 100, "", "b"]


@pytest.fixture(scope="module")
def backbone(tiny_blip) -> Blip:
    return BlipConfig(model=str(tiny_blip), max_text_tokens=12).open()


@pytest.fixture(scope="module")
def original(tiny_blip):
    """transformers' own model and tokenizer, with its own attention."""
    from transformers import BertTokenizer, BlipForImageTextRetrieval

    model = BlipForImageTextRetrieval.from_pretrained(tiny_blip, local_files_only=True).eval()
    return model, BertTokenizer.from_pretrained(tiny_blip, local_files_only=True)


@pytest.fixture(scope="module")
def pixels():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (5, 3, 32, 32), generator=generator, dtype=torch.uint8)


def normalised(backbone, pixels):
    mean = torch.tensor(backbone.spec.pixels.mean)[:, None, None]
    std = torch.tensor(backbone.spec.pixels.std)[:, None, None]
    return (pixels.float() / 255 - mean) / std


def inputs_of(tokenizer, **options):
    found = tokenizer(TEXTS, truncation=True, max_length=12, return_tensors="pt", **options)
    return {"input_ids": found["input_ids"], "attention_mask": found["attention_mask"]}


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_it_is_registered():
    assert BACKBONES["blip"] is BlipConfig
    assert set(PRESETS) == {"base", "large"}


def test_spec_says_what_the_model_is(backbone):
    spec = backbone.spec
    assert (spec.projected_dim, spec.pooled_dim, spec.token_dim) == (24, 48, 48)
    assert (spec.token_grid, spec.num_layers, spec.joint) == ((4, 4), 2, (12, 32))
    assert spec.logit_scale == pytest.approx(1 / 0.07, rel=1e-3)
    assert (spec.pixels.size, spec.pixels.resize_mode) == ((32, 32), "squash")
    assert spec.pixels.interpolation == "bicubic"


@torch.no_grad()
def test_contrastive_features_equal_the_models_own(backbone, original, pixels):
    model, tokenizer = original
    inputs = inputs_of(tokenizer, padding=True)
    values = normalised(backbone, pixels)
    expected = model(pixel_values=values, use_itm_head=False, **inputs).itm_score
    image = backbone.encode_image(pixels, FeatureRequest())["projected"]
    text = backbone.encode_text(TEXTS)
    close(normalize(image, dim=-1) @ normalize(text, dim=-1).T, expected)
    assert expected.std() > 0.05  # the towers do see their input
    assert (image.norm(dim=1) - 1).abs().min() > 1e-3  # not normalised
    vision = model.vision_model(values).last_hidden_state
    close(image, model.vision_proj(vision[:, 0]))


@torch.no_grad()
@pytest.mark.parametrize("padding", ["max_length", True])
def test_joint_features_equal_the_models_own(backbone, original, pixels, padding):
    model, tokenizer = original
    inputs = inputs_of(tokenizer, padding=padding)
    values = normalised(backbone, pixels)
    expected = model(pixel_values=values, use_itm_head=True, **inputs)
    found = backbone.encode_image(pixels, ALL, TEXTS)
    close(found["itm"], expected.itm_score)
    states = expected.question_embeds
    close(found["multimodal"][:, : states.shape[1]], states)
    close(found["multimodal_pooled"], states[:, 0])
    mask = inputs["attention_mask"].bool()
    assert torch.equal(found["multimodal_mask"][:, : mask.shape[1]], mask)
    assert found["multimodal_mask"].dtype == torch.bool
    assert found["multimodal_mask"].sum(1).tolist() == [4, 10, 12, 2, 3]
    assert expected.itm_score.std() > 0.05
    close(found["projected"], backbone.encode_image(pixels, FeatureRequest())["projected"])


@torch.no_grad()
def test_masked_padding_changes_no_feature(backbone, tiny_blip, pixels):
    longer = BlipConfig(model=str(tiny_blip), max_text_tokens=40).open()
    texts = [text for text in TEXTS if len(text) < 100]
    close(longer.encode_text(texts), backbone.encode_text(texts))
    short = backbone.encode_image(pixels[:4], ALL, texts)
    long = longer.encode_image(pixels[:4], ALL, texts)
    close(long["itm"], short["itm"])
    valid = short["multimodal_mask"]
    close(long["multimodal"][:, :12][valid], short["multimodal"][valid])
    assert not long["multimodal_mask"][:, 12:].any()


@torch.no_grad()
def test_long_texts_keep_their_end_token(backbone, original):
    _, tokenizer = original
    ids, mask = backbone.tokenize(TEXTS)
    assert ids.shape == (5, 12)
    assert ids[2, -1] == tokenizer.sep_token_id
    assert mask[2].all()


@torch.no_grad()
def test_the_encoder_token_replaces_the_first_one_in_the_joint_encoder_only(
    tiny_blip, backbone, original, pixels
):
    model, tokenizer = original
    config = BlipConfig(model=str(tiny_blip), max_text_tokens=12, enc_token=True)
    matcher = config.open()
    inputs = inputs_of(tokenizer, padding="max_length")
    inputs["input_ids"][:, 0] = len(tokenizer) + 1  # [DEC] is the one before
    expected = model(pixel_values=normalised(backbone, pixels), use_itm_head=True, **inputs)
    found = matcher.encode_image(pixels, ALL, TEXTS)
    close(found["itm"], expected.itm_score)
    assert (found["itm"] - backbone.encode_image(pixels, ALL, TEXTS)["itm"]).abs().max() > 1e-3
    close(matcher.encode_text(TEXTS), backbone.encode_text(TEXTS))
    assert matcher.spec.identity.options != backbone.spec.identity.options
    assert matcher.spec.identity.weights == backbone.spec.identity.weights


@torch.no_grad()
@pytest.mark.parametrize("layer", [1, 2, -1])
def test_tokens_are_the_patches_of_a_block(backbone, original, pixels, layer):
    model, _ = original
    vision = model.vision_model(normalised(backbone, pixels), output_hidden_states=True)
    blocks = vision.hidden_states  # the embeddings first
    expected = blocks[layer if layer > 0 else 2][:, 1:]
    request = FeatureRequest(pooled=True, tokens=True, token_layer=layer)
    found = backbone.encode_image(pixels, request)
    close(found["tokens"], expected)
    close(found["pooled"], vision.last_hidden_state[:, 0])
    if layer != 1:
        close(model.vision_model.post_layernorm(found["tokens"]), vision.last_hidden_state[:, 1:])
    pooled = FeatureRequest(tokens=True, token_layer=layer, token_pool=2)
    grid = expected.transpose(1, 2).reshape(5, 48, 4, 4)
    by_hand = adaptive_avg_pool2d(grid, 2).flatten(2).transpose(1, 2)
    close(backbone.encode_image(pixels, pooled)["tokens"], by_hand)


@torch.no_grad()
@pytest.mark.parametrize("blocks", [1, 2])
def test_the_last_blocks_finish_what_entered_them(backbone, original, pixels, blocks):
    model, _ = original
    vision = model.vision_model(normalised(backbone, pixels), output_hidden_states=True)
    request = FeatureRequest(tokens=True, before_last=blocks)
    found = backbone.encode_image(pixels, request)
    close(found["tokens"], vision.hidden_states[2 - blocks])
    close(backbone.finish_from(found["tokens"], blocks), found["projected"])
    with pytest.raises(BackboneError, match="expected before_last:1 to before_last:2"):
        backbone.tail(3)


def test_the_vision_tower_runs_once_for_all_features(backbone, pixels, monkeypatch):
    calls = []
    embeddings = backbone.model.vision_model.embeddings
    hook = embeddings.register_forward_hook(lambda *_: calls.append(1))
    features = backbone.encode_image(pixels, ALL, TEXTS)
    hook.remove()
    assert len(calls) == 1
    assert set(features) == {
        *("projected", "pooled", "tokens", "itm"),
        *("multimodal", "multimodal_mask", "multimodal_pooled"),
    }
    pooled = FeatureRequest(projected=False, multimodal="pooled")
    assert set(backbone.encode_image(pixels, pooled, TEXTS)) == {"multimodal_pooled"}


@pytest.mark.parametrize(("precision", "least"), [("bf16", 0.998), ("fp16", 0.99998)])
def test_low_precision_stays_close_to_fp32(tiny_blip, backbone, pixels, precision, least):
    fast = BlipConfig(model=str(tiny_blip), max_text_tokens=12).open(precision=precision)
    assert fast.spec.identity == backbone.spec.identity  # hashed before the cast
    found, exact = (one.encode_image(pixels, ALL, TEXTS) for one in (fast, backbone))
    valid = exact["multimodal_mask"]
    for name, value in found.items():
        if name == "multimodal_mask":
            assert torch.equal(value, valid)
            continue
        assert value.dtype == torch.float32
        assert not torch.equal(value, exact[name])
        one, other = (x[valid] if name == "multimodal" else x for x in (value, exact[name]))
        assert cosine_similarity(one, other, dim=-1).min() > least, name
    cosine = cosine_similarity(fast.encode_text(TEXTS), backbone.encode_text(TEXTS))
    assert cosine.min() > least


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "transparent P", "CMYK"])
def test_pixels_are_those_of_the_image_processor(backbone, make_photo, mode):
    image = make_photo(50, 37, 3)
    if mode == "transparent P":
        image = image.convert("P", palette=Image.Palette.ADAPTIVE, colors=16)
    elif mode in ("RGBA", "LA"):
        image = image.convert(mode)
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    else:
        image = image.convert(mode)
    stream = io.BytesIO()
    options = {"transparency": 3} if mode == "transparent P" else {}
    image.save(stream, "TIFF" if mode == "CMYK" else "PNG", **options)
    data = stream.getvalue()
    spec = backbone.spec.pixels
    expected = backbone.reference_transform()(Image.open(io.BytesIO(data)))
    found = normalised(backbone, load_pixels(data, spec)[0])
    step = 1 / 255 / np.asarray(spec.std, np.float32)[:, None, None]
    assert (np.abs((found - expected).numpy()) / step).max() < 1.01
    reference = load_pixels(data, spec, "reference", transform=backbone.reference_transform())
    assert torch.equal(reference[0], expected)


def test_it_is_opened_by_folder_whatever_its_name(tiny_blip, tmp_path, backbone):
    copy = tmp_path / "moved"
    shutil.copytree(tiny_blip, copy)
    moved = BlipConfig(model=f"local-dir:{copy}", max_text_tokens=12).open()
    assert moved.spec.identity.name == "blip-48-32"
    assert moved.spec.identity == backbone.spec.identity
    weights = load_file(copy / "model.safetensors")
    weights["itm_head.bias"][0] += 1e-6
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    changed = BlipConfig(model=str(copy), max_text_tokens=12).open()
    assert changed.spec.identity.weights != backbone.spec.identity.weights
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["cat"], vocabulary["dog"] = vocabulary["dog"], vocabulary["cat"]
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    swapped = BlipConfig(model=str(copy), max_text_tokens=12).open()
    assert swapped.spec.identity.architecture != backbone.spec.identity.architecture


def test_the_random_generator_is_left_alone(tiny_blip):
    before = torch.random.get_rng_state()
    backbone = BlipConfig(model=str(tiny_blip)).open()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not any(p.requires_grad for p in backbone.model.parameters())
    assert not backbone.model.training


def break_weights(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["itm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def edit(name, **changes):
    def change(folder):
        values = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(values | changes))

    return change


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (break_weights, {}, "do not fit: 1 tensors .* the first itm_head.weight"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\0" * 40), {}, "cannot be loaded"),
        (
            lambda f: (f / "model.safetensors").unlink(),
            {},
            r"cannot be loaded: .*; expected config",
        ),
        (lambda f: (f / "config.json").unlink(), {}, "no config.json in it; expected"),
        (lambda f: (f / "tokenizer.json").write_text("{"), {}, "cannot be loaded"),
        (edit("config.json", image_text_hidden_size=25), {}, "do not fit: .*another shape"),
        (edit("preprocessor_config.json", size={"height": 40, "width": 40}), {}, "takes 32x32"),
        (edit("preprocessor_config.json", do_resize=False), {}, r"found \['do_resize'\]"),
        (edit("preprocessor_config.json", resample=1), {}, "bilinear or bicubic"),
        (None, {"max_text_tokens": 65}, "65 is more than the 64 positions"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused(tiny_blip, tmp_path, change, options, message):
    folder = tmp_path / "model"
    shutil.copytree(tiny_blip, folder)
    if change is not None:
        change(folder)
    with pytest.raises(BackboneError, match=message) as caught:
        BlipConfig(model=str(folder), **options).open()
    assert "\n" not in str(caught.value)


def test_a_captioners_weights_are_refused(tiny_captioner):
    with pytest.raises(BackboneError, match="they are those of BlipForConditionalGeneration"):
        BlipConfig(model=str(tiny_captioner)).open()


@pytest.mark.parametrize("model", ["local-dir:/no/such", "/no/such", "small", "a/b/c"])
def test_unknown_models_are_refused_without_network(model):
    with pytest.raises(BackboneError, match=r"no such folder; expected .* or base or large"):
        BlipConfig(model=model).open()


def test_a_download_that_fails_is_one_line(monkeypatch):
    from transformers import BlipForImageTextRetrieval

    def refuse(name, **options):
        assert name == "Salesforce/blip-itm-large-coco"
        assert options["use_safetensors"]
        assert not options["local_files_only"]
        raise OSError("no\nnetwork here")

    monkeypatch.setattr(BlipForImageTextRetrieval, "from_pretrained", refuse)
    with pytest.raises(BackboneError, match=r"no network here; on a machine without network"):
        BlipConfig(model="large").open()


def test_without_transformers_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(BackboneError, match=r"pip install 'featcache\[blip\]'"):
        BlipConfig().open()


def test_a_backbone_without_joint_encoder_says_so(tiny_clip, pixels):
    clip = OpenClipConfig(model=f"local-dir:{tiny_clip}").open()
    for request in (FeatureRequest(multimodal="pooled"), FeatureRequest(itm=True)):
        with pytest.raises(BackboneError, match=r"no joint encoder .* backbone.kind blip"):
            clip.encode_image(pixels, request)


def test_the_scale_is_the_configurations(tiny_blip, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_blip, folder)
    edit("config.json", logit_scale_init_value=1.5)(folder)
    assert BlipConfig(model=str(folder)).open().spec.logit_scale == pytest.approx(math.exp(1.5))


def test_a_folder_in_the_older_layout_of_files(tiny_blip, tmp_path, backbone, capfd):
    """As on the hub: vocab.txt without tokenizer.json, and buffers among the weights."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_blip, folder)
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    words = sorted(vocabulary, key=vocabulary.get)
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    (folder / "tokenizer.json").unlink()
    options = {"tokenizer_class": "BertTokenizer", "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(options))
    weights = load_file(folder / "model.safetensors")
    weights["text_encoder.embeddings.position_ids"] = torch.arange(64)[None]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    older = BlipConfig(model=str(folder), max_text_tokens=12).open()
    assert older.spec.identity.weights == backbone.spec.identity.weights
    close(older.encode_text(TEXTS), backbone.encode_text(TEXTS))
    assert capfd.readouterr().err == ""
