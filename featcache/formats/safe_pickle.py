"""Other people's pickle files: arrays, numbers, text and containers, and nothing executable.

A pickle may call any function on loading. Here only the handful that rebuild numpy arrays are
known; every other name stops with one line that says which.
"""

import pickle
from pathlib import Path
from typing import Any

from featcache.errors import UserError


class UnsafePickleError(UserError, ValueError):
    """A pickle file wants something else than arrays and plain values, or is damaged."""


_ALLOWED = {
    ("_codecs", "encode"),  # how protocols below 3 spell bytes
    ("collections", "OrderedDict"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    *(
        (f"numpy.{core}.{module}", name)
        for core in ("core", "_core")  # numpy renamed it in version 2
        for module, name in (
            ("multiarray", "_reconstruct"),
            ("multiarray", "scalar"),
            ("numeric", "_frombuffer"),
        )
    ),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise UnsafePickleError(f"it wants {module}.{name}")
        if module.startswith("numpy.core."):  # the old name warns
            module = "numpy._core." + module.removeprefix("numpy.core.")
        return super().find_class(module, name)

    def persistent_load(self, pid: Any) -> Any:
        raise UnsafePickleError("it refers to objects outside the file")


def load_plain_pickle(file: Path, encoding: str = "latin1") -> Any:
    """What a pickle file holds, as long as that is arrays, numbers, text and containers of them.

    Args:
        file: the file.
        encoding: of text that Python 2 wrote; "bytes" leaves it as bytes.

    Raises:
        UnsafePickleError: one line: no such file, damaged, or it holds something else.
    """
    try:
        with file.open("rb") as stream:
            return _Unpickler(stream, encoding=encoding).load()
    except FileNotFoundError:
        raise UnsafePickleError(f"{file}: no such file; expected a pickle file") from None
    except UnsafePickleError as error:
        raise UnsafePickleError(
            f"{file}: {error}; only arrays, numbers, text and containers are read, because a "
            "pickle can run any code; save it as .npz or JSON where it comes from"
        ) from None
    # A damaged stream can fail in as many ways as there are opcodes.
    except (
        pickle.UnpicklingError,
        EOFError,
        ValueError,
        TypeError,
        KeyError,
        IndexError,
        AttributeError,
        MemoryError,
        OverflowError,
    ) as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UnsafePickleError(f"{file}: not a readable pickle file ({text})") from None
