"""Random weights have CLIP's statistics; others are taken over exactly, from wherever they are."""

import math
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import load_file

from featcache.adapter_folder import write_adapter
from featcache.adapters.full import FullConfig
from featcache.adapters.lora import LoraConfig
from featcache.adapters.projection import ProjectionConfig
from featcache.adapters.vpt import VptConfig
from featcache.backbones.open_clip import OpenClipConfig
from featcache.errors import BackboneError, ConfigError
from finetune.contrastive.architectures import PRESETS, build, model_config
from finetune.contrastive.starting_weights import start_of
from finetune.pretrain import run

from .toy_pretraining import toy_config, write_toy


def test_rn50_6_starts_as_clip_does() -> None:
    """Standard deviations of every kind of weight, and the zeros that open residual branches."""
    torch.manual_seed(0)
    model = build(model_config("rn50-6"))
    state = model.state_dict()
    text, width, layers = "transformer.resblocks", 512, 6
    expected = {
        "token_embedding.weight": 0.02,
        "positional_embedding": 0.01,
        "text_projection": width**-0.5,
    }
    for layer in range(layers):
        expected |= {
            f"{text}.{layer}.attn.in_proj_weight": width**-0.5,
            f"{text}.{layer}.attn.out_proj.weight": width**-0.5 * (2 * layers) ** -0.5,
            f"{text}.{layer}.mlp.c_fc.weight": (2 * width) ** -0.5,
            f"{text}.{layer}.mlp.c_proj.weight": width**-0.5 * (2 * layers) ** -0.5,
        }
    for name in ("q_proj", "k_proj", "v_proj", "c_proj"):
        expected[f"visual.attnpool.{name}.weight"] = 2048**-0.5
    for name, deviation in expected.items():
        # Of n draws the mean deviates by 1/sqrt(n) of the deviation, that itself by 1/sqrt(2n).
        tolerance = 5 / state[name].numel() ** 0.5
        assert state[name].std().item() == pytest.approx(deviation, rel=tolerance), name
        assert abs(state[name].mean().item()) < tolerance * deviation, name
    assert not any(f"{text}.{layers}." in name for name in state)
    last = [name for name in state if ".layer" in name and name.endswith("bn3.weight")]
    assert len(last) == 3 + 4 + 6 + 3
    assert all(not state[name].any() for name in last)
    assert state["logit_scale"].item() == pytest.approx(math.log(1 / 0.07))
    assert state["text_projection"].shape == (512, 1024)
    assert model.visual.image_size == 224
    assert model.context_length == 77


def _same(folder: Path, state: dict[str, torch.Tensor]) -> None:
    found = load_file(folder / "open_clip_model.safetensors")
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=1e-5)


def test_goes_on_from_every_form_of_weights(tmp_path: Path) -> None:
    """At a learning rate of next to nothing the weights stay what they were."""
    toy = write_toy(tmp_path)
    first = run(toy_config(toy, out=str(tmp_path / "first"), steps=2, val_split="")).folder
    still = {"steps": 1, "val_split": "", "optim": {"lr": 1e-30, "weight_decay": 0.0}}
    state = load_file(first / "open_clip_model.safetensors")
    for number, (init, more) in enumerate(
        [
            (f"local-dir:{first}", {"architecture": None}),
            (str(first), {"architecture": None}),
            (str(first / "open_clip_model.safetensors"), {}),
        ]
    ):
        out = tmp_path / f"from-{number}"
        run(toy_config(toy, out=str(out), init=init, **more, **still))
        _same(out, state)

    base = OpenClipConfig(model=f"local-dir:{first}")
    for kind in (LoraConfig(towers="both"), FullConfig()):
        folder = tmp_path / kind.kind
        folder.mkdir()
        backbone = base.open()
        adapter = kind.attach(backbone.trainable())
        torch.manual_seed(1)
        changed = {name: torch.randn_like(t) * 0.1 for name, t in adapter.state().items()}
        write_adapter(folder, base, base.open(), kind, changed)
        adapter.load(changed)
        adapter.fold()
        out = tmp_path / f"from-{kind.kind}"
        run(toy_config(toy, out=str(out), init=str(folder), architecture=None, **still))
        _same(out, backbone.model.state_dict())
        assert not torch.equal(backbone.model.visual.proj, state["visual.proj"]) or (
            kind.kind == "lora"
        )

    for unmergeable in (VptConfig(num_tokens=2), ProjectionConfig()):
        folder = tmp_path / unmergeable.kind
        folder.mkdir()
        state = unmergeable.attach(base.open().trainable()).state()
        write_adapter(folder, base, base.open(), unmergeable, state)
        with pytest.raises(BackboneError, match=rf"{unmergeable.kind}.*cannot be merged"):
            start_of(str(folder), None, None, None)


@pytest.mark.parametrize("architecture", ["ViT-B-32", "toy.json"])
def test_weights_that_are_nowhere_are_told_by_the_option_that_named_them(architecture: str) -> None:
    message = r"^init: 'nowhere' is no folder, no file and no tag of .*; its tags: (openai|none)"
    with pytest.raises(ConfigError, match=message):
        start_of("nowhere", architecture, None, None)


def test_siglip_keeps_its_bias(tmp_path: Path) -> None:
    toy = write_toy(tmp_path)
    report = run(toy_config(toy, loss="siglip", steps=12, prompt="a {name} thing"))
    assert report.metrics["loss_of_chance"] == pytest.approx(math.log(8) - 7 * math.log(7 / 8))
    opened = open_clip.create_model(f"local-dir:{report.folder}")
    assert opened.logit_bias.item() == pytest.approx(report.metrics["logit_bias"], abs=1e-5)
    assert -10.5 < opened.logit_bias.item() < -9.5
    backbone = OpenClipConfig(model=f"local-dir:{report.folder}").open()
    assert backbone.spec.logit_bias == pytest.approx(report.metrics["logit_bias"], abs=1e-5)
    # On from there: with the bias as it is, or without one.
    more = {"init": str(report.folder), "architecture": None, "steps": 1, "optim": {"lr": 1e-9}}
    again = run(toy_config(toy, out=str(tmp_path / "again"), loss="siglip", **more))
    assert again.metrics["logit_bias"] == pytest.approx(report.metrics["logit_bias"], abs=1e-5)
    other = run(toy_config(toy, out=str(tmp_path / "other"), **more))
    assert "logit_bias" not in other.metrics
    assert OpenClipConfig(model=f"local-dir:{other.folder}").open().spec.logit_bias == 0.0
    assert other.metrics["logit_scale"] == pytest.approx(report.metrics["logit_scale"], rel=1e-5)


def test_siglip_after_a_softmax_begins_with_its_own_scale_and_bias(tmp_path: Path) -> None:
    """With a softmax's scale of 14 to 100 nearly every pair would pass for one at first."""
    toy = write_toy(tmp_path)
    first = run(toy_config(toy, out=str(tmp_path / "first"), steps=2, val_split=""))
    assert first.metrics["logit_scale"] == pytest.approx(1 / 0.07, rel=0.05)
    more = {"init": str(first.folder), "architecture": None, "steps": 1, "optim": {"lr": 1e-9}}
    found = run(toy_config(toy, out=str(tmp_path / "second"), loss="siglip", **more)).metrics
    assert found["logit_scale"] == pytest.approx(10, rel=1e-5)
    assert found["logit_bias"] == pytest.approx(-10, rel=1e-5)


@pytest.mark.parametrize(
    ("init", "architecture", "size", "message"),
    [
        ("laion2b_s34b_b79k", None, None, "no folder; .* name its architecture"),
        ("laion2b", "ViT-B-32", None, "'laion2b' is no folder, no file and no tag of ViT-B"),
        ("weights.pt", "demo-rn", None, "architecture demo-rn; give the folder"),
        (".", "ViT-B-32", None, "a folder that has its own; leave architecture out"),
        (".", None, 64, "image_size: 64 with weights from"),
        (".", None, None, r"no open_clip_config\.json in it"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    init: str,
    architecture: str | None,
    size: int | None,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ConfigError, BackboneError), match=message) as caught:
        start_of(init, architecture, size, None)
    assert "\n" not in str(caught.value)


def test_presets_are_known_by_name() -> None:
    assert set(PRESETS) == {"demo-rn", "demo-vit", "rn50-6"}
