"""Killed and resumed equals uninterrupted bit for bit; two processes equal one."""

import json
import os
import signal
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import load_file

from featcache.errors import ConfigError
from finetune.contrastive import checkpoints as pretrain_checkpoint
from finetune.contrastive.checkpoints import checkpoints
from finetune.pretrain import PretrainConfig, run

from ..together import meeting_place
from ..warm import WarmProcess
from .toy_pretraining import toy_config, write_toy

# Dies while its fourth checkpoint is half on disk.
KILLED = """
import os, signal, sys
from finetune import pretrain
from finetune.contrastive import checkpoints as pretrain_checkpoint
save, calls = pretrain_checkpoint.save_state, []
def dies(*inputs, **options):
    calls.append(1)
    if len(calls) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    save(*inputs, **options)
pretrain_checkpoint.save_state = dies
pretrain.run(pretrain.PretrainConfig.from_yaml(sys.argv[1]))
"""


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy(tmp_path_factory.mktemp("toy"))


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "open_clip_model.safetensors")


def _losses(folder: Path) -> list[tuple[int, float]]:
    lines = (folder / "history.jsonl").read_text().splitlines()
    return [(entry["step"], entry["loss"]) for entry in map(json.loads, lines)]


def _written(config: PretrainConfig, file: Path) -> str:
    file.write_text(config.to_yaml())
    return str(file)


def test_killed_and_resumed_equals_uninterrupted(toy: Path, tmp_path: Path) -> None:
    """With batch normalisation, captions and crops drawn, and a step count that cuts epochs."""
    options = {"architecture": str(toy / "rn.json"), "steps": 18, "save_every": 3, "log_every": 5}
    config = toy_config(toy, out=str(tmp_path / "killed"), **options)
    one_thread = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    killed = WarmProcess("-c", KILLED, _written(config, tmp_path / "killed.yaml"), env=one_thread)
    _, errors, status = killed.wait()
    assert status == -signal.SIGKILL, errors
    assert not config.out.exists()
    left = tmp_path / "killed.partial"
    assert [path.name for path in checkpoints(left)] == ["checkpoint_2_6", "checkpoint_3_9"]
    assert list(left.glob(".checkpoint_*"))  # the half-written one

    with pytest.raises(ConfigError, match=r"interrupted run with config\.seed = 0, this run has 1"):
        run(config.model_copy(update={"seed": 1}))
    report = run(config)
    whole = run(toy_config(toy, out=str(tmp_path / "whole"), **options))
    resumed, expected = _weights(config.out), _weights(whole.folder)
    assert resumed.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(resumed[name], tensor), name
    assert _losses(config.out) == _losses(whole.folder)
    assert report.metrics["validation"] == whole.metrics["validation"]
    assert not list(config.out.glob(".*"))

    kept = checkpoints(config.out)
    assert [path.name for path in kept] == ["checkpoint_4_15", "checkpoint_5_18"]
    for path, other in zip(kept, checkpoints(whole.folder), strict=True):
        assert open_clip.create_model(f"local-dir:{path}").visual is not None
        for name, tensor in _weights(path).items():
            assert torch.equal(tensor, _weights(other)[name]), name
    for name, tensor in _weights(kept[-1]).items():
        assert torch.equal(tensor, expected[name]), name


def test_an_interruption_anywhere_changes_nothing(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float16 with a scaled loss and in pieces, on what an earlier piece of a log line left."""
    options = {"steps": 9, "log_every": 4, "precision": "fp16", "accumulate": 2, "save_every": 1}
    whole = run(toy_config(toy, out=str(tmp_path / "whole"), **options))
    config = toy_config(toy, out=str(tmp_path / "out"), **options)
    save = pretrain_checkpoint.save_state
    for stop in (1, 3, 4):  # after as many further checkpoints
        calls = iter(range(100))

        def dies(*inputs: object, calls=calls, stop=stop, **given: object) -> None:
            if next(calls) == stop:
                raise KeyboardInterrupt
            save(*inputs, **given)  # type: ignore[arg-type]

        monkeypatch.setattr(pretrain_checkpoint, "save_state", dies)
        with pytest.raises(KeyboardInterrupt):
            run(config)
    monkeypatch.setattr(pretrain_checkpoint, "save_state", save)
    run(config)
    for name, tensor in _weights(whole.folder).items():
        assert torch.equal(_weights(config.out)[name], tensor), name
    assert _losses(config.out) == _losses(whole.folder)


def test_two_processes_train_as_one(
    toy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # AdamW's first steps are signs of the gradient, also where that is rounding: a larger epsilon.
    optim = {"lr": 1e-3, "eps": 1e-4}
    options = {"steps": 6, "log_every": 1, "accumulate": 2, "save_every": 4, "optim": optim}
    config = toy_config(toy, out=str(tmp_path / "two"), **options)
    shared = meeting_place(2)
    job = ["-m", "finetune.pretrain", "--config", _written(config, tmp_path / "two.yaml")]
    environment = {**os.environ, **shared, "RANK": "1", "LOCAL_RANK": "1"}
    other = WarmProcess(*job, env=environment)
    with monkeypatch.context() as here:  # this process is the first one: one to start less
        for name, value in {**shared, "RANK": "0", "LOCAL_RANK": "0"}.items():
            here.setenv(name, value)
        run(config)
    assert "cpu × 2 processes" in capsys.readouterr().out
    assert other.wait() == ("", "", 0)
    alone = run(toy_config(toy, out=str(tmp_path / "one"), **options))
    for (step, one), (_, other) in zip(_losses(alone.folder), _losses(config.out), strict=True):
        assert one == pytest.approx(other, abs=1e-6), step
    for name, tensor in _weights(alone.folder).items():
        torch.testing.assert_close(_weights(config.out)[name], tensor, atol=1e-5, rtol=1e-4)
    assert [path.name for path in checkpoints(config.out)] == ["checkpoint_1_4", "checkpoint_2_6"]
