"""Fine-tuning on toy pictures: learns, repeats, restores the best, and what it leaves is usable."""

import csv
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from featcache import extract
from featcache.errors import CacheMismatchError, ConfigError
from featcache.extract_config import ExtractConfig
from finetune import train as finetune_train
from finetune.train import run
from finetune.tuning import fitted_head
from finetune.tuning import loop as tuning_loop
from finetune.tuning.initial_head import class_order
from finetune.tuning.objective import Objective
from heads import evaluate, predict
from heads.run_folder import RunError, load_run
from heads.train import TrainConfig as HeadTrainConfig
from heads.train import run as train_head

from ..together import run_together
from . import colours
from .colours import config, history_of


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return colours.make(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def trained(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the image tower and a head."""
    out = tmp_path_factory.mktemp("trained") / "out"
    run(config(toy, out, report=True))
    return out


def metrics_of(out: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((out / "metrics.json").read_text())
    return values


def test_learns_and_reports_both_accuracies_of_all_parts(trained: Path) -> None:
    values = metrics_of(trained)
    assert values["test_acc_cls"] > 0.9
    for part in ("train", "val", "test"):
        assert 0 <= values[f"{part}_acc_txt"] <= 1
    assert sorted(path.name for path in trained.iterdir()) == [
        "adapter.json",
        "adapter.safetensors",
        "config.yaml",
        "curves.png",
        "head",
        "history.jsonl",
        "metrics.json",
        "report.html",
        "train.json",
    ]


def test_head_folder_predicts_and_evaluates_as_training_reported(
    toy: Path, trained: Path, tmp_path: Path
) -> None:
    """From images, and from a cache that the adapted backbone extracted."""
    values = metrics_of(trained)
    found = predict.run(
        predict.PredictConfig(run=trained / "head", images=toy, out=tmp_path / "p.csv", quiet=True)
    ).table.set_index("id")["class_1"]
    with (toy / "toy.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "test"]
    right = [found[row["path"]] == row["label"] for row in rows]
    assert np.mean(right) == values["test_acc_cls"]
    extract.run(
        ExtractConfig.model_validate(
            {
                "dataset": {"kind": "table", "file": str(toy / "toy.csv")},
                "backbone": {"kind": "adapted", "model": str(trained)},
                "cache": str(tmp_path / "cache"),
                "precision": "fp32",
                "device": "cpu",
            }
        )
    )
    for split in ("val", "test"):
        scores = evaluate.run(
            evaluate.EvaluateConfig(run=trained / "head", cache=tmp_path / "cache", split=split)
        )
        assert scores.metrics["top1"] == values[f"{split}_acc_cls"]


def test_a_result_that_has_moved_predicts_all_the_same(
    toy: Path, trained: Path, tmp_path: Path
) -> None:
    """Its head finds the backbone around it, and refuses another one there."""
    moved = tmp_path / "moved"
    shutil.copytree(trained, moved)
    record = moved / "head" / "head.json"
    text = record.read_text()
    assert str(trained.resolve()) in text
    record.write_text(text.replace(str(trained.resolve()), str(tmp_path / "gone")))
    options = {"images": toy, "quiet": True}
    before, after = (
        predict.run(
            predict.PredictConfig(run=folder / "head", out=tmp_path / f"{n}.csv", **options)
        ).table
        for n, folder in enumerate((trained, moved))
    )
    assert after.equals(before)
    tensors = load_file(moved / "adapter.safetensors")
    save_file({name: 2 * t for name, t in tensors.items()}, moved / "adapter.safetensors")
    with pytest.raises(CacheMismatchError, match=r"backbone\.weights differs"):
        predict.run(predict.PredictConfig(run=moved / "head", out=tmp_path / "2.csv", **options))


def test_two_processes_train_as_one(toy: Path, tmp_path: Path) -> None:
    options = {"optim": {"epochs": 2, "batch_size": 20, "accumulate": 2}, "adapter": "lora"}
    run(config(toy, tmp_path / "one", **options))
    file = tmp_path / "two.yaml"
    file.write_text(config(toy, tmp_path / "two", **options).to_yaml())
    first, second = run_together(2, "-m", "finetune.train", "--config", str(file))
    assert (first[2], second[2]) == (0, 0), first[1] + second[1]
    assert "written to" in first[0]
    assert second[0] == "", "only the first process speaks"
    for one, two in zip(history_of(tmp_path / "one"), history_of(tmp_path / "two"), strict=True):
        for name in ("loss", "class_loss", "text_loss", "val_loss", "val_top1"):
            assert two[name] == pytest.approx(one[name], rel=1e-6), name
    one, two = (load_file(tmp_path / run / "adapter.safetensors") for run in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-6, rtol=1e-4)


def test_interrupted_it_goes_on_bit_for_bit(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dropout and crops included; nothing of the first attempt but its state is used."""
    options = {"adapter": {"kind": "lora", "dropout": 0.3}}
    run(config(toy, tmp_path / "whole", **options))
    save = tuning_loop.Fit.save

    def save_then_die(self: tuning_loop.Fit, path: Path) -> None:
        save(self, path)
        if len(self.history) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(tuning_loop.Fit, "save", save_then_die)
    with pytest.raises(KeyboardInterrupt):
        run(config(toy, tmp_path / "cut", **options))
    monkeypatch.undo()
    assert not (tmp_path / "cut").exists()
    with pytest.raises(ConfigError, match="optim"):
        run(config(toy, tmp_path / "cut", **options, optim={"lr": 0.5}))
    run(config(toy, tmp_path / "cut", **options))
    for name in ("adapter.safetensors", "head/head.safetensors"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    timed = {"seconds", "images_per_second", "waiting"}
    whole, cut = history_of(tmp_path / "whole"), history_of(tmp_path / "cut")
    for one, two in zip(whole, cut, strict=True):
        assert {k: v for k, v in one.items() if k not in timed} == {
            k: v for k, v in two.items() if k not in timed
        }
    assert run(config(toy, tmp_path / "cut", **options)).reused


def test_head_begins_at_the_one_trained_on_the_cache_and_both_are_compared(
    toy: Path, tmp_path: Path
) -> None:
    """Classes are brought into order by name; without steps the frozen head's figures come out."""
    cache = tmp_path / "cache"
    common = {"precision": "fp32", "device": "cpu", "features": {"storage_dtype": "float32"}}
    base = {"model": str(toy / "finetune-toy.json"), "pretrained": "random:3"}
    dataset = {"kind": "table", "file": str(toy / "toy.csv")}
    extract.run(
        ExtractConfig.model_validate(
            {"dataset": dataset, "backbone": base, "cache": str(cache), **common}
        )
    )
    grid = {"lrs": (0.1,), "weight_decays": (0.0,)}
    frozen = train_head(
        HeadTrainConfig.model_validate(
            {
                "cache": cache,
                "head": {"kind": "linear", **grid},
                "optim": {"epochs": 5},
                "run": tmp_path / "head",
                "quiet": True,
                "device": "cpu",
                "report": False,
            }
        )
    )
    changes = {
        "dataset": None,
        "backbone": None,
        "adapter": "linear",
        "init_head": str(tmp_path / "head"),
        "optim": {"epochs": 1},
        "head": {"lr": 1e-12},
    }
    report = run(config(toy, tmp_path / "same", cache=str(cache), report=True, **changes))
    for part in ("val", "test"):
        assert report.metrics[f"{part}_acc_cls"] == frozen.metrics[part]["top1"]
    assert report.metrics["frozen"]["accuracy"]["test"] >= 0
    assert report.metrics["frozen"]["extraction_images"] == 72
    page = (tmp_path / "same" / "report.html").read_text()
    for text in ("Frozen and adapted", "What it cost", "encoding a new image", "Confusion"):
        assert text in page
    record = json.loads((tmp_path / "head" / "head.json").read_text())
    names = record["classes"]["name"]
    assert names == sorted(names)
    turned = np.asarray(["red", "green", "blue"])
    order = class_order(load_run(tmp_path / "head"), turned.tolist())
    assert np.asarray(names)[order.numpy()].tolist() == turned.tolist()
    with pytest.raises(ConfigError, match="'pink' is not in the head"):
        class_order(load_run(tmp_path / "head"), ["red", "green", "pink"])
    twins = cast(Any, SimpleNamespace(class_names=["crane", "dog", "crane"], path="head"))
    assert class_order(twins, ["crane", "dog", "crane"]).tolist() == [0, 1, 2]
    with pytest.raises(ConfigError, match="share a name and are in another order"):
        class_order(twins, ["crane", "crane", "dog"])


def test_head_is_fitted_first_and_kept_unless_an_epoch_is_better(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The very head that heads.train fits to a cache; an interrupted training finds it again."""
    extract.run(
        ExtractConfig.model_validate(
            {
                "dataset": {"kind": "table", "file": str(toy / "toy.csv")},
                "backbone": {"model": str(toy / "finetune-toy.json"), "pretrained": "random:3"},
                "cache": str(tmp_path / "cache"),
                "precision": "fp32",
                "device": "cpu",
                "features": {"storage_dtype": "float32"},
            }
        )
    )
    values = {"cache": tmp_path / "cache", "head": "linear", "run": tmp_path / "head"}
    common = {"quiet": True, "device": "cpu", "report": False}
    frozen = train_head(HeadTrainConfig.model_validate({**values, **common, "seed": 42}))
    options = {"head": {}, "optim": {"lr": 1e-3, "epochs": 2, "batch_size": 16}}
    save = tuning_loop.Fit.save

    def save_then_die(self: tuning_loop.Fit, path: Path) -> None:
        save(self, path)
        raise KeyboardInterrupt

    monkeypatch.setattr(tuning_loop.Fit, "save", save_then_die)
    with pytest.raises(KeyboardInterrupt):
        run(config(toy, tmp_path / "out", **options))
    monkeypatch.undo()
    monkeypatch.delattr(fitted_head, "_fit")
    report = run(config(toy, tmp_path / "out", **options))
    assert frozen.metrics["val"]["top1"] == 1, "no epoch can be better"
    assert report.metrics["best_epoch"] == 0
    assert report.metrics["epochs"] == 2
    for part in ("val", "test"):
        assert report.metrics[f"{part}_acc_cls"] == frozen.metrics[part]["top1"]
    own, theirs = (load_run(folder).head for folder in (tmp_path / "out/head", tmp_path / "head"))
    torch.testing.assert_close(own.trained_state(), theirs.trained_state(), atol=1e-3, rtol=1e-3)


def test_last_blocks_train_on_cached_tokens_without_pixels(toy: Path, tmp_path: Path) -> None:
    cache, folder = tmp_path / "cache", tmp_path / "copy"
    shutil.copytree(toy, folder)
    base = {"model": str(toy / "finetune-toy.json"), "pretrained": "random:3"}
    dataset = {"kind": "table", "file": str(folder / "toy.csv")}
    features = {"tokens": "before_last:1", "storage_dtype": "float32"}
    extract.run(
        ExtractConfig.model_validate(
            {
                "dataset": dataset,
                "backbone": base,
                "cache": str(cache),
                "precision": "fp32",
                "device": "cpu",
                "features": features,
            }
        )
    )
    shutil.rmtree(folder)
    changes = {"dataset": None, "backbone": None, "adapter": "last_blocks", "cache": str(cache)}
    changes["compare"] = False
    report = run(config(toy, tmp_path / "out", **changes))
    assert report.metrics["test_acc_cls"] > 0.9
    scores = predict.run(
        predict.PredictConfig(
            run=tmp_path / "out" / "head", images=toy, out=tmp_path / "p.csv", quiet=True
        )
    ).table.set_index("id")["class_1"]
    right = [scores[f"{row}.png"] == list(colours.COLORS)[row % 3] for row in range(60, 72)]
    assert np.mean(right) == report.metrics["test_acc_cls"]


def test_several_labels_and_class_names_alone(toy: Path, tmp_path: Path) -> None:
    table = (toy / "toy.csv").read_text().replace("label", "labels").replace("red,", "red|warm,")
    (toy / "several.csv").write_text(table)
    several = {"kind": "table", "file": str(toy / "several.csv"), "label_separator": "|"}
    report = run(config(toy, tmp_path / "several", dataset=several))
    assert report.metrics["metric"] == "map"
    assert report.metrics["test_acc_cls"] > 0.9
    assert 0 < report.metrics["test_acc_txt"] <= 1
    alone = run(
        config(
            toy,
            tmp_path / "alone",
            objective="image_text",
            val_split="none",
            dataset={"kind": "table", "file": str(toy / "toy.csv"), "shots": 16},
            optim={"lr": 1e-3, "steps_per_shot": 1, "batch_size": 16, "final_lr": 1e-6},
        )
    )
    assert "test_acc_cls" not in alone.metrics
    assert "val_acc_txt" not in alone.metrics
    assert alone.metrics["steps"] == 16
    assert alone.metrics["best_epoch"] == alone.metrics["epochs"] == 6
    head = load_run(tmp_path / "alone" / "head")
    assert head.config.kind == "linear"
    own = json.loads((tmp_path / "alone" / "head" / "metrics.json").read_text())
    assert own["test"]["top1"] == alone.metrics["test_acc_txt"]


def test_class_names_alone_leave_a_head_with_their_offset(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several labels; without it the head's probabilities would not be those of training."""
    table = (toy / "toy.csv").read_text().replace("label", "labels").replace("red,", "red|warm,")
    (toy / "alone.csv").write_text(table)
    dataset = {"kind": "table", "file": str(toy / "alone.csv"), "label_separator": "|"}
    trained: list[Objective] = []
    written = finetune_train.write_head

    def noting(folder: Path, *options: Any) -> Any:
        trained.extend(option for option in options if isinstance(option, Objective))
        return written(folder, *options)

    monkeypatch.setattr(finetune_train, "write_head", noting)
    run(config(toy, tmp_path / "out", dataset=dataset, objective="image_text"))
    (objective,) = trained
    assert objective.offset is not None
    assert objective.text is not None
    features = torch.randn(3, 16)
    expected = objective.text_logits(features, objective.text())
    head = load_run(tmp_path / "out" / "head").head
    with torch.no_grad():
        torch.testing.assert_close(head(features), expected.detach(), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "image_text", "adapter": "linear"}, "nothing to train"),
        ({"objective": "image_text", "init_head": "x"}, "init_head is given"),
        ({"dataset": None}, "dataset is unset, and there is no cache"),
        ({"adapter": "projection"}, "finetune.project"),
        ({"inputs": "tokens"}, "needs a cache"),
        ({"optim": {"steps": 3, "steps_per_shot": 3}}, "both say how long"),
    ],
)
def test_options_that_contradict_each_other(
    toy: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        config(toy, tmp_path / "out", **changes)


def test_rows_that_the_first_head_has_seen_do_not_decide(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the seed, the rows held out are those that the head's own training held out."""
    (tmp_path / "head").mkdir()
    head = HeadTrainConfig(cache=str(tmp_path / "cache"), seed=7)
    (tmp_path / "head" / "config.yaml").write_text(head.to_yaml())
    (tmp_path / "head" / "metrics.json").write_text("{}")
    seen: list[int] = []

    def choose(*rows: Any, seed: int, **options: Any) -> None:
        seen.append(seed)
        raise RunError("far enough")

    monkeypatch.setattr(finetune_train.building, "choose", choose)
    changes: dict[str, Any]
    for changes in ({}, {"init_head": str(tmp_path / "head")}):
        with pytest.raises(RunError, match="far enough"):
            run(config(toy, tmp_path / "out", seed=42, **changes))
    assert seen == [42, 7]
