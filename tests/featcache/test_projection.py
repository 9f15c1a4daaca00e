"""Heads behind a dual encoder: what they do to features, and the backbone they make."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from featcache.adapter_folder import write_adapter
from featcache.adapters.projection import ProjectionConfig
from featcache.backbones.adapted import AdaptedConfig
from featcache.backbones.base import FeatureRequest
from featcache.backbones.open_clip import OpenClipConfig
from featcache.errors import BackboneError

from .test_vpt import ARCHITECTURE, pixels

EVERYTHING = FeatureRequest(pooled=True, tokens=True, before_last=1)


@pytest.fixture
def base(tmp_path):
    file = tmp_path / "projection-tiny.json"
    file.write_text(json.dumps(ARCHITECTURE))
    return OpenClipConfig(model=str(file), pretrained="random:3")


def changed(adapter):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.trained_parameters().values():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return adapter


def test_residual_and_linear_heads_change_nothing_at_first(base):
    towers = base.open().trainable()
    features = torch.randn(5, 16)
    adapter = ProjectionConfig(image="residual", text="linear").attach(towers)
    assert torch.equal(adapter.image(features), features)
    assert torch.equal(adapter.text(features), features)
    assert math.isclose(adapter.logit_scale.exp().item(), 1 / 0.07, rel_tol=1e-5)
    both = adapter.image(features).sum() + adapter.text(features).sum()
    both.backward()
    assert not any(p.grad is not None for p in towers.model.parameters())
    assert adapter.state()["image.second.weight"].grad is not None


def test_heads_follow_their_equations(base):
    towers = base.open().trainable()
    features = 7 * torch.randn(5, 16)
    config = ProjectionConfig(image="mlp", text="linear", dim=8, hidden=12)
    state = changed(config.attach(towers)).state()
    adapter = config.attach(towers)
    adapter.load(state)
    first, bias, second = (
        state[f"image.{name}"] for name in ("first.weight", "first.bias", "second.weight")
    )
    for row in range(5):
        x = features[row] / features[row].square().sum().sqrt()
        expected = second @ F.gelu(first @ x + bias)
        assert torch.allclose(adapter.image(features)[row], expected, atol=1e-5)
        expected = state["text.matrix.weight"] @ features[row]
        assert torch.allclose(adapter.text(features)[row], expected, atol=1e-5)
    residual = changed(ProjectionConfig().attach(towers))
    longer = residual.image(2 * features)
    assert torch.allclose(longer, 2 * residual.image(features), atol=1e-5)  # lengths pass through


def test_the_folder_opens_as_an_encoder_with_the_heads_behind_it(base, tmp_path):
    original = base.open()
    config = ProjectionConfig(image="linear", text="mlp", dim=8)
    adapter = changed(config.attach(original.trainable()))
    folder = tmp_path / "p"
    folder.mkdir()
    write_adapter(folder, base, base.open(), config, adapter.state())
    opened = AdaptedConfig(model=str(folder)).open()
    assert opened.spec.projected_dim == 8
    assert opened.spec.identity.kind == "adapted"
    assert math.isclose(opened.spec.logit_scale, adapter.logit_scale.exp().item(), rel_tol=1e-6)
    own, found = (b.encode_image(pixels(), EVERYTHING) for b in (original, opened))
    with torch.no_grad():
        assert torch.allclose(found["projected"], adapter.image(own["projected"]), atol=1e-5)
        expected = adapter.text(original.encode_text(["a dog", "a cat"]))
    assert torch.allclose(opened.encode_text(["a dog", "a cat"]), expected, atol=1e-5)
    assert torch.equal(found["pooled"], own["pooled"])
    assert torch.equal(found["tokens"], own["tokens"])
    assert torch.allclose(opened.finish_from(own["tokens"], 1), found["projected"], atol=1e-5)
    opened.move("cpu", "bf16")
    half = opened.encode_image(pixels(), EVERYTHING)
    assert half["projected"].dtype == torch.float32
    assert torch.allclose(half["projected"], found["projected"], atol=0.1, rtol=0.1)
    assert torch.allclose(
        opened.finish_from(half["tokens"], 1), half["projected"], atol=0.05, rtol=0.05
    )


def test_widths_that_do_not_fit_are_refused(base):
    towers = base.open().trainable()
    with pytest.raises(BackboneError, match=r"adapter\.text residual keeps the width 16"):
        ProjectionConfig(image="linear", dim=8).attach(towers)
    with pytest.raises(ValidationError, match="leave nothing to train"):
        ProjectionConfig(image="none", text="none")
