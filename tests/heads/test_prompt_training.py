"""Prompt-learning heads trained on a cache that a real (tiny) CLIP wrote."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from featcache.caption_tokens import CaptionTokens
from featcache.class_text import open_prompt_tower
from featcache.errors import CacheError, CacheMismatchError, ConfigError
from featcache.extract import ExtractConfig
from featcache.extract import run as extract
from featcache.reader import Cache, open_cache
from heads import evaluate, train
from heads.evaluate import EvaluateConfig
from heads.run_folder import load_run
from heads.train import TrainConfig

from ..toy_tower import ToyTower


@pytest.fixture(scope="module")
def cache(tiny_clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A long-tailed garden of 60 pictures, several labels each, with captions."""
    root = tmp_path_factory.mktemp("prompts")
    backbone = root / "clip"
    shutil.copytree(tiny_clip, backbone)
    config = {
        "backbone": {"kind": "open_clip", "model": f"local-dir:{backbone}"},
        "features": {"projected": True, "text": True},
        "dataset": {
            "kind": "garden",
            "root": root / "garden",
            "task": "multi_label",
            "num_images": 60,
            "image_size": 32,
        },
        "cache": root / "cache",
        "precision": "fp32",
    }
    extract(ExtractConfig.model_validate(config))
    return root / "cache"


def trained(cache: Path, folder: Path, **head: Any) -> train.TrainReport:
    config = {
        "cache": cache,
        "head": head,
        "optim": {"epochs": 2, "batch_size": 24},
        "run": folder,
        "quiet": True,
    }
    return train.run(TrainConfig.model_validate(config))


@pytest.mark.parametrize(
    "head",
    [
        {"kind": "lmpt"},
        {"kind": "lmpt_token", "n_ctx": 3},
        {"kind": "lmpt_token", "cse_form": "sentence", "ctx_init": "a photo of a", "csc": False},
        {"kind": "lmpt_token", "classification_weight": 1.0, "n_ctx": 2, "chunk": 10},
    ],
)
def test_trains_and_predicts_without_the_backbone(
    cache: Path, tmp_path: Path, head: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    report = trained(cache, tmp_path / "run", **head)
    history = (tmp_path / "run" / "history.jsonl").read_text()
    assert ("cse_loss" in history) == (head.get("classification_weight") != 1.0)
    backbone = cache.parent / "clip"
    backbone.rename(cache.parent / "gone")
    try:
        scores = evaluate.run(EvaluateConfig(run=tmp_path / "run", split="test"))
    finally:
        (cache.parent / "gone").rename(backbone)
    assert scores.metrics["map"] == pytest.approx(report.metrics["test"]["map"])
    loaded = load_run(tmp_path / "run").head
    assert torch.isfinite(loaded(torch.randn(3, 32))).all()


def test_an_interrupted_training_goes_on_bit_for_bit(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(cache, tmp_path / "whole", kind="lmpt_token", n_ctx=2)
    from heads import fitting

    original, calls = fitting.score_candidates, 0

    def stop(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    options = {"kind": "lmpt_token", "n_ctx": 2}
    config = TrainConfig.model_validate(
        {
            "cache": cache,
            "head": options,
            "optim": {"epochs": 2, "batch_size": 24},
            "run": tmp_path / "halves",
            "save_every": 1,
            "quiet": True,
        }
    )
    monkeypatch.setattr(fitting, "score_candidates", stop)
    with pytest.raises(KeyboardInterrupt):
        train.run(config)
    monkeypatch.setattr(fitting, "score_candidates", original)
    train.run(config)
    states = [load_run(tmp_path / name).head.state_dict() for name in ("whole", "halves")]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_captions_become_the_tokens_of_the_caches_own_tower(cache: Path) -> None:
    opened = open_cache(cache)
    tower = open_prompt_tower(opened)
    tokens = CaptionTokens(opened, tower)
    offsets, captions = opened.captions
    assert tokens.shape == (60, 77)
    rows = np.asarray([7, 0, 59])
    for row, found in zip(rows, tokens.take(rows), strict=True):
        text = " ".join(captions[i] for i in range(offsets[row], offsets[row + 1]))
        ids, (length,) = tower.tokenize([text])
        assert found[:length].tolist() == (ids[0, :length] + 1).tolist()
        assert not found[length:].any()
    np.testing.assert_array_equal(tokens.read(slice(3, 6)), tokens.take(np.asarray([3, 4, 5])))


def stand_in(policy: str = "raw") -> Cache:
    """Three rows: two captions, none, one that is too long."""
    found: Any = SimpleNamespace(
        path="somewhere",
        num_rows=3,
        captions=(np.asarray([0, 2, 2, 3]), ["Ab", "c", "x" * 60]),
        identity=SimpleNamespace(features=SimpleNamespace(text_policy=policy)),
    )
    return found  # type: ignore[no-any-return]


def test_rows_without_caption_are_padding_and_long_ones_keep_their_end() -> None:
    tokens = CaptionTokens(stand_in(), ToyTower(4)).read()
    assert tokens.dtype == np.int32
    assert tokens[0, :6].tolist() == [2, ord("A") + 1, ord("b") + 1, ord("c") + 1, 3, 0]
    assert not tokens[1].any()
    assert tokens[2].tolist() == [2, *[ord("x") + 1] * 38, 3]


def test_captions_are_read_by_the_policy_that_made_the_features() -> None:
    tokens = CaptionTokens(stand_in("picture_of"), ToyTower(4)).read()
    written = "".join(chr(number - 1) for number in tokens[0] if number > 3)
    assert written == "apictureofabapictureofc"
    with pytest.raises(CacheMismatchError, match="became text by raw#12345678"):
        CaptionTokens(stand_in("raw#12345678"), ToyTower(4))


def test_what_cannot_be_trained_is_said_in_one_line(
    tmp_path: Path, make_multi: Callable[..., Path]
) -> None:
    with pytest.raises(CacheError, match="head lmpt_token reads captions, the cache holds none"):
        trained(make_multi(), tmp_path / "a", kind="lmpt_token")
    joined: Any = SimpleNamespace(parts=(1, 2), path="a+b")
    with pytest.raises(ConfigError, match="one text tower, a join of 2 caches"):
        open_prompt_tower(joined)
