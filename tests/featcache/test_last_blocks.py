"""The last blocks of a tower: which weights they are, on tokens and on pixels the same."""

import json

import pytest
import torch

from featcache.adapter_folder import write_adapter
from featcache.adapters.last_blocks import LastBlocksConfig
from featcache.backbones.adapted import AdaptedConfig
from featcache.backbones.base import FeatureRequest
from featcache.backbones.open_clip import OpenClipConfig
from featcache.errors import BackboneError

from .test_vpt import ARCHITECTURE, RESNET, pixels


@pytest.fixture
def base(tmp_path):
    file = tmp_path / "last-blocks-tiny.json"
    file.write_text(json.dumps(ARCHITECTURE))
    return OpenClipConfig(model=str(file), pretrained="random:3")


def test_weights_of_the_tail_are_trained_and_no_others(base):
    backbone = base.open()
    towers = backbone.trainable()
    adapter = LastBlocksConfig(num_blocks=2).attach(towers)
    names = set(adapter.state())
    expected = {
        name
        for name in backbone.model.state_dict()
        if name == "visual.proj"
        or name.startswith(("visual.ln_post.", "visual.transformer.resblocks.1."))
        or name.startswith("visual.transformer.resblocks.2.")
    }
    assert names == expected
    tokens = backbone.encode_image(pixels(), FeatureRequest(tokens=True, before_last=2))["tokens"]
    by_tokens = towers.tail(2)(tokens)
    by_tokens.square().sum().backward()
    found = {n: p.grad.clone() for n, p in backbone.model.named_parameters() if p.grad is not None}
    assert found.keys() == names
    backbone.model.zero_grad(set_to_none=True)
    by_pixels = towers.encode_image(pixels())
    by_pixels.square().sum().backward()
    assert torch.allclose(by_tokens, by_pixels, atol=1e-5)
    for name, parameter in backbone.model.named_parameters():
        assert (parameter.grad is not None) == (name in names)
        if name in names:
            assert torch.allclose(parameter.grad, found[name], atol=1e-4)


def test_trained_on_tokens_it_is_a_backbone_for_pixels(base, tmp_path):
    backbone = base.open()
    config = LastBlocksConfig()
    adapter = config.attach(backbone.trainable())
    with torch.no_grad():
        for parameter in adapter.trained_parameters().values():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    folder = tmp_path / "a"
    folder.mkdir()
    write_adapter(folder, base, base.open(), config, adapter.state())
    opened = AdaptedConfig(model=str(folder)).open()
    request = FeatureRequest(tokens=True, before_last=1)
    found, plain = (b.encode_image(pixels(), request) for b in (opened, base.open()))
    assert torch.equal(found["tokens"], plain["tokens"])  # a base's cache fits it
    assert not torch.allclose(found["projected"], plain["projected"], atol=1e-3)
    assert torch.allclose(opened.finish_from(plain["tokens"], 1), found["projected"], atol=1e-5)


def test_more_blocks_than_there_are_and_towers_without_are_refused(base, tmp_path):
    with pytest.raises(BackboneError, match="before_last:4 does not exist"):
        LastBlocksConfig(num_blocks=4).attach(base.open().trainable())
    file = tmp_path / "last-blocks-resnet.json"
    file.write_text(json.dumps({**ARCHITECTURE, "vision_cfg": RESNET}))
    resnet = OpenClipConfig(model=str(file), pretrained="random").open()
    with pytest.raises(BackboneError, match="so does adapter last_blocks, take lora or full"):
        LastBlocksConfig().attach(resnet.trainable())
