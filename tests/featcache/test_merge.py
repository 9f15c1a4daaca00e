"""Merged, an adapted backbone is a model of its own library with the same features."""

import pytest
import torch

from featcache import merge
from featcache.adapter_folder import write_adapter
from featcache.adapters.full import FullConfig
from featcache.adapters.last_blocks import LastBlocksConfig
from featcache.adapters.lora import LoraConfig
from featcache.adapters.vpt import VptConfig
from featcache.backbones.adapted import AdaptedConfig
from featcache.backbones.base import FeatureRequest
from featcache.backbones.blip import BlipConfig
from featcache.backbones.open_clip import OpenClipConfig
from featcache.backbones.timm import TimmConfig
from featcache.errors import BackboneError
from featcache.merge import MergeConfig

TEXTS = ["a photo of a cat", "word " * 100]


@pytest.fixture
def bases(tiny_clip, tiny_blip):
    return {
        "open_clip": OpenClipConfig(model=f"local-dir:{tiny_clip}"),
        "timm": TimmConfig(model="test_vit", pretrained="random:2", image_size=96),
        "blip": BlipConfig(model=str(tiny_blip), max_text_tokens=12),
    }


def adapted(base, adapter, folder):
    """A folder with an adapter that has changed something."""
    backbone = base.open()
    attached = adapter.attach(backbone.trainable())
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for tensor in attached.trained_parameters().values():
            tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.05)
    folder.mkdir()
    write_adapter(folder, base, backbone, adapter, attached.state())  # knows what it was
    return AdaptedConfig(model=str(folder))


def features(backbone):
    """By name, of two images and two texts."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(2, 3, *backbone.spec.pixels.size, generator=generator)
    projected = bool(backbone.spec.projected_dim)
    found = backbone.encode_image(pixels, FeatureRequest(projected=projected, pooled=True))
    return found | ({"text": backbone.encode_text(TEXTS)} if backbone.spec.has_text else {})


@pytest.mark.parametrize("kind", ["open_clip", "timm", "blip"])
@pytest.mark.parametrize(
    "adapter",
    [LoraConfig(rank=2), LastBlocksConfig(num_blocks=1), FullConfig()],
    ids=lambda config: config.kind,
)
def test_features_and_preprocessing_stay(bases, kind, adapter, tmp_path, capsys):
    source = adapted(bases[kind], adapter, tmp_path / "adapted")
    options = merge.run(MergeConfig(backbone=source, out=tmp_path / "deep" / "merged"))
    assert f"--backbone.kind {kind}" in capsys.readouterr().out
    expected, found = source.open(), options.open()
    assert found.spec.pixels == expected.spec.pixels
    assert found.spec.logit_scale == expected.spec.logit_scale
    wanted = features(expected)
    for name, values in features(found).items():
        torch.testing.assert_close(values, wanted[name], atol=1e-6, rtol=1e-6)
    base = features(bases[kind].open())
    assert any(not torch.allclose(base[name], wanted[name], atol=1e-3) for name in base)
    modes = {file.stat().st_mode & 0o777 for file in (tmp_path / "deep" / "merged").iterdir()}
    assert len(modes) == 1


def test_open_clip_itself_opens_it(bases, tmp_path):
    import open_clip

    source = adapted(bases["open_clip"], LoraConfig(towers="both"), tmp_path / "adapted")
    merge.run(MergeConfig(backbone=source, out=tmp_path / "merged"))
    name = f"local-dir:{tmp_path / 'merged'}"
    model, transform = open_clip.create_model_from_pretrained(name)
    tokens = open_clip.get_tokenizer(name)(TEXTS)
    expected = source.open()
    size = expected.spec.pixels.size[0]
    assert str(size) in str(transform)
    pixels = torch.randn(2, 3, size, size)
    with torch.no_grad():
        image = model.eval().encode_image(pixels)
        text = model.encode_text(tokens)
    wanted = expected.encode_image(pixels, FeatureRequest())["projected"]
    torch.testing.assert_close(image, wanted, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(text, expected.encode_text(TEXTS), atol=1e-6, rtol=1e-6)


def test_an_adapter_on_an_adapted_backbone(bases, tmp_path):
    first = adapted(bases["open_clip"], LoraConfig(rank=2), tmp_path / "first")
    second = adapted(first, LoraConfig(rank=3, sites=("fc1",)), tmp_path / "second")
    options = merge.run(MergeConfig(backbone=second, out=tmp_path / "merged"))
    assert options.kind == "open_clip"
    wanted, before = features(second.open()), features(first.open())
    for name, values in features(options.open()).items():
        torch.testing.assert_close(values, wanted[name], atol=1e-6, rtol=1e-6)
    assert not torch.allclose(wanted["projected"], before["projected"], atol=1e-3)

    prompted = adapted(bases["open_clip"], VptConfig(), tmp_path / "prompted")
    above = adapted(prompted, LoraConfig(rank=2), tmp_path / "above")
    with pytest.raises(BackboneError, match="prompted: adapter vpt adds parts"):
        merge.run(MergeConfig(backbone=above, out=tmp_path / "none"))


def test_what_no_weight_can_hold_is_refused(bases, tmp_path):
    source = adapted(bases["open_clip"], VptConfig(), tmp_path / "adapted")
    with pytest.raises(BackboneError, match="adapter vpt adds parts that no weight of"):
        merge.run(MergeConfig(backbone=source, out=tmp_path / "merged"))
    assert not (tmp_path / "merged").exists()


def test_only_adapted_backbones_and_new_folders(bases, tmp_path):
    with pytest.raises(BackboneError, match="open_clip has no adapter to merge"):
        merge.run(MergeConfig(backbone=bases["open_clip"], out=tmp_path / "merged"))
    (tmp_path / "there").mkdir()
    source = AdaptedConfig(model="x")
    with pytest.raises(BackboneError, match="exists already"):
        merge.run(MergeConfig(backbone=source, out=tmp_path / "there"))


def test_what_reads_back_differently_is_not_kept(bases, tmp_path, monkeypatch):
    source = adapted(bases["open_clip"], LoraConfig(), tmp_path / "adapted")
    monkeypatch.setattr(merge, "weights_hash", lambda model: "another")
    with pytest.raises(BackboneError, match="is not what was written"):
        merge.run(MergeConfig(backbone=source, out=tmp_path / "merged"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapted"]
