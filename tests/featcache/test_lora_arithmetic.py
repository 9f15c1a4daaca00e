"""LoRA's numbers against loops written from its equation, and against peft where peft is right."""

import copy
import functools
import json
import math
import types

import pytest
import torch
from torch import nn

from featcache.adapters.lora import LoraConfig
from featcache.backbones.blocks import clip_blocks
from featcache.backbones.open_clip import OpenClipConfig
from featcache.backbones.trainable import TrainableTowers
from featcache.low_rank import LowRank, LowRankAttention, LowRankLinear, LowRankPool


def numbers(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def filled(change, seed=3):
    with torch.no_grad():
        change.a.copy_(numbers(*change.a.shape, seed=seed))
        change.b.copy_(numbers(*change.b.shape, seed=seed + 1))
    return change


def slow_linear(x, weight, bias, changes, scale):
    """h = W0 x + b0 + s B (A x) number by number; `changes` are (first row, A, B)."""
    out = []
    for vector in x.double().tolist():
        h = []
        for row in range(len(weight)):
            total = float(bias[row]) + sum(
                float(w) * v for w, v in zip(weight[row], vector, strict=True)
            )
            for start, a, b in changes:
                if start <= row < start + len(b):
                    inner = [
                        sum(float(w) * v for w, v in zip(line, vector, strict=True)) for line in a
                    ]
                    total += scale * sum(
                        float(w) * v for w, v in zip(b[row - start], inner, strict=True)
                    )
            h.append(total)
        out.append(h)
    return torch.tensor(out)


@pytest.mark.parametrize("rows", [[(0, 9)], [(0, 3), (6, 9)], [(3, 6)], [(0, 3), (3, 6), (6, 9)]])
def test_a_layer_is_the_equation(rows):
    layer = nn.Linear(5, 9).requires_grad_(False)
    change = filled(LowRank(layer.weight, rows, rank=2, scale=1.5))
    assert change.a.shape == (2 * len(rows), 5)
    x = numbers(4, 5)
    done, parts = 0, []
    for index, (start, stop) in enumerate(rows):
        b = change.b[done : done + stop - start].tolist()
        parts.append((start, change.a[2 * index : 2 * index + 2].tolist(), b))
        done += stop - start
    expected = slow_linear(x, layer.weight.tolist(), layer.bias.tolist(), parts, 1.5)
    changed = LowRankLinear(layer, change)
    torch.testing.assert_close(changed(x), expected.float(), atol=2e-6, rtol=1e-6)
    with torch.no_grad():
        change.eval()
        torch.testing.assert_close(changed(x), expected.float(), atol=2e-6, rtol=1e-6)
        torch.testing.assert_close(
            changed(x.view(2, 2, 5)), expected.float().view(2, 2, 9), atol=2e-6, rtol=1e-6
        )


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("masked", ["no", "float", "bool", "per head"])
def test_attention_is_torch_s_own_on_changed_weights(batch_first, masked):
    attention = nn.MultiheadAttention(8, 2, batch_first=batch_first).requires_grad_(False)
    nn.init.normal_(attention.in_proj_bias)
    nn.init.normal_(attention.out_proj.bias)
    stacked = filled(LowRank(attention.in_proj_weight, [(0, 8), (16, 24)], 2, 0.1))
    out = filled(LowRank(attention.out_proj.weight, [(0, 8)], 2, 0.1), seed=7)
    changed = LowRankAttention(attention, {"in_proj_weight": stacked, "out_proj.weight": out})
    x = numbers(3, 5, 8).requires_grad_()
    mask = {
        "no": None,
        "float": torch.full((5, 5), -math.inf).triu(1),
        "bool": torch.ones(5, 5, dtype=torch.bool).triu(1),
        "per head": torch.full((6, 5, 5), -math.inf).triu(1) + numbers(6, 1, 1),
    }[masked]
    sequence = x if batch_first else x.transpose(0, 1)
    found, weights = changed(sequence, sequence, sequence, need_weights=False, attn_mask=mask)
    assert weights is None
    reference = copy.deepcopy(attention).train()
    with torch.no_grad():
        for start, j in ((0, 0), (16, 1)):
            rows = slice(start, start + 8)
            delta = stacked.b[8 * j : 8 * j + 8] @ stacked.a[2 * j : 2 * j + 2]
            reference.in_proj_weight[rows] += 0.1 * delta
        reference.out_proj.weight += 0.1 * out.b @ out.a
    expected = reference(sequence, sequence, sequence, need_weights=False, attn_mask=mask)[0]
    torch.testing.assert_close(found, expected, atol=3e-6, rtol=1e-5)
    given = numbers(*found.shape, seed=9)
    gradient, wanted = (torch.autograd.grad(y, x, given)[0] for y in (found, expected))
    torch.testing.assert_close(gradient, wanted, atol=1e-5, rtol=1e-5)


def test_a_starts_kaiming_uniform_and_b_at_zero():
    torch.manual_seed(0)
    change = LowRank(torch.empty(64, 400), [(0, 64)], 100, 1.0)
    bound = 1 / math.sqrt(400)  # √6 / √((1 + 5) · columns)
    assert change.a.abs().max() <= bound
    assert change.a.abs().max() > 0.999 * bound
    torch.testing.assert_close(change.a.std().item(), bound / math.sqrt(3), atol=0, rtol=0.01)
    assert not change.b.any()


@pytest.mark.parametrize(("scaling", "scale"), [("standard", 16 / 4), ("rslora", 16 / 2)])
def test_scaling(scaling, scale):
    assert LoraConfig(rank=4, scaling=scaling).scale == scale


def test_dropout_is_a_share_of_inputs_in_training_only():
    layer = nn.Linear(400, 3, bias=False).requires_grad_(False)
    nn.init.zeros_(layer.weight)
    change = LowRank(layer.weight, [(0, 3)], 1, 1.0, dropout=0.25)
    nn.init.ones_(change.a)
    nn.init.ones_(change.b)
    changed = LowRankLinear(layer, change)
    torch.manual_seed(0)
    kept = changed(torch.ones(50, 400)) * 0.75  # what is kept is scaled up
    assert (kept % 1 < 1e-3).all() or (kept % 1 > 0.999).any()
    assert 0.74 < kept.mean() / 400 < 0.76
    with torch.no_grad():  # gradient caching encodes like this first: the same draw must come
        torch.manual_seed(0)
        assert torch.equal(changed(torch.ones(50, 400)) * 0.75, kept)
    change.eval()
    assert torch.equal(changed(torch.ones(2, 400)), torch.full((2, 3), 400.0))


def test_attention_s_own_dropout_is_for_training_only():
    attention = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True).requires_grad_(False)
    change = LowRank(attention.in_proj_weight, [(0, 24)], 2, 0.1)
    changed, x = LowRankAttention(attention, {"in_proj_weight": change}), numbers(3, 5, 8)
    rows = [changed(x, x, x)[0] for _ in range(2)]
    assert not torch.allclose(*rows, atol=1e-4)
    changed.eval()
    expected = attention.eval()(x, x, x, need_weights=False)[0]
    torch.testing.assert_close(changed(x, x, x)[0], expected, atol=3e-6, rtol=1e-5)


def test_pooling_of_residual_networks_is_open_clip_s_on_changed_weights():
    from open_clip.modified_resnet import AttentionPool2d

    torch.manual_seed(0)
    pool = AttentionPool2d(3, 8, 2, output_dim=6).requires_grad_(False)
    names = ("q_proj", "k_proj", "v_proj", "c_proj")
    changes = {
        f"{name}.weight": filled(LowRank(w, [(0, len(w))], 2, 0.1), seed)
        for seed, name in enumerate(names)
        for w in [pool.get_submodule(name).weight]
    }
    merged = copy.deepcopy(pool)
    for name, change in changes.items():
        with torch.no_grad():
            merged.get_parameter(name).add_(0.1 * change.b @ change.a)
    changed, cells = LowRankPool(pool, changes), numbers(4, 8, 3, 3).requires_grad_()
    found, expected = changed(cells), merged(cells)
    torch.testing.assert_close(found, expected, atol=3e-6, rtol=1e-5)
    given = numbers(*found.shape, seed=9)
    gradient, wanted = (torch.autograd.grad(y, cells, given)[0] for y in (found, expected))
    torch.testing.assert_close(gradient, wanted, atol=1e-5, rtol=1e-5)
    for change in changes.values():
        change.eval()
    with torch.no_grad():
        torch.testing.assert_close(changed.eval()(cells), expected, atol=3e-6, rtol=1e-5)


def test_number_of_parameters_on_the_vision_tower_of_b32():
    import open_clip

    config = open_clip.get_model_config("ViT-B-32")
    with torch.device("meta"):  # the real architecture, without its 600 MB
        model = open_clip.CLIP(**config)
    blocks = {"image": clip_blocks(model, "visual.transformer.resblocks"), "text": []}
    towers = types.SimpleNamespace(model=model, name="ViT-B-32", blocks=blocks)
    towers.require_blocks = functools.partial(TrainableTowers.require_blocks, towers)
    adapter = LoraConfig(rank=8).attach(towers)
    assert sum(p.numel() for p in adapter.parameters()) == 12 * 4 * 8 * (768 + 768) == 589_824


@pytest.fixture(scope="module")
def _opened(tmp_path_factory):
    file = tmp_path_factory.mktemp("lora") / "lora-numbers.json"
    vision = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16}
    text = {"context_length": 16, "vocab_size": 600, "width": 32, "heads": 2, "layers": 1}
    file.write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}))
    return OpenClipConfig(model=str(file), pretrained="random:3").open()


@pytest.fixture
def towers(_opened):
    return copy.deepcopy(_opened).trainable()


def trained(towers, **options):
    """An adapter with no zeros left."""
    adapter = LoraConfig(rank=3, alpha=6, **options).attach(towers)
    for change in adapter.changes:
        filled(change)
        change.a.data *= 0.1
    return adapter


def gradients(towers, adapter, pixels):
    """Image features, and the gradients of their squares' sum by name."""
    adapter.zero_grad()
    features = towers.encode_image(pixels)
    features.square().sum().backward()
    return features.detach(), {n: p.grad.clone() for n, p in adapter.trained_parameters().items()}


def test_equals_peft_where_peft_is_right(towers):
    """On MLPs, and on the stacked weight, where peft has one A for query, key and value."""
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(
        copy.deepcopy(towers.model.visual),
        peft.LoraConfig(
            r=3,
            lora_alpha=6,
            target_modules=["c_fc", "c_proj"],
            target_parameters=["attn.in_proj_weight"],
        ),
    )
    adapter = trained(towers, sites=("q", "k", "v", "fc1", "fc2"))
    own = dict(theirs.named_parameters())
    pairs = []
    for name, tensor in adapter.state().items():
        weight, _, letter = name.removeprefix("visual.").rpartition(".lora_")
        layer = weight.removesuffix(".in_proj_weight").removesuffix(".weight")
        parameter = own[f"base_model.model.{layer}.lora_{letter}.default.weight"]
        if letter == "A" and weight.endswith("in_proj_weight"):
            tensor.data.copy_(tensor.data[:3].repeat(3, 1))
            parameter.data.copy_(tensor.data[:3])
        else:
            parameter.data.copy_(tensor.data)
        pairs.append((name, parameter))
    pixels = numbers(4, 3, 32, 32)
    features, found = gradients(towers, adapter, pixels)
    expected = theirs(pixels)
    torch.testing.assert_close(features, expected.detach(), atol=1e-5, rtol=1e-5)
    expected.square().sum().backward()
    for name, parameter in pairs:
        gradient = found[name]
        if name.endswith("in_proj_weight.lora_A"):
            gradient = gradient.view(3, 3, -1).sum(0)
        torch.testing.assert_close(gradient, parameter.grad, atol=1e-3, rtol=1e-4)
    theirs.merge_adapter()
    adapter.merge()
    for name in {name.rpartition(".lora_")[0] for name in adapter.state()}:
        layer, _, leaf = name.removeprefix("visual.").rpartition(".")
        merged = theirs.base_model.model.get_submodule(layer).get_base_layer()
        torch.testing.assert_close(
            towers.model.get_parameter(name), merged.get_parameter(leaf), atol=1e-6, rtol=1e-5
        )


class TestHowTrainersRunIt:
    def test_autocast(self, towers):
        adapter = trained(towers)
        pixels = numbers(4, 3, 32, 32)
        expected, wanted = gradients(towers, adapter, pixels)
        with torch.autocast("cpu", torch.bfloat16):
            features, found = gradients(towers, adapter, pixels)
        torch.testing.assert_close(features.float(), expected, atol=0.1, rtol=0.1)
        for name, gradient in found.items():
            assert gradient.dtype == torch.float32
            cosine = torch.cosine_similarity(gradient.flatten(), wanted[name].flatten(), 0)
            assert cosine > 0.97, name

    def test_gradient_checkpointing(self, towers):
        adapter = trained(towers, dropout=0.3)
        towers.model.train()
        pixels = numbers(4, 3, 32, 32)
        results = []
        for on in (False, True):
            towers.model.set_grad_checkpointing(on)
            torch.manual_seed(5)
            results.append(gradients(towers, adapter, pixels))
        assert torch.equal(results[0][0], results[1][0])
        for name, gradient in results[0][1].items():
            torch.testing.assert_close(gradient, results[1][1][name], atol=1e-6, rtol=1e-5)

    def test_compiles_without_a_break(self, towers):
        adapter = trained(towers)
        towers.model.train()
        pixels = numbers(4, 3, 32, 32)
        expected, wanted = gradients(towers, adapter, pixels)
        compiled = torch.compile(towers.model.visual, backend="aot_eager", fullgraph=True)
        adapter.zero_grad()
        features = compiled(pixels)
        torch.testing.assert_close(features.detach(), expected, atol=1e-5, rtol=1e-5)
        features.square().sum().backward()
        for name, parameter in adapter.trained_parameters().items():
            torch.testing.assert_close(parameter.grad, wanted[name], atol=1e-4, rtol=1e-4)
        torch.compiler.reset()
