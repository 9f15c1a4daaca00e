"""The whole job on toy pictures: learns, repeats, is reused, and opens in open_clip."""

import json
import runpy
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from featcache.errors import ConfigError, DatasetError
from finetune import pretrain
from finetune.contrastive.checkpoints import checkpoints
from finetune.losses.info_nce import InfoNceConfig
from finetune.pretrain import PretrainConfig, run
from heads.run_folder import RunError

from .toy_pretraining import toy_config, write_toy


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    return write_toy(tmp_path)


def _history(config: PretrainConfig) -> list[dict[str, Any]]:
    lines = (config.out / "history.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("tower", ["vit", "rn"])
def test_learns_and_opens_in_open_clip(
    toy: Path, tower: str, monkeypatch: Any, painted: None
) -> None:
    trained: list[torch.nn.Module] = []
    train = pretrain.train
    monkeypatch.setattr(
        pretrain, "train", lambda *a, **k: (train(*a, **k), trained.append(a[0].model))
    )
    tower_file = str(toy / f"{tower}.json")
    config = toy_config(toy, architecture=tower_file, steps=60, prompt="a {name} thing")
    report = run(config)
    history = _history(config)
    assert [entry["step"] for entry in history] == [10, 20, 30, 40, 50, 60]
    assert history[-1]["loss"] < 0.8 * history[0]["loss"]
    assert report.metrics["validation"]["zero_shot_top1"] > 0.8
    assert report.metrics["validation"]["chance"] == pytest.approx(1 / 3)
    assert report.metrics == json.loads((config.out / "metrics.json").read_text())
    assert (config.out / "curves.png").stat().st_size > 1000

    name = f"local-dir:{config.out}"
    model, preprocess = open_clip.create_model_from_pretrained(name)
    tokens = open_clip.get_tokenizer(name)(["a red thing", "a green thing", "a blue thing"])
    pixels = torch.stack([preprocess(Image.open(toy / f"{row}.png")) for row in (36, 37, 38)])
    model.eval()
    with torch.inference_mode():
        images, texts = model.encode_image(pixels), model.encode_text(tokens)
        torch.testing.assert_close(images, trained[0].encode_image(pixels), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(texts, model.encode_text(tokens), atol=1e-5, rtol=1e-4)
    similarity = torch.nn.functional.cosine_similarity(images[:, None], texts[None], dim=-1)
    assert similarity.argmax(dim=1).tolist() == [0, 1, 2]


def test_same_seed_same_weights_other_seed_others(toy: Path) -> None:
    weights = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        run(toy_config(toy, out=str(toy / name), seed=seed, steps=6, val_split=""))
        weights.append(load_file(toy / name / "open_clip_model.safetensors"))
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), name
    assert not torch.equal(weights[0]["visual.proj"], weights[2]["visual.proj"])


def test_a_finished_folder_is_reused_refused_or_replaced(
    toy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = toy_config(toy, steps=3)
    first = run(config)
    written = (config.out / "open_clip_model.safetensors").stat().st_mtime_ns
    again = run(config.model_copy(update={"log_every": 1}))
    assert again.reused
    assert again.metrics == first.metrics
    assert "already pretrained" in capsys.readouterr().out
    assert (config.out / "open_clip_model.safetensors").stat().st_mtime_ns == written

    with pytest.raises(ConfigError, match=r"config\.steps = 3, this run has 4") as error:
        run(toy_config(toy, steps=4))
    assert "\n" not in str(error.value)
    assert not run(toy_config(toy, steps=4, restart=True)).reused
    assert json.loads((config.out / "metrics.json").read_text())["steps"] == 4
    assert sorted(path.name for path in toy.iterdir() if path.is_dir()) == ["out"]


def test_changed_data_is_not_the_same_run(toy: Path) -> None:
    config = toy_config(toy, steps=3, val_split="")
    run(config)
    text = (toy / "toy.csv").read_text()
    (toy / "toy.csv").write_text(text.replace("a red thing", "a crimson thing"))
    with pytest.raises(ConfigError, match=r"dataset\.captions"):
        run(config)


def test_a_foreign_folder_is_left_alone(toy: Path) -> None:
    (toy / "out").mkdir()
    (toy / "out" / "thesis.txt").write_text("precious")
    for restart in (False, True):
        with pytest.raises(ConfigError, match="was not written by this job"):
            run(toy_config(toy, restart=restart))
    assert (toy / "out" / "thesis.txt").read_text() == "precious"


def test_a_loss_that_is_not_finite_ends_the_run(toy: Path, monkeypatch: Any) -> None:
    calls = iter(range(100))
    ordinary = InfoNceConfig.loss

    def breaks(self: InfoNceConfig, *inputs: Any) -> torch.Tensor:
        return ordinary(self, *inputs) * (float("nan") if next(calls) == 4 else 1.0)

    with monkeypatch.context() as patched:
        patched.setattr(InfoNceConfig, "loss", breaks)
        with pytest.raises(RunError, match="step 5 of 40: the loss is nan"):
            run(toy_config(toy))
        assert not [path for path in toy.iterdir() if path.is_dir()]  # nothing half-written stays

        calls = iter(range(100))
        with pytest.raises(RunError, match="step 5 of 40: the loss is nan"):
            run(toy_config(toy, save_every=2))
    assert [path.name for path in checkpoints(toy / "out.partial")] == [
        "checkpoint_1_2",
        "checkpoint_1_4",
    ]


def test_logit_scale_never_passes_100(toy: Path) -> None:
    report = run(toy_config(toy, optim={"lr": 0.5, "warmup": 0.0}, steps=30))
    assert report.metrics["logit_scale"] <= 100.001


def test_bf16_and_validation_on_the_way(toy: Path) -> None:
    config = toy_config(toy, precision="bf16", validate_every=2, steps=10)
    report = run(config)
    history = _history(config)
    assert [entry["step"] for entry in history if "validation" in entry] == [8, 10]
    assert report.metrics["loss"] < 3
    state = load_file(config.out / "open_clip_model.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}


def test_images_beyond_the_memory_budget_give_the_same_result(toy: Path) -> None:
    results = []
    for name, budget in (("kept", 1.0), ("decoded", 0.0)):
        changes = {"loading": {"ram_budget_gib": budget}, "normalization": "dataset"}
        run(toy_config(toy, out=str(toy / name), steps=6, val_split="", **changes))
        results.append(load_file(toy / name / "open_clip_model.safetensors")["visual.proj"])
        config = json.loads((toy / name / "open_clip_config.json").read_text())
        assert config["preprocess_cfg"]["mean"][0] == pytest.approx(0.37, abs=0.05)
    assert torch.equal(*results)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"batch_size": 37}, ConfigError, "batch_size: 37 .* only 36 images"),
        ({"architecture": "RN5"}, ConfigError, "architecture: 'RN5' is neither a preset"),
        ({"architecture": "nowhere.json"}, ConfigError, "no such file"),
        ({"architecture": "ViT-B-16-SigLIP"}, ConfigError, "model hub"),
        ({"architecture": "coca_ViT-B-32"}, ConfigError, "captioning decoder"),
        ({"device": "cuda:99"}, ConfigError, "device: 'cuda:99'"),
        ({"prompt": "a {color}"}, ConfigError, "template 'a {color}': no class has 'color'"),
        ({"train_split": "training"}, DatasetError, "no split 'training'"),
        ({"val_split": "dev"}, DatasetError, "no split 'dev'"),
    ],
)
def test_mistakes_are_one_line(
    toy: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        run(toy_config(toy, **changes))
    assert "\n" not in str(caught.value)
    assert not (toy / "out").exists()


def test_a_dataset_without_captions_ends_the_command_with_one_line(
    toy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [line.rsplit(",", 1)[0] for line in (toy / "toy.csv").read_text().splitlines()]
    (toy / "bare.csv").write_text("\n".join(rows) + "\n")
    arguments = ["--dataset.kind", "table", "--dataset.file", str(toy / "bare.csv")]
    arguments += ["--architecture", str(toy / "vit.json"), "--out", str(toy / "out")]
    monkeypatch.setattr("sys.argv", ["pretrain", *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(pretrain.__file__, run_name="__main__")  # an interpreter less than -m
    assert ended.value.code == 1
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "has no captions in its split 'train'" in told
