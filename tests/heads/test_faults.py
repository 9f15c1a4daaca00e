"""Faults of earlier programs that no single part of the project could bring back by itself."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from featcache.errors import CacheMismatchError
from featcache.prompts import TEMPLATES, format_prompts
from heads import fitting, train
from heads.checkpoint import save_state
from heads.evaluate import EvaluateConfig
from heads.evaluate import run as evaluate
from heads.models.linear import Linear, LinearConfig
from heads.models.mop import MopConfig
from heads.models.zero_shot import ZeroShotConfig
from heads.optim import OptimConfig, ScheduleConfig, lr_factor
from heads.train import TrainConfig

CacheMaker = Callable[..., Path]
BIOLOGY = pd.DataFrame(
    {
        "name": ["alpha", "beta"],
        "common_name": ["Blue Alpha", ""],
        "species": ["Alpha betus", "Beta gammus"],
        "scientific_name": ["Alpha betus", "Beta gammus"],
        "genus": ["Alpha", "Beta"],
        "family": ["Alphidae", "Betidae"],
        "order": ["Insecta", "Insecta"],
    }
)


def trained(cache: Path, run: Path, **options: Any) -> Path:
    values = {"optim": OptimConfig(epochs=3, lr=0.03, weight_decay=0.0), "report": False}
    values |= {"cache": cache, "run": run, "head": LinearConfig(), "quiet": True, "device": "cpu"}
    train.run(TrainConfig(**(values | options)))
    return run


def test_f06_common_and_scientific_names_are_both_asked_for() -> None:
    templates = MopConfig().template_names(BIOLOGY, "inaturalist")
    sentences = format_prompts(BIOLOGY, templates)
    first = [sentence[0] for sentence in sentences]
    assert any("Blue Alpha" in one and "Alpha betus" not in one for one in first)
    assert any("Alpha betus" in one for one in first)
    assert all("Beta gammus" in one[1] for one in sentences[:2]), "no common name: the other one"


@pytest.mark.parametrize("shape", ["cosine", "linear", "constant", "one_cycle"])
def test_f08_the_first_step_moves(shape: Any) -> None:
    assert lr_factor(ScheduleConfig(shape=shape, warmup_steps=10), 100)(0) > 0


def test_f08_the_state_is_saved_whether_or_not_an_epoch_was_better(
    make_single: CacheMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, saved = make_single(), []

    def save(path: Path, training: Any, fingerprint: str) -> None:
        save_state(path, training, fingerprint)
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        record = " ".join(map(str, header.get("__metadata__", {}).values()))
        saved.append((len(training.history), training.best.epoch, "scaler" in record))

    monkeypatch.setattr(fitting, "save_state", save)
    better = fitting.better
    monkeypatch.setattr(  # no epoch after the first is
        fitting, "better", lambda best, *rest: best if best.epoch else better(best, *rest)
    )
    trained(cache, tmp_path / "run", save_every=1)
    assert saved == [(1, 1, True), (2, 1, True)], "after each epoch but the last, best is epoch 1"
    best, last = (load_file(tmp_path / "run" / f"{n}.safetensors") for n in ("head", "head_last"))
    assert not torch.equal(best["weights.0"], last["weights.0"])


def test_f08_f50_a_run_holds_the_heads_tensors_alone_and_names_its_backbone(
    make_single: CacheMaker, tmp_path: Path
) -> None:
    run = trained(make_single(), tmp_path / "run")
    assert load_file(run / "head.safetensors").keys() == {"weights.0", "biases.0", "mean", "std"}
    record = json.loads((run / "head.json").read_text())
    assert record["config"]["kind"] == "linear"
    assert record["identity"]["backbone"] == {
        **record["identity"]["backbone"],
        "kind": "toy",
        "name": "toy",
        "weights": "w0",
    }


def test_f16_the_test_rows_decide_nothing(make_cache: CacheMaker, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 150)
    labels[:3] = np.arange(3)
    features = (np.eye(3)[labels] + 0.7 * rng.normal(size=(150, 3))).astype(np.float32)
    splits = ["train"] * 80 + ["val"] * 30 + ["test"] * 40
    states, scores = [], []
    for name, shift in (("a", 0), ("b", 1)):
        shown = labels.copy()
        shown[110:] = (shown[110:] + shift) % 3
        cache = make_cache(name, features, [[one] for one in shown], splits, num_classes=3)
        head = LinearConfig(lrs=(0.003, 0.1), weight_decays=(0.0,))
        optim = OptimConfig(epochs=6, schedule=ScheduleConfig(shape="plateau", patience=0))
        run = trained(cache, tmp_path / name, head=head, optim=optim)
        states.append(load_file(run / "head.safetensors"))
        metrics = json.loads((run / "metrics.json").read_text())
        scores.append((metrics["best_epoch"], metrics["candidate"], metrics["val"]["top1"]))
        assert metrics["test"]["top1"] < 0.5 or not shift
    assert scores[0] == scores[1]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_f20_a_cache_with_the_classes_in_another_order_is_refused(
    make_single: CacheMaker, tmp_path: Path
) -> None:
    run = trained(make_single(), tmp_path / "run")
    names = [f"c{index}" for index in (1, 0, 2, 3, 4)]
    other = make_single("other", classes=pd.DataFrame({"name": names}))
    with pytest.raises(CacheMismatchError, match="class 0 is 'c1' in the cache, 'c0' in the head"):
        evaluate(EvaluateConfig(run=run, cache=other, device="cpu"))


def test_f21_every_template_is_a_sentence_of_its_own_and_none_is_cut() -> None:
    name = "a class with so long a name that forty characters are not nearly enough for it"
    table = pd.DataFrame({"name": [name, "b"]})
    templates = ZeroShotConfig(templates="imagenet").template_names(table, "folder")
    sentences = format_prompts(table, templates)
    assert len(sentences) == len(templates) == len(TEMPLATES["imagenet"]) == 80
    assert [one[0] for one in sentences] == [one.format(name=name) for one in templates]


def test_f27_validation_builds_no_gradient(
    make_single: CacheMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, seen = Linear.candidates, []

    def candidates(self: Linear, *features: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        for name, logits in original(self, *features):
            seen.append((logits.requires_grad, self.training))
            yield name, logits

    monkeypatch.setattr(Linear, "candidates", candidates)
    trained(make_single(), tmp_path / "run")
    assert len(seen) >= 3, "one an epoch at least"
    assert set(seen) == {(False, False)}


def test_f28_templates_keep_their_order() -> None:
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog"]
    templates = [f"{word} {{name}}" for word in words]
    table = pd.DataFrame({"name": ["b"]})
    for config in (ZeroShotConfig(templates=templates), MopConfig(templates=templates)):
        assert config.template_names(table, "folder") == templates
