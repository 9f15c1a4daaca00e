"""LoRA: exact at its start and when merged, equal to a slow loop and to peft, small on disk."""

import copy
import json

import pytest
import torch

from featcache.adapter_folder import read_adapter, write_adapter
from featcache.adapters.lora import LoraConfig, chosen_blocks
from featcache.backbones.adapted import AdaptedConfig
from featcache.backbones.base import FeatureRequest
from featcache.backbones.open_clip import OpenClipConfig
from featcache.errors import BackboneError, ConfigError

EVERYTHING = LoraConfig(rank=3, sites=("q", "k", "v", "out", "fc1", "fc2"), towers="both")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    file = tmp_path_factory.mktemp("lora") / "lora-tiny.json"
    vision = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16}
    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    file.write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}))
    return OpenClipConfig(model=str(file), pretrained="random:3")


@pytest.fixture(scope="module")
def _opened(base):
    return base.open()


@pytest.fixture
def backbone(_opened):
    return copy.deepcopy(_opened)


@pytest.fixture
def pixels():
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def moved(adapter, seed=5):
    """An adapter with no zeros left."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in adapter.state().values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.2)
    return adapter


def both(towers, pixels):
    """Features of both towers, in one tensor."""
    tokens = towers.tokenize(["a", "cat on a mat", "b", "c"])
    return torch.cat([towers.encode_image(pixels), towers.encode_text(tokens)])


class TestStart:
    def test_evaluated_it_is_the_base_bit_for_bit(self, backbone, pixels):
        towers = backbone.trainable()
        with torch.no_grad():
            expected = both(towers, pixels)
            adapter = EVERYTHING.attach(towers).eval()
            assert torch.equal(both(towers, pixels), expected)
            adapter.fold()
            assert torch.equal(both(towers, pixels), expected)

    def test_in_training_it_adds_nothing(self, backbone, pixels):
        towers = backbone.trainable()
        towers.model.train()
        expected = both(towers, pixels)
        adapter = EVERYTHING.attach(towers)
        found = both(towers, pixels)
        assert found.requires_grad
        # Bit for bit but for the order in which attention's kernels take the rows.
        torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)
        for change in adapter.changes:
            torch.nn.init.normal_(change.a, std=100)  # whatever A is, B = 0 keeps it out
        assert torch.equal(both(towers, pixels), found)


class TestMerged:
    def test_merged_equals_unmerged_and_back(self, backbone, pixels):
        towers = backbone.trainable()
        weights = {name: w.clone() for name, w in towers.model.state_dict().items()}
        adapter = moved(EVERYTHING.attach(towers)).eval()
        found = both(towers, pixels).detach()
        with torch.no_grad():
            on_the_fly = both(towers, pixels)
        adapter.merge()
        merged = both(towers, pixels)
        torch.testing.assert_close(merged, found, atol=1e-5, rtol=0)
        torch.testing.assert_close(merged, on_the_fly, atol=1e-6, rtol=0)
        changed = {n for n, w in towers.model.state_dict().items() if not w.equal(weights[n])}
        assert changed == {name.rpartition(".lora_")[0] for name in adapter.state()}
        adapter.unmerge()
        assert all(w.equal(weights[n]) for n, w in towers.model.state_dict().items())
        assert torch.equal(both(towers, pixels), found)

    def test_a_merged_weight_is_the_formula(self, backbone):
        towers = backbone.trainable()
        config = LoraConfig(rank=4, alpha=6, sites=("q", "v"), positions=(2,), scaling="rslora")
        name = "visual.transformer.resblocks.1.attn.in_proj_weight"
        weight = towers.model.get_parameter(name).clone()
        adapter = moved(config.attach(towers))
        a, b = (adapter.state()[f"{name}.lora_{x}"].double() for x in "AB")
        assert a.shape == (8, 32)
        assert b.shape == (64, 4)
        expected = weight.double()
        expected[:32] += 6 / 2 * b[:32] @ a[:4]
        expected[64:] += 6 / 2 * b[32:] @ a[4:]
        adapter.fold()
        found = towers.model.get_parameter(name)
        torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=0)
        assert torch.equal(found[32:64], weight[32:64])


def test_gradients_reach_the_changes_and_nothing_else(backbone, pixels):
    towers = backbone.trainable()
    adapter = moved(LoraConfig(sites=("q", "out", "fc2"), positions=(2,)).attach(towers))
    both(towers, pixels).square().sum().backward()
    assert not any(p.grad is not None for p in towers.model.parameters())
    assert all(p.grad.abs().max() > 0 for p in adapter.parameters())
    assert adapter.trained_parameters().keys() == adapter.state().keys()
    block = "visual.transformer.resblocks.1"
    weights = ("attn.in_proj_weight", "attn.out_proj.weight", "mlp.c_proj.weight")
    assert list(adapter.state()) == [f"{block}.{w}.lora_{x}" for w in weights for x in "AB"]


class TestFolder:
    def test_reloaded_into_a_fresh_backbone_it_is_the_same(self, base, backbone, pixels, tmp_path):
        adapter = moved(EVERYTHING.attach(backbone.trainable()))
        write_adapter(tmp_path, base, backbone, EVERYTHING, adapter.state())
        adapter.fold()
        opened = AdaptedConfig(model=str(tmp_path)).open()
        found = opened.encode_image(pixels, FeatureRequest(tokens=True))
        expected = backbone.encode_image(pixels, FeatureRequest(tokens=True))
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert torch.equal(opened.encode_text(["a cat"]), backbone.encode_text(["a cat"]))
        fresh = base.open().encode_image(pixels, FeatureRequest())["projected"]
        assert not torch.allclose(found["projected"], fresh, atol=0.1)

    def test_it_holds_the_trained_tensors_only(self, base, backbone, tmp_path):
        config = LoraConfig(rank=2, sites=("q", "v"))
        adapter = config.attach(backbone.trainable())
        write_adapter(tmp_path, base, backbone, config, adapter.state())
        numbers = 2 * 2 * 2 * (32 + 32)  # blocks, matrices, rank, rows and columns
        assert sum(p.numel() for p in adapter.parameters()) == numbers
        assert (tmp_path / "adapter.safetensors").stat().st_size < 4 * numbers + 1000
        held = read_adapter(tmp_path)
        assert held.adapter == config
        assert held.tensors.keys() == adapter.state().keys()

    def test_tensors_of_other_options_are_refused(self, backbone):
        adapter = LoraConfig(rank=2).attach(backbone.trainable())
        state = {name: tensor.clone() for name, tensor in adapter.state().items()}
        adapter.fold()
        with pytest.raises(BackboneError, match=r"has shape \(6, 32\), .* needs \(9, 32\)"):
            LoraConfig(rank=3).attach(backbone.trainable()).load(state)


class TestPositions:
    def test_names_mean_what_they_mean_in_clip_lora(self):
        twelve = {name: chosen_blocks(name, 12) for name in ("top3", "bottom", "mid", "up")}
        assert twelve == {
            "top3": [9, 10, 11],
            "bottom": [0, 1, 2, 3],
            "mid": [4, 5, 6, 7],
            "up": [8, 9, 10, 11],
        }
        assert chosen_blocks("half-bottom", 12) + chosen_blocks("half-up", 12) == [*range(12)]

    @pytest.mark.parametrize("num_blocks", range(3, 30))
    def test_thirds_and_halves_cover_every_tower(self, num_blocks):
        parts = [chosen_blocks(name, num_blocks) for name in ("bottom", "mid", "up")]
        bottom, mid, up = parts
        assert bottom + mid + up == chosen_blocks("all", num_blocks) == [*range(num_blocks)]
        assert max(map(len, parts)) - min(map(len, parts)) <= 1

    def test_blocks_that_do_not_exist_are_refused(self):
        assert chosen_blocks((2, 1), 2) == [0, 1]
        with pytest.raises(BackboneError, match=r"positions 3 does not exist; .* blocks 1\.\.2"):
            chosen_blocks((1, 3), 2)
        with pytest.raises(BackboneError, match="mid means no block of 2"):
            chosen_blocks("mid", 2)

    def test_a_rank_that_no_matrix_has_is_refused(self, backbone):
        match = r"rank 33: visual.transformer.resblocks.0.* matrices of 32 x 32"
        with pytest.raises(BackboneError, match=match):
            LoraConfig(rank=33).attach(backbone.trainable())
        LoraConfig(rank=32, sites=("q", "fc1")).attach(backbone.trainable())

    def test_repeated_and_empty_choices_are_refused(self):
        for options in ({"sites": ["q", "q"]}, {"sites": []}, {"positions": [1, 1]}):
            with pytest.raises(ConfigError, match="expected each once, and at least one"):
                LoraConfig.from_values(options)

    @pytest.mark.parametrize(
        ("given", "expected"), [("top3", "top3"), ("2", (2,)), ("1,2", (1, 2)), ("all", "all")]
    )
    def test_on_the_command_line(self, given, expected):
        assert LoraConfig.from_command_line(["--positions", given]).positions == expected
