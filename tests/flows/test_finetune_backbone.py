"""The flow that adapts a backbone, against a server; its training is a tiny one, or stands in."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect.logging.handlers import APILogHandler
from prefect.settings import temporary_settings
from pydantic import ValidationError

from featcache.errors import BackboneError
from featcache.reader import open_cache
from finetune.train import Report, TrainConfig
from flows import finetune_backbone as module
from flows.finetune_backbone import AdaptedExtraction, FinetuneBackboneConfig, finetune_backbone
from flows.train_heads import HeadTraining
from heads import train as heads_train

pytestmark = pytest.mark.flows


@pytest.fixture(autouse=True)
def _on_our_server(prefect: Any) -> Iterator[None]:
    with temporary_settings({"api.url": prefect.environment["PREFECT_API_URL"]}):
        yield
        APILogHandler().flush()  # while the server is there


@pytest.fixture
def config(image_folder: Path, tiny_clip: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "dataset": {"kind": "folder", "root": image_folder},
            "backbone": {"kind": "open_clip", "model": f"local-dir:{tiny_clip}"},
            "adapter": {"kind": "lora", "rank": 2},
            "out": tmp_path / "adapted" / "pets",
            "optim": {"epochs": 1, "batch_size": 4},
            "device": "cpu",
        }
    )


def test_backbone_is_adapted_and_heads_are_trained_on_its_cache(
    config: TrainConfig, tmp_path: Path
) -> None:
    extract = AdaptedExtraction.model_validate(
        {"cache": tmp_path / "new", "device": "cpu", "precision": "fp32"}
    )
    head = HeadTraining.model_validate({"optim": {"epochs": 1}, "run": tmp_path / "run"})
    state = finetune_backbone(config, extract, [head], return_state=True)
    assert state.is_completed(), state.message
    found: Any = state.result()
    assert found["folder"] == str(config.out)
    assert (config.out / "adapter.safetensors").is_file()
    cache = open_cache(tmp_path / "new")
    assert cache.identity.backbone.kind == "adapted"
    adapted, head_row = found["rows"]
    metrics = json.loads((config.out / "metrics.json").read_text())
    assert adapted["what"] == "lora, trained on images"
    assert adapted["val"] == metrics["val_acc_cls"]
    assert adapted["test"] is None
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert head_row["val"] == metrics["val"]["top1"]
    assert head_row["folder"] == str(tmp_path / "run")

    again = finetune_backbone(config, extract, [head], return_state=True)
    assert "trained earlier with the same options" in str(again.message)
    assert "it was complete, nothing was extracted" in str(again.message)


def test_head_that_training_was_compared_with_is_the_first_row(tmp_path: Path) -> None:
    config = TrainConfig.model_validate({"out": tmp_path / "a", "cache": tmp_path / "c"})
    frozen = {"run": "r", "cache": "c", "accuracy": {"val": 0.5, "test": 0.4}, "seconds": 1.0}
    trained = {"metric": "top1", "val_acc_cls": 0.7, "test_acc_cls": 0.6, "test_acc_txt": 0.55}
    trained |= {"num_parameters": 20, "seconds": 2.0}
    trained |= {"frozen": frozen | {"num_parameters": 9}}
    first, adapted = module.comparison(config, trained)
    assert (first["val"], first["test"], first["trained"]) == (0.5, 0.4, 9)
    assert (adapted["val"], adapted["test"], adapted["test by text"]) == (0.7, 0.6, 0.55)


def test_training_without_a_head_is_judged_by_text(tmp_path: Path) -> None:
    config = TrainConfig.model_validate(
        {"out": tmp_path / "a", "cache": tmp_path / "c", "objective": "image_text"}
    )
    values = {"metric": "top1", "test_acc_txt": 0.55, "num_parameters": 20, "seconds": 2.0}
    (row,) = module.comparison(config, values)
    assert (row["val"], row["test"], row["test by text"]) == (None, 0.55, 0.55)


def test_users_trouble_is_not_retried_and_ends_the_run_in_one_line(
    monkeypatch: pytest.MonkeyPatch, config: TrainConfig
) -> None:
    calls = []

    def refuse(_: TrainConfig) -> Report:
        calls.append(1)
        raise BackboneError("no attention:\n  choose another")

    monkeypatch.setattr(module.training_job, "run", refuse)
    state = finetune_backbone(config, return_state=True)
    assert state.is_failed()
    assert state.message == "fine-tuning: no attention: choose another"
    assert len(calls) == 1


def test_passing_trouble_is_retried_and_training_alone_ends_there(
    monkeypatch: pytest.MonkeyPatch, config: TrainConfig
) -> None:
    values = {
        "metric": "top1",
        "best_epoch": 2,
        "epochs": 3,
        "val_acc_cls": 0.5,
        "test_acc_cls": 0.25,
        "num_parameters": 20,
        "num_adapter_parameters": 15,
        "num_head_parameters": 5,
        "seconds": 2.0,
        "images_per_second": 9.0,
        "waiting": 0.1,
        "device": "cpu",
    }
    troubles: list[Exception] = [OSError("stale file handle")]

    def fake(config: TrainConfig) -> Report:
        if troubles:
            raise troubles.pop()
        return Report(config.out, values)

    monkeypatch.setattr(module.training_job, "run", fake)
    quick = module.finetune.with_options(retry_delay_seconds=0)
    monkeypatch.setattr(module, "finetune", quick)
    monkeypatch.setattr(heads_train, "run", lambda _: pytest.fail("no heads were asked for"))
    state = finetune_backbone(config, return_state=True)
    assert state.is_completed()
    assert state.message == (
        f"{config.out}: best epoch 2 of 3; val top1 50.0 % by the head, "
        "test top1 25.0 % by the head"
    )


def test_heads_without_a_cache_are_refused(config: TrainConfig) -> None:
    with pytest.raises(ValidationError, match=r"set extract\.cache"):
        FinetuneBackboneConfig(train=config, heads=[HeadTraining()])
    state = finetune_backbone(config, None, [HeadTraining()], return_state=True)
    assert state.is_failed()
    assert "set extract.cache" in str(state.message)
