"""An adapted backbone's folder: opened it is the trained model; another base is refused."""

import json

import pytest
import torch

from featcache.adapter_folder import attach, read_adapter, write_adapter
from featcache.adapters.full import FullConfig
from featcache.backbones.adapted import AdaptedConfig
from featcache.backbones.base import FeatureRequest
from featcache.backbones.open_clip import OpenClipConfig
from featcache.errors import BackboneError

ARCHITECTURE = {
    "embed_dim": 16,
    "vision_cfg": {
        "image_size": 32,
        "layers": 2,
        "width": 32,
        "head_width": 16,
        "patch_size": 16,
    },
    "text_cfg": {
        "context_length": 16,
        "vocab_size": 49408,
        "width": 32,
        "heads": 2,
        "layers": 2,
    },
}


@pytest.fixture
def base(tmp_path):
    file = tmp_path / "adapted-tiny.json"
    file.write_text(json.dumps(ARCHITECTURE))
    return OpenClipConfig(model=str(file), pretrained="random:3")


def trained(base, folder):
    """A backbone whose image tower was changed, written to `folder`."""
    backbone = base.open()
    adapter = FullConfig().attach(backbone.trainable())
    original = base.open()
    with torch.no_grad():
        for parameter in adapter.trained_parameters().values():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    folder.mkdir()
    write_adapter(folder, base, original, FullConfig(), adapter.state())
    return backbone


def test_opened_it_is_the_trained_model(base, tmp_path):
    changed = trained(base, tmp_path / "a")
    opened = AdaptedConfig(model=str(tmp_path / "a")).open()
    pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    request = FeatureRequest()
    found = opened.encode_image(pixels, request)["projected"]
    expected = changed.encode_image(pixels, request)["projected"]
    assert torch.equal(found, expected)
    assert not torch.allclose(found, base.open().encode_image(pixels, request)["projected"])
    assert torch.equal(opened.encode_text(["a"]), changed.encode_text(["a"]))
    assert opened.spec.identity.kind == "adapted"
    assert opened.spec.identity.weights != base.open().spec.identity.weights
    assert not any(p.requires_grad for p in opened.model.parameters())


def test_another_base_is_refused(base, tmp_path):
    trained(base, tmp_path / "a")
    held = read_adapter(tmp_path / "a")
    other = base.model_copy(update={"pretrained": "random:4"})
    with pytest.raises(BackboneError, match="was trained on adapted-tiny with weights"):
        attach(held, other.open())


def test_damaged_and_missing_folders_are_refused(base, tmp_path):
    trained(base, tmp_path / "a")
    with pytest.raises(BackboneError, match="no such folder"):
        AdaptedConfig(model=str(tmp_path / "none")).open()
    record = tmp_path / "a" / "adapter.json"
    text = record.read_text()
    moved = json.loads(text)
    moved["base"]["model"] = "local-dir:/nowhere"
    record.write_text(json.dumps(moved))
    match = r"base of .*/a: .*/nowhere: no such folder.* set backbone\.base_model"
    with pytest.raises(BackboneError, match=match):
        AdaptedConfig(model=str(tmp_path / "a")).open()
    record.write_text(text)
    tensors = tmp_path / "a" / "adapter.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:100])
    with pytest.raises(BackboneError, match="damaged adapter"):
        AdaptedConfig(model=str(tmp_path / "a")).open()


def test_gradients_reach_the_chosen_tower_only(base):
    backbone = base.open()
    towers = backbone.trainable()
    adapter = FullConfig(towers="image").attach(towers)
    features = towers.encode_image(torch.randn(2, 3, 32, 32))
    (features.sum() + towers.encode_text(towers.tokenize(["a", "b"])).sum()).backward()
    with_gradient = {n for n, p in backbone.model.named_parameters() if p.grad is not None}
    assert with_gradient == {n for n in adapter.state() if n.startswith("visual.")}
