"""Classes by name alone: a decoder trained on some is evaluated on a cache with others."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest

from featcache.errors import CacheMismatchError, ConfigError
from featcache.reader import Cache, open_cache
from heads import evaluate, train, vocabulary
from heads.evaluate import EvaluateConfig
from heads.models.ml_decoder import MlDecoderConfig
from heads.optim import OptimConfig
from heads.run_folder import load_run
from heads.train import TrainConfig

from .conftest import write_cache

WIDTH, NUM_TOKENS = 6, 3
NAMES = [f"c{index}" for index in range(36)]


def text_of(name: str) -> npt.NDArray[np.float32]:
    """What the text tower says to a name; the same in every cache."""
    return np.random.default_rng([int(name[1:]), 7]).normal(size=5).astype(np.float32)


@pytest.fixture(autouse=True)
def text_tower(monkeypatch: pytest.MonkeyPatch) -> None:
    def encode(cache: Cache, templates: Sequence[str], _: Any) -> npt.NDArray[np.float32]:
        one = np.stack([text_of(str(name)) for name in cache.classes["name"]])
        return np.stack([one] * len(templates))

    monkeypatch.setattr(vocabulary, "class_text_features", encode)


@pytest.fixture
def make_tokens(tmp_path: Path) -> Callable[..., Path]:
    """A cache of the named classes: each token shows one of them by a rotation of its text."""

    def make(names: Sequence[str], task: str = "multi_label", rows: int = 400) -> Path:
        rng = np.random.default_rng(len(names))
        turn = np.linalg.qr(np.random.default_rng(3).normal(size=(WIDTH, 5)))[0]
        shown = rng.integers(len(names), size=(rows, NUM_TOKENS))
        text = np.stack([text_of(name) for name in names])
        tokens = 2 * (text @ turn.T)[shown] + 0.05 * rng.normal(size=(rows, NUM_TOKENS, WIDTH))
        labels = [sorted(set(row.tolist())) for row in shown]
        if task == "single_label":
            labels = [one[:1] for one in labels]
        return write_cache(
            tmp_path / f"{task}-{len(names)}" / "cache",
            tokens.astype(np.float32),
            labels,
            ["train"] * (rows // 2) + ["val"] * (rows // 4) + ["test"] * (rows // 4),
            classes=pd.DataFrame({"name": list(names)}),
            task=task,
            array="image/tokens",
            tokens="all",
        )

    return make


def trained(cache: Path, epochs: int = 2, **options: Any) -> train.TrainReport:
    head = MlDecoderConfig(width=32, hidden=64, num_heads=4, scaling="none", **options)
    return train.run(
        TrainConfig(
            cache=cache,
            head=head,
            optim=OptimConfig(epochs=epochs, lr=1e-2, batch_size=64),
            run=cache.parent / "run",
            quiet=True,
            device="cpu",
        )
    )


def test_a_head_on_names_is_evaluated_on_classes_it_never_saw(
    make_tokens: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    report = trained(make_tokens(NAMES[:28], rows=1600), epochs=15, queries="text", dropout=0.0)
    other = make_tokens(NAMES[26:])
    scores = evaluate.run(EvaluateConfig(run=report.run, cache=other, split="test", device="cpu"))
    assert "8 of 10 classes by name alone, never trained on" in capsys.readouterr().out
    assert scores.per_class["name"].tolist() == NAMES[26:]
    hot = open_cache(other).multi_hot(open_cache(other).rows("test"))
    assert scores.metrics["map"] > 1.3 * hot.mean()
    again = evaluate.run(EvaluateConfig(run=report.run, split="test", device="cpu"))
    assert again.metrics["map"] == pytest.approx(report.metrics["test"]["map"], abs=1e-6)
    assert "never trained on" not in capsys.readouterr().out


def test_random_queries_refuse_other_classes(make_tokens: Callable[..., Path]) -> None:
    report = trained(make_tokens(NAMES[:6]))
    config = EvaluateConfig(run=report.run, cache=make_tokens(NAMES[4:12]), device="cpu")
    with pytest.raises(CacheMismatchError, match="classes differ: the cache has 8, the head 6"):
        evaluate.run(config)


def test_another_task_is_refused(make_tokens: Callable[..., Path]) -> None:
    run = load_run(trained(make_tokens(NAMES[:6]), queries="text").run)
    cache = open_cache(make_tokens(NAMES[:8], "single_label"))
    with pytest.raises(ConfigError, match=r"task is single_label, .* trained for multi_label"):
        vocabulary.for_classes_of(run, cache, next(run.head.parameters()).device)
