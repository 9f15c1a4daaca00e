"""A result appears in one piece; an interrupted one stays and is found again."""

from pathlib import Path

import pytest

from featcache.errors import ConfigError
from finetune.output import is_finished, resumable
from heads.run_folder import RunError

RUN = {"config": {"steps": 3}}


def _broken(out: Path, name: str, error: BaseException) -> None:
    """A run that writes a file and ends with `error`."""
    with resumable(out, RUN, False) as folder:
        (folder / name).write_text("state")
        raise error


def test_an_interrupted_run_is_found_again_and_ends_as_the_result(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="broken"):
        _broken(out, "history.jsonl", ValueError("broken"))
    assert list(tmp_path.iterdir()) == []  # no state was saved: nothing to go on from

    with pytest.raises(KeyboardInterrupt):
        _broken(out, "last.safetensors", KeyboardInterrupt())
    assert not is_finished(out, RUN, False)
    with (
        pytest.raises(ConfigError, match=r"out\.partial holds an interrupted run with config\.st"),
        resumable(out, {"config": {"steps": 4}}, False),
    ):
        pass
    with resumable(out, RUN, False) as folder:
        assert (folder / "last.safetensors").read_text() == "state"
        with pytest.raises(RunError, match="another process"), resumable(out, RUN, False):
            pass
    assert is_finished(out, RUN, False)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not (out / ".lock").exists()
    with pytest.raises(RunError, match="just finished"), resumable(out, RUN, False):
        pass

    with resumable(out, {"config": {"steps": 4}}, True) as folder:
        assert not (folder / "last.safetensors").exists()
    with pytest.raises(ConfigError, match=r"out holds a result with config\.steps = 4"):
        is_finished(out, RUN, False)


def test_a_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").write_text("precious")
    with pytest.raises(ConfigError, match="in the way"), resumable(tmp_path / "out", RUN, True):
        pass
    assert (tmp_path / "out.partial" / "thesis.txt").read_text() == "precious"
