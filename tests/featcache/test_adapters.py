"""The same checks of every adapter: what is trained, kept, read back, and that the rest is frozen.

A new file in `featcache/adapters` is checked by being there.
"""

import json
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from torch import nn

from featcache.adapter_folder import write_adapter
from featcache.adapters import ADAPTERS
from featcache.adapters.base import ReplacedWeights
from featcache.backbones import BACKBONES
from featcache.backbones.adapted import AdaptedConfig
from featcache.backbones.base import FeatureRequest
from featcache.backbones.open_clip import OpenClipConfig
from featcache.backbones.timm import TimmConfig
from featcache.backbones.trainable import TrainableTowers

from .test_vpt import ARCHITECTURE, pixels

CHANGE_FEATURES_AT_FIRST = {"vpt"}
"""Adapters that begin with random parts; all others begin as the base itself, bit for bit."""


@pytest.fixture
def base(tmp_path):
    file = tmp_path / "adapters-tiny.json"
    file.write_text(json.dumps(ARCHITECTURE))
    return OpenClipConfig(model=str(file), pretrained="random:3")


def features(towers, adapter):
    """Image features with gradients; heads on features see the backbone's."""
    found = towers.encode_image(pixels())
    return adapter.image(found) if hasattr(adapter, "image") else found


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapter(kind, base, tmp_path):
    config = ADAPTERS[kind]()
    backbone, untouched = base.open(), base.open()
    plain = untouched.encode_image(pixels(), FeatureRequest())["projected"]
    towers = backbone.trainable()
    torch.manual_seed(1)
    adapter = config.attach(towers)
    folded = base.open()
    fresh = config.attach(folded.trainable())
    fresh.fold()
    found = fresh.finish(folded).encode_image(pixels(), FeatureRequest())["projected"]
    assert torch.equal(found, plain) == (kind not in CHANGE_FEATURES_AT_FIRST)
    before = features(towers, adapter)  # with gradients, kernels add in another order
    assert torch.allclose(before, plain, atol=1e-5) == (kind not in CHANGE_FEATURES_AT_FIRST)

    # Gradients reach what is trained in the image tower, and nothing else.
    trained = adapter.trained_parameters()
    parameters = {id(p): p for module in (backbone.model, adapter) for p in module.parameters()}
    own = {id(p) for p in trained.values()}
    assert {key for key, p in parameters.items() if p.requires_grad} <= own
    if trained:
        before.square().sum().backward()
        assert {key for key, p in parameters.items() if p.grad is not None} <= own
        assert any(p.grad is not None and p.grad.any() for p in trained.values())

    # Drawn again with the same seed it is the same; loaded, it computes the same.
    torch.manual_seed(1)
    towers_again = base.open().trainable()
    again = config.attach(towers_again)
    assert list(again.state()) == list(adapter.state())
    assert all(torch.equal(t, again.state()[name]) for name, t in adapter.state().items())
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(0.05 * torch.randn(parameter.shape))
        again.load(adapter.state())
        changed = features(towers, adapter)
        assert torch.equal(features(towers_again, again), changed)
    assert torch.allclose(changed, plain, atol=1e-5) == (not trained)

    # Written and opened it is that backbone, in evaluation mode, and the file holds nothing more.
    folder = tmp_path / "adapted"
    folder.mkdir()
    write_adapter(folder, base, untouched, config, adapter.state())
    held = sum(t.numel() * t.element_size() for t in adapter.state().values())
    assert (folder / "adapter.safetensors").stat().st_size < 1.1 * held + 5000
    opened = AdaptedConfig(model=str(folder)).open()
    assert torch.allclose(
        opened.encode_image(pixels(), FeatureRequest())["projected"], changed, atol=1e-5
    )
    assert not any(p.requires_grad for p in opened.model.parameters())
    opened.move("cpu", "bf16")
    half = opened.encode_image(pixels(), FeatureRequest())["projected"]
    assert torch.nn.functional.cosine_similarity(half, changed).min() > 0.99


def test_frozen_parts_stay_in_evaluation_while_others_train():
    """Batch norms of frozen weights keep their statistics; those of trained ones move."""
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout())
    towers = cast(TrainableTowers, SimpleNamespace(model=model.eval(), name="toy"))
    names = {name for name in model.state_dict() if not name.startswith("0.")}
    adapter = ReplacedWeights(towers, names).train()
    assert [part.training for part in model] == [False, True, True, False]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model(3 + torch.randn(8, 4))
    moved = {name for name, tensor in model.state_dict().items() if not tensor.equal(before[name])}
    assert moved == {"2.running_mean", "2.running_var", "2.num_batches_tracked"}
    assert moved <= adapter.state().keys()
    assert {name for name, p in model.named_parameters() if p.requires_grad} <= names
    assert adapter.trained_parameters().keys() == {"1.weight", "1.bias", "2.weight", "2.bias"}
    adapter.eval()
    assert not any(part.training for part in model.modules())


@pytest.mark.parametrize("kind", [k for k, c in ADAPTERS.items() if "dropout" in c.model_fields])
def test_dropout_follows_the_adapter_not_the_towers(kind, base):
    """Trainers keep frozen towers in evaluation and call `train` on the adapter alone."""
    towers = base.open().trainable()
    towers.model.eval()
    adapter = ADAPTERS[kind](dropout=0.5).attach(towers)
    with torch.no_grad():
        for parameter in adapter.trained_parameters().values():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    adapter.train()
    assert not torch.allclose(features(towers, adapter), features(towers, adapter), atol=1e-4)
    adapter.eval()
    assert torch.equal(features(towers, adapter), features(towers, adapter))
    adapter.train()
    adapter.fold()
    with torch.no_grad():
        assert torch.equal(features(towers, adapter), features(towers, adapter))


def test_an_adapted_backbone_has_its_base_defaults(tmp_path, base):
    timm = TimmConfig(model="test_vit", pretrained="random")
    for name, options in (("clip", base), ("timm", timm)):
        folder = tmp_path / name
        folder.mkdir()
        backbone = options.open()
        config = ADAPTERS["last_blocks"]()
        write_adapter(
            folder, options, backbone, config, config.attach(backbone.trainable()).state()
        )
        adapted = BACKBONES["adapted"].model_validate({"model": str(folder)})
        assert adapted.image_only == options.image_only == (name == "timm")
        assert adapted.default_text_policy == options.default_text_policy == "raw"
    record = json.loads((tmp_path / "clip" / "adapter.json").read_text())
    record["base"] = {"kind": "blip", "model": "base"}
    (tmp_path / "clip" / "adapter.json").write_text(json.dumps(record))
    assert AdaptedConfig(model=str(tmp_path / "clip")).default_text_policy == "picture_of"
