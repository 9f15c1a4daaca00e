"""Arrays come out of a pickle, code does not run."""

import os
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from featcache.formats.safe_pickle import UnsafePickleError, load_plain_pickle


def plain() -> dict[str, Any]:
    return {
        "data": np.arange(12, dtype=np.uint8).reshape(3, 4),
        "frequency": np.asarray([1, 5], np.int64),
        "share": np.float64(0.25),
        "names": ["a.jpg", "ü"],
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)).astype(">f4"),
        "nested": OrderedDict(one=(1, None, True)),
        "raw": b"\x00\xff",
    }


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_and_plain_values_come_back(tmp_path: Path, protocol: int) -> None:
    text = pickle.dumps(plain(), protocol)
    (tmp_path / "a.pkl").write_bytes(text)
    found = load_plain_pickle(tmp_path / "a.pkl")
    for name, value in plain().items():
        np.testing.assert_array_equal(found[name], value)
        assert type(found[name]) is type(value)
        assert getattr(found[name], "dtype", None) == getattr(
            pickle.loads(text)[name], "dtype", None
        )


def test_the_old_name_of_a_numpy_module_is_known(tmp_path: Path) -> None:
    text = pickle.dumps(np.arange(3), 2).replace(b"numpy._core.", b"numpy.core.")
    assert b"numpy.core.multiarray" in text
    (tmp_path / "a.pkl").write_bytes(text)
    assert load_plain_pickle(tmp_path / "a.pkl").tolist() == [0, 1, 2]


def test_python_2_text(tmp_path: Path) -> None:
    text = b"(dp0\nS'caf\\xe9'\np1\nI7\ns."
    (tmp_path / "a.pkl").write_bytes(text)
    assert load_plain_pickle(tmp_path / "a.pkl") == {"café": 7}
    assert load_plain_pickle(tmp_path / "a.pkl", "bytes") == {b"caf\xe9": 7}


class Attack:
    def __init__(self, call: Any, argument: Any) -> None:
        self.call, self.argument = call, argument

    def __reduce__(self) -> Any:
        return self.call, (self.argument,)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_nothing_runs(tmp_path: Path, protocol: int) -> None:
    trace = tmp_path / "trace"
    for call in (os.mkdir, os.system, eval, getattr, np.load):
        (tmp_path / "a.pkl").write_bytes(pickle.dumps([1, Attack(call, str(trace))], protocol))
        with pytest.raises(UnsafePickleError, match=r"a\.pkl: it wants ") as error:
            load_plain_pickle(tmp_path / "a.pkl")
        assert "\n" not in str(error.value)
    assert not trace.exists()


def test_damaged_files_are_named(tmp_path: Path) -> None:
    whole = pickle.dumps(plain())
    for text in (b"", b"\x80", whole[:50], whole[:-1], b"not a pickle", whole.replace(b"u", b"}")):
        (tmp_path / "a.pkl").write_bytes(text)
        with pytest.raises(UnsafePickleError, match=r"a\.pkl") as error:
            load_plain_pickle(tmp_path / "a.pkl")
        assert "\n" not in str(error.value)
    with pytest.raises(UnsafePickleError, match="no such file"):
        load_plain_pickle(tmp_path / "b.pkl")
