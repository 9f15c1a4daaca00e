"""Heads and caches whose datasets change: runs stay usable, trainings notice."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from featcache import extract
from featcache.extract import ExtractConfig
from featcache.reader import open_cache
from heads import evaluate, predict, train
from heads.evaluate import EvaluateConfig
from heads.models.linear import LinearConfig
from heads.optim import OptimConfig
from heads.predict import PredictConfig
from heads.run_folder import RunError
from heads.train import TrainConfig


@pytest.fixture
def grow(
    image_folder: Path, tiny_clip: Path, tmp_path: Path, make_jpeg: Any, opened_once: None
) -> Callable[[int], Path]:
    """`grow(n)`: the cache of the small folder with n images more."""

    def extracted(number: int) -> Path:
        for more in range(number):
            file = image_folder / ("train/dog", "val/cat")[more % 2] / f"0-{more}.jpg"
            file.write_bytes(make_jpeg(40, 40, 100 + more))
        config = {
            "dataset": {"root": image_folder},
            "backbone": {"model": f"local-dir:{tiny_clip}"},
            "cache": tmp_path / "cache/pets",
            "device": "cpu",
            "precision": "fp32",
        }
        return Path(extract.run(ExtractConfig.model_validate(config)).cache)

    return extracted


def config(cache: Path, run: Path | None, **options: Any) -> TrainConfig:
    head = LinearConfig(lrs=(0.1,), weight_decays=(0.0,))
    values: dict[str, Any] = {"head": head, "optim": OptimConfig(epochs=2), "quiet": True}
    return TrainConfig(cache=cache, run=run, **(values | options))


def test_a_run_trained_before_is_evaluated_on_the_grown_cache(
    grow: Callable[[int], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache, folder = grow(0), tmp_path / "run"
    train.run(config(cache, folder))
    before = evaluate.run(EvaluateConfig(run=folder, split="val"))
    assert "earlier state" not in capsys.readouterr().out
    grow(4)
    after = evaluate.run(EvaluateConfig(run=folder, split="val"))
    line = f"{cache}: trained on an earlier state of it; it had 14 rows then; since: 4 gained"
    assert line in capsys.readouterr().out.splitlines()
    assert (before.metrics["num_rows"], after.metrics["num_rows"]) == (4, 6)
    # The old rows' scores are those of before: what is known was copied, not encoded again.
    out = tmp_path / "predicted.csv"
    predict.run(PredictConfig(run=folder, cache=cache, split="val", out=out))
    assert line in capsys.readouterr().out.splitlines()
    assert len(out.read_text().splitlines()) == 1 + 6


def test_a_training_on_an_earlier_state_does_not_go_on(
    grow: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, folder = grow(0), tmp_path / "run"

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, "write_results", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train.run(config(cache, folder, save_every=1))
    assert (folder / train.CHECKPOINT).is_file()
    grow(2)
    pattern = r"run: trained there on an earlier state of .*pets; it had 14 rows then; since: 2 gai"
    with pytest.raises(RunError, match=pattern + r"ned; --restart trains anew on all rows"):
        train.run(config(cache, folder, save_every=1))
    report = train.run(config(cache, folder, save_every=1, restart=True))
    assert report.metrics["num_train_rows"] == 11
    assert train.run(config(cache, folder, save_every=1)).reused
    # Without a folder of its own a training of the new state is another one.
    monkeypatch.chdir(tmp_path)
    first = train.run(config(cache, None)).run
    grow(4)
    assert train.run(config(cache, None)).run != first


def test_a_dataset_that_comes_back_to_an_earlier_state_has_its_runs_again(
    grow: Callable[[int], Path], image_folder: Path, tmp_path: Path
) -> None:
    cache, folder = grow(0), tmp_path / "run"
    fingerprint = open_cache(cache).fingerprint
    train.run(config(cache, folder))
    grow(1)
    (image_folder / "train/dog/0-0.jpg").unlink()
    grow(0)
    assert open_cache(cache).fingerprint == fingerprint
    assert len(open_cache(cache).history) == 2
    assert train.run(config(cache, folder)).reused


def test_a_training_goes_on_with_the_rows_it_mapped(
    grow: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = grow(0)
    shutil.copytree(cache, tmp_path / "copy")
    undisturbed = train.run(config(tmp_path / "copy", tmp_path / "undisturbed"))
    fit = train.fit

    def disturbed(*arguments: Any, **options: Any) -> Any:
        grow(4)
        return fit(*arguments, **options)

    monkeypatch.setattr(train, "fit", disturbed)
    report = train.run(config(cache, tmp_path / "run"))
    assert open_cache(cache).num_rows == 18
    assert report.metrics["val"] == undisturbed.metrics["val"]
    assert report.metrics["num_train_rows"] == 10
