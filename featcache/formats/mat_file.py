"""Arrays of MATLAB files, as several older image sets keep their labels."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from featcache.errors import DatasetError


def read_mat(file: Path, names: Sequence[str]) -> list[Any]:
    """The variables of a .mat file (version 7 or older), dimensions of length one dropped.

    Raises:
        DatasetError: no such file, another format, or a variable that is not there.
    """
    from scipy.io import loadmat  # takes a while, and few datasets need it

    if not file.is_file():
        raise DatasetError(f"{file}: no such file; expected a MATLAB file with {', '.join(names)}")
    try:
        found = loadmat(file, squeeze_me=True)
    # A damaged file fails in as many ways as there are record types.
    except (
        ValueError,
        TypeError,
        KeyError,
        IndexError,
        OSError,
        EOFError,
        NotImplementedError,
        MemoryError,
    ) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DatasetError(f"{file}: not a readable MATLAB file ({reason})") from None
    for name in names:
        if name not in found:
            have = ", ".join(key for key in found if not key.startswith("__")) or "nothing"
            raise DatasetError(f"{file}: no variable {name!r}; found {have}")
    return [found[name] for name in names]
