"""The training job: rows, resuming, selection, run folder, refusals."""

import json
import math
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from featcache.datasets import splitting
from featcache.errors import CacheError, ConfigError
from featcache.reader import open_cache
from heads import data, fitting, run_folder, train
from heads.evaluate import Validation
from heads.models.linear import Linear, LinearConfig
from heads.optim import OptimConfig, ScheduleConfig
from heads.parts import Parts, carve, choose_parts, labelled_part
from heads.run_folder import RunError, load_run
from heads.train import TrainConfig

from ..warm import WarmProcess

CacheMaker = Callable[..., Path]


def config(cache: Path, **options: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "cache": cache,
        "head": LinearConfig(lrs=(0.01, 0.1), weight_decays=(0.0, 0.1)),
        "optim": OptimConfig(epochs=4),
        "run": cache.parent.parent / "run",
        "quiet": True,
        "device": "cpu",
    }
    return TrainConfig(**(values | options))


def test_a_linear_head_learns_and_leaves_a_whole_run_folder(make_single: CacheMaker) -> None:
    cache = make_single()
    report = train.run(config(cache))
    assert report.metrics["test"]["top1"] > 0.9
    assert report.score == report.metrics["test"]["top1"]
    names = {file.name for file in report.run.iterdir()} - {".lock"}
    assert names == {
        "config.yaml",
        "metrics.json",
        "history.jsonl",
        "head.json",
        "head.safetensors",
        "head_last.safetensors",
        "curves.png",
        "calibration.json",
        "classes_test.csv",
    }
    state = load_file(report.run / "head.safetensors")
    assert {name: tuple(t.shape) for name, t in state.items()} == {
        "weights.0": (5, 12),
        "biases.0": (5,),
        "mean": (12,),
        "std": (12,),
    }
    assert [line["epoch"] for line in _curve(report.run)] == [1, 2, 3, 4]
    loaded = load_run(report.run)
    assert loaded.class_names == [f"c{i}" for i in range(5)]
    assert loaded.config.lrs == (float(report.metrics["candidate"].split()[1].strip(",")),)
    opened = open_cache(cache)
    part = labelled_part(opened, "test")
    features = torch.from_numpy(opened.array("image/projected").read(part.rows)).float()
    top1 = (loaded.head(features).argmax(1).numpy() == part.targets).mean()
    assert top1 == pytest.approx(report.metrics["test"]["top1"])


def test_f48_a_run_folder_may_have_any_name(make_single: CacheMaker, tmp_path: Path) -> None:
    report = train.run(config(make_single(), run=tmp_path / "mop-512", optim=OptimConfig(epochs=1)))
    renamed = report.run.rename(tmp_path / "zero_shot-768")
    assert isinstance(load_run(renamed).head, Linear)


def test_f51_no_file_of_a_run_folder_needs_pickle(make_single: CacheMaker) -> None:
    cache = make_single()
    options = config(cache, save_every=1)
    with pytest.raises(KeyboardInterrupt):
        _run_interrupted(options, after_epochs=2)
    assert (cache.parent.parent / "run" / "last.safetensors").is_file()
    for folder in (cache.parent.parent / "run", train.run(options).run):
        for file in folder.iterdir():
            start = file.read_bytes()[:4]
            assert not start.startswith((b"\x80", b"PK\x03\x04")), file
            assert file.suffix not in {".pt", ".pth", ".pkl", ".ckpt", ".npy"}


def _run_interrupted(options: TrainConfig, after_epochs: int) -> None:
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


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "head.safetensors")


def _curve(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("task", ["single", "multi"])
def test_an_interrupted_training_ends_as_an_uninterrupted_one(
    make_single: CacheMaker, make_multi: CacheMaker, tmp_path: Path, optimizer: str, task: str
) -> None:
    cache = make_single() if task == "single" else make_multi()
    optim = OptimConfig(optimizer=optimizer, epochs=6, schedule=ScheduleConfig(warmup_steps=5))
    straight = config(cache, run=tmp_path / "straight", optim=optim, save_every=2)
    broken = straight.model_copy(update={"run": tmp_path / "broken"})
    train.run(straight)
    for after_epochs in (3, 1):  # resumes at 2, then at 2 again
        with pytest.raises(KeyboardInterrupt):
            _run_interrupted(broken, after_epochs)
    assert len(_curve(tmp_path / "broken")) == 2
    train.run(broken)
    one, other = _tensors(tmp_path / "straight"), _tensors(tmp_path / "broken")
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name
    assert _curve(tmp_path / "straight") == _curve(tmp_path / "broken")
    for run in ("straight", "broken"):
        assert len(_curve(tmp_path / run)) == 6


def test_without_resume_an_interrupted_training_begins_anew(
    make_single: CacheMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = config(make_single(), run=tmp_path / "run", optim=OptimConfig(epochs=4), save_every=1)
    with pytest.raises(KeyboardInterrupt):
        _run_interrupted(asked, 2)
    assert (tmp_path / "run" / "last.safetensors").is_file()
    epochs = []
    original = fitting._epoch_means
    monkeypatch.setattr(fitting, "_epoch_means", lambda *args: epochs.append(1) or original(*args))
    train.run(asked.model_copy(update={"resume": False}))
    assert len(epochs) == 4


def test_a_killed_process_resumes_bit_for_bit(make_single: CacheMaker, tmp_path: Path) -> None:
    cache = make_single(splits={"train": 3000, "val": 60, "test": 60})
    optim = OptimConfig(epochs=30, batch_size=16)
    straight = config(cache, run=tmp_path / "straight", optim=optim, save_every=1)
    killed = straight.model_copy(update={"run": tmp_path / "killed"})
    file = tmp_path / "killed.yaml"
    file.write_text(killed.to_yaml())
    process = WarmProcess("-m", "heads.train", "--config", str(file))
    last = tmp_path / "killed" / "last.safetensors"
    deadline = time.monotonic() + 120
    while not last.is_file() and process.is_running() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    assert process.wait()[2] == -signal.SIGKILL, "the process ended before it could be killed"
    assert last.is_file()
    assert not (tmp_path / "killed" / "metrics.json").exists()
    train.run(killed)
    train.run(straight)
    for name, tensor in _tensors(tmp_path / "straight").items():
        assert torch.equal(tensor, _tensors(tmp_path / "killed")[name]), name


def test_a_folder_with_other_files_is_left_alone(make_single: CacheMaker, tmp_path: Path) -> None:
    weights = tmp_path / "models" / "clip.safetensors"
    weights.parent.mkdir()
    weights.write_text("trained for a month")
    options = config(make_single(), run=weights.parent)
    for restart in (False, True):
        with pytest.raises(RunError, match=r"holds clip\.safetensors and no run; choose a new"):
            train.run(options.model_copy(update={"restart": restart}))
    assert [file.name for file in weights.parent.iterdir()] == ["clip.safetensors"]


def test_a_finished_run_is_reused_and_restart_trains_anew(
    make_single: CacheMaker, capsys: pytest.CaptureFixture[str]
) -> None:
    options = config(make_single(), quiet=False)
    first = train.run(options)
    before = (first.run / "head.safetensors").stat().st_mtime_ns
    again = train.run(options)
    assert again.reused
    assert again.metrics == first.metrics
    assert (first.run / "head.safetensors").stat().st_mtime_ns == before
    assert "trained already with this configuration" in capsys.readouterr().out
    assert not train.run(options.model_copy(update={"restart": True})).reused
    assert (first.run / "head.safetensors").stat().st_mtime_ns > before


def test_another_configuration_in_the_same_folder_is_refused(make_single: CacheMaker) -> None:
    cache = make_single()
    train.run(config(cache))
    with pytest.raises(RunError, match=r"seed differs: trained there with 0, now 1"):
        train.run(config(cache, seed=1))
    with pytest.raises(RunError, match=r"optim.epochs differs: trained there with 4, now 5"):
        train.run(config(cache, optim=OptimConfig(epochs=5)))
    other = make_single("other", seed=3)
    with pytest.raises(RunError, match="trained there on cache"):
        train.run(config(other))


def test_default_run_folder_names_cache_head_and_configuration(
    make_single: CacheMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cache = make_single("birds")
    first = train.run(config(cache, run=None)).run
    second = train.run(config(cache, run=None, seed=1)).run
    assert first != second
    for folder in (first, second):
        assert folder.parent == Path("runs")
        assert folder.name.startswith("birds-linear-")
    assert train.run(config(cache, run=None)).reused


def test_the_recorded_configuration_is_resolved_and_trains_the_same(
    make_single: CacheMaker, tmp_path: Path
) -> None:
    cache = make_single()
    report = train.run(config(cache))
    recorded = yaml.safe_load((report.run / "config.yaml").read_text())
    assert recorded["optim"]["batch_size"] == 16
    assert recorded["optim"]["epochs"] == 4
    assert recorded["optim"]["schedule"]["warmup_steps"] == 0
    again = TrainConfig.from_yaml(report.run / "config.yaml")
    train.run(again.model_copy(update={"run": tmp_path / "again"}))
    for name, tensor in _tensors(report.run).items():
        assert torch.equal(tensor, _tensors(tmp_path / "again")[name])


def test_invalid_and_unlabelled_rows_are_never_trained_on(
    make_single: CacheMaker, make_cache: CacheMaker, tmp_path: Path
) -> None:
    cache = make_single(invalid=[3, 7, 320])
    report = train.run(config(cache))
    assert report.metrics["num_train_rows"] == 298
    assert report.metrics["val"]["num_rows"] == 59
    rng = np.random.default_rng(0)
    labels = [[row % 3] if row % 4 else [] for row in range(80)]
    path = make_cache(
        "partly",
        rng.normal(size=(80, 4)).astype(np.float32),
        labels,
        ["train"] * 40 + ["val"] * 40,
        num_classes=3,
    )
    report = train.run(config(path, run=tmp_path / "partly"))
    assert report.metrics["num_train_rows"] == 30
    assert report.metrics["val"]["num_rows"] == 30


def test_features_that_are_not_finite_are_refused(make_cache: CacheMaker, tmp_path: Path) -> None:
    features = np.ones((20, 4), np.float32)
    features[5, 2] = np.inf
    path = make_cache(
        "bad",
        features,
        [[row % 2] for row in range(20)],
        ["train"] * 10 + ["val"] * 10,
        num_classes=2,
    )
    with pytest.raises(CacheError, match="row 5 of the cache is valid but holds NaN or infinity"):
        train.run(config(path))


def test_an_array_that_the_cache_lacks_is_named_with_its_flag(make_single: CacheMaker) -> None:
    with pytest.raises(CacheError, match=r"reads image/pooled.*--features.pooled"):
        train.run(config(make_single(), head=LinearConfig(feature="pooled")))


def test_a_cache_without_labels_is_refused(make_cache: CacheMaker) -> None:
    path = make_cache(
        "plain",
        np.ones((4, 3), np.float32),
        [[]] * 4,
        ["train"] * 4,
        num_classes=0,
        task="unlabelled",
    )
    with pytest.raises(CacheError, match="heads need labels"):
        train.run(config(path))


class TestSplits:
    def choose(self, cache: Path, **options: Any) -> Parts:
        values = {
            "train_split": "train",
            "val_split": None,
            "val_fraction": 0.2,
            "test_split": None,
            "select_on": "val",
            "seed": 0,
        }
        return choose_parts(open_cache(cache), **(values | options))

    def test_validation_is_carved_out_of_train_and_never_is_the_test_split(
        self, make_single: CacheMaker
    ) -> None:
        parts = self.choose(make_single(splits={"train": 300, "test": 80}))
        assert parts.val.name == "train (held out)"
        assert parts.test is not None
        assert len(parts.train) + len(parts.val) == 300
        assert not set(parts.val.rows) & (set(parts.train.rows) | set(parts.test.rows))
        share = np.bincount(parts.val.targets) / (
            np.bincount(parts.val.targets) + np.bincount(parts.train.targets)
        )
        np.testing.assert_allclose(share, 0.2, atol=0.02)

    def test_the_draw_follows_the_seed(self, make_single: CacheMaker) -> None:
        cache = make_single(splits={"train": 300})
        one, again, other = (self.choose(cache, seed=seed).val.rows for seed in (0, 0, 1))
        assert one.tolist() == again.tolist()
        assert one.tolist() != other.tolist()

    def test_one_split_in_two_roles_is_refused(self, make_single: CacheMaker) -> None:
        cache = make_single()
        with pytest.raises(ConfigError, match="val_split and test_split are both 'test'"):
            self.choose(cache, val_split="test", test_split="test")
        with pytest.raises(ConfigError, match="train_split and val_split are both 'train'"):
            self.choose(cache, val_split="train")
        assert self.choose(cache, val_split="test").test is None

    def test_an_unknown_split_lists_the_known_ones(self, make_single: CacheMaker) -> None:
        with pytest.raises(ConfigError, match="no split 'dev'; it has train, val, test"):
            self.choose(make_single(), val_split="dev")

    def test_selecting_on_the_test_split_warns(
        self, make_single: CacheMaker, caplog: pytest.LogCaptureFixture
    ) -> None:
        parts = self.choose(make_single(splits={"train": 50, "test": 20}), select_on="test")
        assert "optimistic" in caplog.text
        assert parts.val is parts.test
        assert len(parts.train) == 50

    def test_carving_multi_label_rows_keeps_every_class_on_both_sides(self) -> None:
        rng = np.random.default_rng(0)
        chances = np.asarray([0.5, 0.3, 0.1, 0.02, 0.01, 0.004])
        targets = (rng.uniform(size=(1000, 6)) < chances).astype(np.uint8)
        targets[:2, 5] = 1
        mask = carve([f"r{row}" for row in range(1000)], targets, 6, 0.1, 0)
        assert 0.05 < mask.mean() < 0.2
        for c in range(6):
            positives = targets[:, c] > 0
            assert (positives & mask).any(), c
            assert (positives & ~mask).any(), c

    def test_f44_who_draws_the_rows_again_draws_those_of_the_training(
        self, make_single: CacheMaker
    ) -> None:
        cache = make_single(splits={"train": 300, "test": 80})
        report = train.run(config(cache, optim=OptimConfig(epochs=1), val_fraction=0.3, seed=5))
        recorded = TrainConfig.from_yaml(report.run / "config.yaml")
        names = ("train_split", "val_split", "val_fraction", "test_split", "select_on", "seed")
        drawn = self.choose(cache, **{name: getattr(recorded, name) for name in names})
        assert len(drawn.val) == report.metrics["val"]["num_rows"]
        assert not set(drawn.val.rows) & set(drawn.train.rows)
        loaded = load_run(report.run)
        features = open_cache(cache).array("image/projected").read(drawn.val.rows)
        with torch.no_grad():
            predicted = loaded.head(torch.from_numpy(features).float()).argmax(1).numpy()
        assert (predicted == drawn.val.targets).mean() == pytest.approx(
            report.metrics["val"]["top1"]
        ), "scored on other rows"

    def test_one_label_a_row_is_carved_by_the_rule_of_the_datasets(self) -> None:
        rng = np.random.default_rng(1)
        targets = rng.choice(7, 400, p=[0.4, 0.3, 0.2, 0.08, 0.01, 0.005, 0.005])
        ids = [f"image {row}.jpg" for row in range(400)]
        offsets = np.arange(401)
        expected = splitting.carve(ids, offsets, targets.astype(np.int32), 0.15, 3)
        assert carve(ids, targets, 7, 0.15, 3).tolist() == expected.tolist()

    @pytest.mark.parametrize("task", ["single_label", "multi_label"])
    def test_held_out_rows_stay_when_the_cache_grows_or_is_reordered(self, task: str) -> None:
        rng = np.random.default_rng(2)
        ids = [f"r{row}" for row in range(600)]
        targets = np.arange(600) % 4
        if task == "multi_label":
            targets = (rng.uniform(size=(600, 4)) < 0.3).astype(np.uint8)
        before = carve(ids[:500], targets[:500], 4, 0.2, 0)
        grown = carve(ids, targets, 4, 0.2, 0)
        kept = before & grown[:500]
        assert kept.sum() > 0.85 * before.sum()
        order = rng.permutation(500)
        shuffled = carve([ids[row] for row in order], targets[order], 4, 0.2, 0)
        assert shuffled.tolist() == before[order].tolist()

    def test_a_class_with_one_row_stays_in_training(self) -> None:
        targets = np.asarray([0] * 10 + [1] * 2 + [2])
        mask = carve([f"r{row}" for row in range(13)], targets, 3, 0.5, 0)
        assert [int(mask[targets == c].sum()) for c in range(3)] == [5, 1, 0]


def test_the_winner_is_the_candidate_with_the_best_validation(make_single: CacheMaker) -> None:
    cache = make_single(noise=2.5)
    head = LinearConfig(lrs=(1e-6, 0.05), weight_decays=(0.0,))
    report = train.run(config(cache, head=head))
    assert report.metrics["candidate"] == "lr 0.05, weight decay 0"
    by_candidate = report.metrics["by_candidate"]
    assert max(by_candidate, key=by_candidate.get) == report.metrics["candidate"]
    assert report.metrics["val"]["top1"] == max(by_candidate.values())
    best = max(_curve(report.run), key=lambda line: line["val_top1"])
    assert best["epoch"] == report.metrics["best_epoch"]


def test_patience_ends_a_training_that_no_longer_improves(make_single: CacheMaker) -> None:
    report = train.run(config(make_single(noise=0.1), patience=2, optim=OptimConfig(epochs=30)))
    assert report.metrics["epochs"] == report.metrics["best_epoch"] + 2
    assert report.metrics["epochs"] < 30


def test_a_loss_that_is_not_finite_ends_the_run_with_the_step(
    make_single: CacheMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = Linear.loss, []

    def diverging(self: Linear, *arguments: Any) -> dict[str, torch.Tensor]:
        calls.append(1)
        losses = original(self, *arguments)
        return losses | {"loss": losses["loss"] * (math.nan if len(calls) == 23 else 1)}

    monkeypatch.setattr(Linear, "loss", diverging)
    options = config(make_single())  # 19 steps an epoch
    with pytest.raises(RunError, match="the loss is nan at optimiser step 23"):
        train.run(options)


def test_augmented_views_are_drawn_in_training_only(make_cache: CacheMaker, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 2
    features = np.zeros((60, 2, 3), np.float32)
    features[:, 0, 0] = labels  # only the plain view tells the classes apart
    features[:, 1, 1] = rng.normal(size=60)
    path = make_cache(
        "views",
        features,
        [[label] for label in labels],
        ["train"] * 40 + ["val"] * 20,
        num_classes=2,
        num_views=2,
    )
    cache = open_cache(path)
    table = data.FeatureTable(
        cache.array("image/projected"), cache.rows("train"), torch.device("cpu")
    )
    index = torch.tensor([1, 4])
    assert torch.equal(table.batch(index)[:, 0], torch.tensor([1.0, 0.0]))
    drawn = table.batch(index, torch.tensor([1, 0]))
    torch.testing.assert_close(drawn, torch.from_numpy(features[[1, 4], [1, 0]]))
    assert train.run(config(path)).metrics["val"]["top1"] == 1.0


def test_features_read_from_files_equal_those_in_memory(
    make_single: CacheMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = open_cache(make_single())
    array, rows = cache.array("image/projected"), cache.rows("train")
    memory = data.FeatureTable(array, rows, torch.device("cpu"))
    monkeypatch.setattr(data, "_free_memory", lambda device: 0)
    files = data.FeatureTable(array, rows, torch.device("cpu"))
    assert (memory.held, files.held) == ("device", "files")
    index = torch.tensor([5, 0, 299, 5])
    assert torch.equal(memory.batch(index), files.batch(index))
    assert torch.equal(memory.slice(290, 400), files.slice(290, 400))
    mean, std = files.statistics()
    expected = array.read(rows).astype(np.float64)
    torch.testing.assert_close(mean.double(), torch.from_numpy(expected.mean(0)), rtol=1e-5, atol=0)
    torch.testing.assert_close(std.double(), torch.from_numpy(expected.std(0)), rtol=1e-5, atol=0)


def test_two_trainings_in_one_folder_are_refused(tmp_path: Path) -> None:
    with (
        run_folder.exclusive(tmp_path / "run"),
        pytest.raises(RunError, match="another process is training there"),
        run_folder.exclusive(tmp_path / "run"),
    ):
        pass


def test_a_damaged_run_folder_is_refused(make_single: CacheMaker) -> None:
    run = train.run(config(make_single())).run
    with pytest.raises(RunError, match="no such run folder"):
        load_run(run.parent / "nowhere")
    content = (run / "head.safetensors").read_bytes()
    (run / "head.safetensors").write_bytes(content[:-10])
    with pytest.raises(RunError, match="damaged"):
        load_run(run)
    (run / "metrics.json").unlink()
    with pytest.raises(RunError, match="not complete"):
        load_run(run)
