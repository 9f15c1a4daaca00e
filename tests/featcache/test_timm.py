"""timm's models as backbones: the same numbers as timm's own functions, and no text anywhere."""

import io
import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from featcache.backbones import BACKBONES
from featcache.backbones.base import FeatureRequest, PixelSpec
from featcache.backbones.timm import TimmConfig
from featcache.class_text import class_text_features, open_cache_backbone
from featcache.errors import BackboneError, CacheError
from featcache.extract import ExtractConfig, run
from featcache.images import Views, load_pixels
from featcache.reader import open_cache
from heads import predict, train
from heads.models.linear import LinearConfig
from heads.models.zero_shot import ZeroShotConfig
from heads.optim import OptimConfig
from heads.predict import PredictConfig
from heads.train import TrainConfig

POOLED = FeatureRequest(projected=False, pooled=True)
KINDS = ["test_vit", "test_vit2", "test_vit3", "test_vit_relpos", "test_resnet", "test_convnext"]
KINDS += ["test_efficientnet", "test_maxvit"]


@pytest.fixture(scope="module")
def opened():
    """Opens a model with random weights, each once."""
    models = {}

    def build(name, precision="fp32"):
        if (name, precision) not in models:
            config = TimmConfig(model=name, pretrained="random:4")
            models[name, precision] = config.open(precision=precision)
        return models[name, precision]

    return build


def images(backbone, number=2):
    generator = torch.Generator().manual_seed(0)
    shape = (number, 3, *backbone.spec.pixels.size)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def normalised(backbone, pixels):
    mean = torch.tensor(backbone.spec.pixels.mean)[:, None, None]
    std = torch.tensor(backbone.spec.pixels.std)[:, None, None]
    return (pixels.float() / 255 - mean) / std


def test_it_is_registered_and_knows_no_text(opened):
    assert BACKBONES["timm"] is TimmConfig
    spec = opened("test_vit").spec
    assert (spec.has_text, spec.projected_dim, spec.logit_scale) == (False, 0, 1.0)
    for request in (FeatureRequest(), FeatureRequest(pooled=True)):
        with pytest.raises(BackboneError, match=r"no projection .* features.pooled true"):
            opened("test_vit").encode_image(images(opened("test_vit")), request)


@pytest.mark.parametrize("name", KINDS)
def test_features_are_timms_own(opened, name):
    backbone = opened(name)
    model, pixels = backbone.model, images(backbone)
    x = normalised(backbone, pixels)
    with torch.no_grad():
        pooled = model.forward_head(model.forward_features(x), pre_logits=True)
        cells = model.forward_intermediates(x, indices=1, output_fmt="NCHW")[1][0]
    spec = backbone.spec
    assert spec.pooled_dim == pooled.shape[1]
    assert spec.token_grid == cells.shape[2:]
    request = FeatureRequest(projected=False, pooled=True, tokens=True)
    features = backbone.encode_image(pixels, request)
    torch.testing.assert_close(features["pooled"], pooled, rtol=1e-5, atol=1e-5)
    by_place = cells.flatten(2).transpose(1, 2)
    torch.testing.assert_close(features["tokens"], by_place, rtol=1e-5, atol=1e-5)
    assert not features["pooled"].is_inference()
    alone = backbone.encode_image(pixels, POOLED)["pooled"]
    torch.testing.assert_close(alone, pooled, rtol=1e-5, atol=1e-5)


def test_tokens_of_a_layer_and_before_the_last_blocks(opened):
    backbone = opened("test_vit2")
    pixels = images(backbone)
    with torch.no_grad():
        theirs = backbone.model.get_intermediate_layers(
            normalised(backbone, pixels), n=[2, 5], return_prefix_tokens=True
        )
    for layer, (patches, prefix) in zip((3, 6), theirs, strict=True):
        request = FeatureRequest(projected=False, tokens=True, token_layer=layer)
        found = backbone.encode_image(pixels, request)["tokens"]
        torch.testing.assert_close(found, patches, rtol=1e-5, atol=1e-5)
        blocks = backbone.spec.num_layers - layer
        request = FeatureRequest(False, True, tokens=True, before_last=blocks)
        features = backbone.encode_image(pixels, request)
        whole = torch.cat([prefix, patches], dim=1)
        torch.testing.assert_close(features["tokens"], whole, rtol=1e-5, atol=1e-5)
        finished = backbone.finish_from(features["tokens"], blocks)
        torch.testing.assert_close(finished, features["pooled"], rtol=1e-5, atol=1e-5)


def test_two_prefix_tokens_and_a_head_that_averages_them():
    backbone = TimmConfig(model="deit_tiny_distilled_patch16_224", pretrained="random").open()
    pixels = images(backbone, 1)
    request = FeatureRequest(False, True, tokens=True, before_last=1)
    features = backbone.encode_image(pixels, request)
    assert features["tokens"].shape == (1, 2 + 14 * 14, 192)
    finished = backbone.finish_from(features["tokens"], 1)
    torch.testing.assert_close(finished, features["pooled"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["test_vit3", "test_resnet", "test_convnext"])
def test_low_precision_stays_close(opened, name):
    exact, fast = opened(name), opened(name, "bf16")
    assert fast.spec.identity == exact.spec.identity
    first, second = (b.encode_image(images(exact), POOLED)["pooled"] for b in (exact, fast))
    assert torch.nn.functional.cosine_similarity(first, second).min() > 0.999
    assert not torch.equal(first, second)


def timm_transform(**values):
    return timm.data.create_transform(
        input_size=(3, *values["size"]),
        interpolation=values["interpolation"],
        mean=values["mean"],
        std=values["std"],
        crop_pct=values["crop_pct"],
        crop_mode={"shortest": "center", "squash": "squash"}[values["resize_mode"]],
    )


def spec_of(**changes):
    values = {"size": (64, 64), "mean": (0.5, 0.4, 0.3), "std": (0.3, 0.25, 0.2)}
    values |= {"interpolation": "bicubic", "resize_mode": "shortest", "crop_pct": 0.9}
    values |= changes
    return PixelSpec(**values, convert_first=True), timm_transform(**values)


@pytest.mark.parametrize(("height", "width"), [(150, 200), (200, 150), (72, 72), (97, 301)])
@pytest.mark.parametrize("crop_pct", [0.875, 0.9, 0.95, 1.0])
@pytest.mark.parametrize("mode", ["shortest", "squash"])
def test_fast_pixels_are_within_one_step_of_timms(make_jpeg, height, width, crop_pct, mode):
    bilinear = "bilinear" if width > height else "bicubic"
    spec, transform = spec_of(crop_pct=crop_pct, resize_mode=mode, interpolation=bilinear)
    data = make_jpeg(height, width, 3)
    found = load_pixels(data, spec)[0].float()
    std, mean = (torch.tensor(v)[:, None, None] for v in (spec.std, spec.mean))
    expected = (transform(Image.open(io.BytesIO(data))) * std + mean) * 255
    assert (found - expected).abs().max() <= 1.001


@pytest.mark.parametrize("mode", ["P", "RGBA", "L", "CMYK"])
def test_images_become_rgb_first_as_timms_readers_do(make_photo, mode):
    photo = make_photo(120, 150, 5)
    if mode == "RGBA":
        image = photo.copy()
        image.putalpha(make_photo(120, 150, 6).convert("L"))
    else:
        image = photo.convert(mode)
    stream = io.BytesIO()
    image.save(stream, "TIFF" if mode == "CMYK" else "PNG")
    spec, transform = spec_of()
    std, mean = (torch.tensor(v)[:, None, None] for v in (spec.std, spec.mean))
    opened = Image.open(io.BytesIO(stream.getvalue())).convert("RGB")
    expected = (transform(opened) * std + mean) * 255
    assert (load_pixels(stream.getvalue(), spec)[0].float() - expected).abs().max() <= 1.001


def test_the_reference_transform_is_timms(opened, make_jpeg):
    backbone = opened("test_vit")
    config = timm.data.resolve_model_data_config(timm.create_model("test_vit"))
    assert config["crop_pct"] == backbone.spec.pixels.crop_pct == 0.95
    theirs = timm.data.create_transform(**config)
    data = make_jpeg(210, 300, 2)
    transform = backbone.reference_transform()
    views = Views(count=3, seed=1, scale=0.5)
    pixels = load_pixels(
        data, backbone.spec.pixels, "reference", views=views, row_id="a", transform=transform
    )
    assert torch.equal(pixels[0], theirs(Image.open(io.BytesIO(data))))
    # Augmented views are the same crops in both modes, none of them cut a second time.
    fast = load_pixels(data, backbone.spec.pixels, views=views, row_id="a")
    assert fast.shape == pixels.shape
    steps = (normalised(backbone, fast) - pixels).abs() * 255 * backbone.spec.pixels.std[0]
    assert steps.max() <= 2.001
    assert (steps > 1.001).float().mean() < 1e-4


@pytest.fixture
def weights_file(tmp_path):
    """A trained classifier's weights as a file; the model they came from."""
    torch.manual_seed(7)
    model = timm.create_model("test_vit", num_classes=12).eval()
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors", model


def test_a_weights_file_loads_whole_without_its_classifier(weights_file, tmp_path):
    file, model = weights_file
    backbone = TimmConfig(model="test_vit", pretrained=str(file)).open()
    assert "state_dict" not in backbone.model.pretrained_cfg
    pixels = images(backbone)
    with torch.no_grad():
        x = normalised(backbone, pixels)
        pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    found = backbone.encode_image(pixels, POOLED)["pooled"]
    torch.testing.assert_close(found, pooled, rtol=1e-5, atol=1e-5)
    # The same weights in another kind of file, under another name: the same backbone.
    torch.save({"state_dict": model.state_dict()}, tmp_path / "other.pth")
    other = TimmConfig(model="test_vit", pretrained=str(tmp_path / "other.pth")).open()
    assert other.spec.identity == backbone.spec.identity
    state = model.state_dict()
    state["norm.bias"][3] += 1e-6
    save_file(state, file)
    changed = TimmConfig(model="test_vit", pretrained=str(file)).open().spec.identity
    assert changed.weights != backbone.spec.identity.weights
    assert changed.architecture == backbone.spec.identity.architecture


def test_nothing_missing_is_filled_with_random_weights(weights_file):
    file, model = weights_file
    config = TimmConfig(model="test_vit", pretrained=str(file))
    state = model.state_dict()
    save_file({k: v for k, v in state.items() if k != "blocks.2.mlp.fc1.weight"}, file)
    with pytest.raises(BackboneError, match=r"do not load: .*blocks.2.mlp.fc1.weight"):
        config.open()
    save_file({**state, "extra": torch.zeros(2)}, file)
    with pytest.raises(BackboneError, match=r"do not load: .*extra"):
        config.open()
    file.write_bytes(b"not weights")
    with pytest.raises(BackboneError, match="do not load") as caught:
        config.open()
    assert "\n" not in str(caught.value)


def test_a_local_folder_brings_its_own_pixels(weights_file, tmp_path):
    file, model = weights_file
    folder = tmp_path / "model"
    folder.mkdir()
    file.rename(folder / "model.safetensors")
    values = {
        "architecture": "test_vit",
        "num_classes": 12,
        "pretrained_cfg": {
            "num_classes": 12,
            "input_size": [3, 160, 160],
            "fixed_input_size": True,
            "interpolation": "bilinear",
            "crop_pct": 0.8,
            "crop_mode": "squash",
            "mean": [0.1, 0.2, 0.3],
            "std": [0.4, 0.5, 0.6],
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    (folder / "config.json").write_text(json.dumps(values))
    backbone = TimmConfig(model=f"local-dir:{folder}").open()
    pixels = backbone.spec.pixels
    assert (pixels.crop_pct, pixels.resize_mode, pixels.interpolation) == (
        0.8,
        "squash",
        "bilinear",
    )
    assert (pixels.mean, pixels.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    with torch.no_grad():
        direct = model.forward_features(normalised(backbone, images(backbone)))
        direct = model.forward_head(direct, pre_logits=True)
    found = backbone.encode_image(images(backbone), POOLED)["pooled"]
    torch.testing.assert_close(found, direct, rtol=1e-5, atol=1e-5)
    (folder / "model.safetensors").unlink()
    with pytest.raises(BackboneError, match="do not load"):
        TimmConfig(model=f"local-dir:{folder}").open()


def test_random_weights_by_name_only_and_by_seed():
    def weights(pretrained):
        before = torch.random.get_rng_state()
        identity = TimmConfig(model="test_resnet", pretrained=pretrained).open().spec.identity
        assert torch.equal(torch.random.get_rng_state(), before)
        return identity.weights

    assert weights("random") == weights("random:0")
    assert weights("random:0") != weights("random:1")


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_another_image_size(name):
    backbone = TimmConfig(model=name, pretrained="random", image_size=96).open()
    assert backbone.spec.pixels.size == (96, 96)
    features = backbone.encode_image(images(backbone), FeatureRequest(False, True, tokens=True))
    rows, columns = backbone.spec.token_grid
    assert features["tokens"].shape[1] == rows * columns < 100
    assert backbone.reference_transform()(Image.new("L", (200, 150))).shape == (3, 96, 96)
    usual = TimmConfig(model=name, pretrained="random").open()
    assert usual.spec.identity != backbone.spec.identity


@pytest.mark.parametrize(
    ("model", "pretrained", "message"),
    [
        ("test_vit", "", r"is empty: test_vit needs weights; give one of its tags \(r160_in1k\)"),
        ("test_vti", "random", "not known to timm; did you mean test_vit"),
        ("test_vit", "laion", "neither a file nor a tag of test_vit; its tags: r160_in1k"),
        ("test_vit.other", "", "'other' is neither a file nor a tag of test_vit"),
        ("test_vit.r160_in1k", "other", "contradicts the tag of test_vit.r160_in1k"),
        ("test_vit", "random:x", "expected `random` or `random:SEED`"),
        ("local-dir:/no/such/folder", "", "no config.json in it"),
        ("hf-hub:org/name", "tag", "leave backbone.pretrained empty"),
    ],
)
def test_mistakes_say_what_to_do(model, pretrained, message):
    with pytest.raises(BackboneError, match=message) as caught:
        TimmConfig(model=model, pretrained=pretrained).open()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"crop_mode": "border"}, "cropped by 'border'; supported are 3 channels and center or"),
        ({"input_size": (1, 160, 160)}, "test_resnet wants 1 channels"),
        ({"interpolation": "lanczos"}, "resized by 'lanczos'"),
    ],
)
def test_pixels_that_cannot_be_made_are_refused(monkeypatch, change, message):
    create = timm.create_model

    def changed(*args, **options):
        model = create(*args, **options)
        model.pretrained_cfg |= change
        return model

    monkeypatch.setattr(timm, "create_model", changed)
    with pytest.raises(BackboneError, match=message):
        TimmConfig(model="test_resnet", pretrained="random").open()


@pytest.fixture
def captioned(image_folder):
    """A table of the small images with a caption each."""
    files = sorted(image_folder.rglob("*.jpg"))
    lines = ["path,label,split,captions"]
    for file in files:
        split, label = file.parts[-3:-1]
        lines.append(f"{file.relative_to(image_folder)},{label},{split},a {label}")
    (image_folder / "rows.csv").write_text("\n".join(lines))
    return image_folder


def test_from_images_to_predictions_without_text(captioned, tmp_path, monkeypatch):
    def config(**features):
        return ExtractConfig.model_validate(
            {
                "dataset": {"kind": "table", "file": captioned / "rows.csv", "root": captioned},
                "backbone": {"kind": "timm", "model": "test_vit", "pretrained": "random"},
                "cache": tmp_path / "cache",
                "device": "cpu",
                "batch_size": 4,
                "features": features,
            }
        )

    with pytest.raises(BackboneError, match=r"test_vit has no text tower; set features.text false"):
        run(config(text=True))
    with pytest.raises(BackboneError, match=r"features.projected false and features.pooled true"):
        run(config(projected=True))
    run(config())
    cache = open_cache(tmp_path / "cache")
    assert cache.feature_names() == ["image/pooled"]
    assert cache.attributes["num_captions"] == 14
    assert np.isfinite(cache.array("image/pooled").read()).all()
    with pytest.raises(BackboneError, match="is a timm model and reads no text; choose a head"):
        class_text_features(cache, ["a {name}"], lambda: open_cache_backbone(cache))

    def fit(head):
        options = {"optim": OptimConfig(epochs=3), "run": tmp_path / "run", "quiet": True}
        return train.run(TrainConfig(cache=tmp_path / "cache", head=head, **options)).run

    for head in (ZeroShotConfig(), LinearConfig()):
        with pytest.raises(CacheError, match="reads no text and has no projection") as caught:
            fit(head)
        assert "\n" not in str(caught.value)
    trained = fit(LinearConfig(feature="pooled", lrs=(0.1,), weight_decays=(0.0,)))
    tables = []
    for source in ({"cache": tmp_path / "cache", "split": "val"}, {"images": captioned / "val"}):
        out = tmp_path / f"{len(tables)}.csv"
        tables.append(predict.run(PredictConfig(run=trained, out=out, quiet=True, **source)).table)
    one, other = tables
    assert one["class_1"].tolist() == other["class_1"].tolist()
    np.testing.assert_allclose(one["probability_1"], other["probability_1"], rtol=1e-3)
