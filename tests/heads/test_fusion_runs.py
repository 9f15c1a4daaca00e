"""Heads that read image and caption, through the training job: what they gain and keep."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from featcache.reader import open_cache
from heads import fitting, train
from heads.base import HeadConfig
from heads.data import FeatureTables, open_arrays
from heads.evaluate import Validation
from heads.models.average import AverageConfig
from heads.models.boost import BoostConfig
from heads.models.ensemble import EnsembleConfig
from heads.models.naive import NaiveConfig
from heads.models.router import Router, RouterConfig
from heads.models.two_step import TwoStepConfig
from heads.optim import OptimConfig
from heads.parts import labelled_part
from heads.run_folder import load_run
from heads.train import TrainConfig

Maker = Callable[..., Path]
SPLITS = {"train": 320, "val": 80, "test": 120}
CPU = torch.device("cpu")


@pytest.fixture
def halves(make_cache: Maker) -> Path:
    """Four classes; the image tells which two it can be, the caption which of the two.

    Every tenth row has no caption.
    """
    rng = np.random.default_rng(0)
    total = sum(SPLITS.values())
    labels = rng.integers(0, 4, total)
    told = np.arange(total) % 10 > 0
    centres = rng.normal(size=(2, 2, 8))
    image, text = (
        centres[which][bit] + 0.15 * rng.normal(size=(total, 8))
        for which, bit in enumerate((labels // 2, labels % 2))
    )
    joint = np.where(told[:, None], np.concatenate([image, text], 1), np.nan)
    return make_cache(
        "halves",
        image.astype(np.float32),
        [[label] for label in labels],
        [name for name, count in SPLITS.items() for _ in range(count)],
        num_classes=4,
        captions=[["words"] if one else [] for one in told],
        more={
            "text/projected": text[told].astype(np.float32),
            "image/multimodal_pooled": joint.astype(np.float32),
        },
        text=True,
        multimodal="pooled",
    )


def config(cache: Path, run: Path, head: HeadConfig, **options: Any) -> TrainConfig:
    values: dict[str, Any] = {"optim": OptimConfig(epochs=8, lr=1e-2), "quiet": True}
    return TrainConfig(cache=cache, run=run, head=head, device="cpu", **(values | options))


def test_two_halves_make_a_whole(halves: Path, tmp_path: Path) -> None:
    def score(name: str, head: HeadConfig, **options: Any) -> float:
        return train.run(config(halves, tmp_path / name, head, **options)).score

    alone = score("image", NaiveConfig()), score("text", NaiveConfig(feature="text"))
    assert max(alone) < 0.62, "neither tells all four classes"
    heads = {
        "router": RouterConfig(),
        "two_step": TwoStepConfig(),
        "ensemble": EnsembleConfig(common_width=8),
        "boost": BoostConfig(base=tmp_path / "image", feature="text"),
        "average": AverageConfig(runs=(tmp_path / "image", tmp_path / "text"), space="logits"),
    }
    for name, head in heads.items():
        # A tenth has no caption and is right half the time.
        assert score(name, head) > 0.88, name
    whole = json.loads((tmp_path / "router" / "metrics.json").read_text())
    assert set(whole["monitors"]["test"]) == {"image", "text"}
    assert max(whole["monitors"]["test"].values()) < 0.62


def test_runs_score_alone_as_they_were_scored(halves: Path, tmp_path: Path) -> None:
    """With captions missing in some rows, from the run folder, with all others gone."""
    train.run(config(halves, tmp_path / "image", NaiveConfig()))
    train.run(config(halves, tmp_path / "router", RouterConfig()))
    asked = AverageConfig(runs=(tmp_path / "image", tmp_path / "router"))
    report = train.run(config(halves, tmp_path / "average", asked))
    shutil.rmtree(tmp_path / "image")
    shutil.rmtree(tmp_path / "router")
    run, cache = load_run(tmp_path / "average"), open_cache(halves)
    part = labelled_part(cache, "test")
    table = FeatureTables(open_arrays(cache, run.config), part.rows, CPU)
    with torch.no_grad():
        top1 = (run.head(*table.slice(0, len(part))).argmax(1).numpy() == part.targets).mean()
    assert top1 == pytest.approx(report.metrics["test"]["top1"])


def test_f37_weights_of_rows_without_a_caption_are_the_images(halves: Path, tmp_path: Path) -> None:
    train.run(config(halves, tmp_path / "router", RouterConfig()))
    run, cache = load_run(tmp_path / "router"), open_cache(halves)
    assert isinstance(run.head, Router)
    part = labelled_part(cache, "test")
    table = FeatureTables(open_arrays(cache, run.config), part.rows, CPU)
    weights = run.head.weights(*table.slice(0, len(part))).detach()
    without = torch.from_numpy(part.rows % 10 == 0)
    assert torch.equal(weights[without], torch.tensor([1.0, 0.0]).expand(int(without.sum()), 2))
    assert weights[~without].min() > 0.01
    torch.testing.assert_close(weights.sum(1), torch.ones(len(part)))


def interrupted(options: TrainConfig, after_epochs: int) -> None:
    """Trains until the validation after that many epochs, where the user presses ^C."""
    with pytest.MonkeyPatch.context() as patch:
        original, calls = fitting.score_candidates, []

        def stopping(*arguments: Any, **options: Any) -> Validation:
            calls.append(1)
            if len(calls) > after_epochs:
                raise KeyboardInterrupt
            return original(*arguments, **options)

        patch.setattr(fitting, "score_candidates", stopping)
        train.run(options)


def test_an_interrupted_two_step_training_ends_as_an_uninterrupted_one(
    halves: Path, tmp_path: Path
) -> None:
    head = TwoStepConfig(dropout=0.1, hide_share=0.2, head_lr_factor=0.1, stage_patience=2)
    optim = OptimConfig(epochs=8, lr=1e-2, ema_decay=0.9)
    straight = config(halves, tmp_path / "straight", head, optim=optim, save_every=1)
    broken = straight.model_copy(update={"run": tmp_path / "broken"})
    train.run(straight)
    for after_epochs in (2, 4):  # in stage 1, then (of what is left) in stage 2
        with pytest.raises(KeyboardInterrupt):
            interrupted(broken, after_epochs)
    assert not train.run(broken).reused
    runs = tmp_path / "straight", tmp_path / "broken"
    one, other = (load_file(run / "head.safetensors") for run in runs)
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    first, second = (
        [
            {k: v for k, v in json.loads(line).items() if k != "seconds"}
            for line in (run / "history.jsonl").read_text().splitlines()
        ]
        for run in runs
    )
    assert first == second
    assert len({frozenset(line) for line in first}) == 1, "all epochs report the same"


def test_two_step_picks_no_epoch_of_its_first_stage(halves: Path, tmp_path: Path) -> None:
    head = TwoStepConfig(min_gain=0.0, stage_patience=100, longest_first_stage=0.7)
    report = train.run(config(halves, tmp_path / "run", head))
    assert report.metrics["best_epoch"] > 6, "stage 1 has ceil(0.7 * 8) epochs"
