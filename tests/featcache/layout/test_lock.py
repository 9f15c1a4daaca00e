"""Sweeping what killed writers left: nobody else's files, and nothing stops it."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from featcache.layout.lock import sweep, writer_lock


@pytest.mark.parametrize("name", ["cache[1]", "cache*", "c?che", "plain"])
def test_a_name_with_signs_of_patterns_means_itself(tmp_path: Path, name: str) -> None:
    own = tmp_path / f"{name}.partial-00ff"
    others = [tmp_path / f"{other}.partial-00ff" for other in ("cache1", "cache-b", "cxche")]
    for folder in (own, *others):
        folder.mkdir()
    with writer_lock(tmp_path / name):
        assert not own.exists()
        assert all(folder.exists() for folder in others)


def test_what_vanishes_or_cannot_be_deleted_stops_no_writer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    for folder in ("a", "b", "vanished"):
        (cache / folder).mkdir(parents=True)
        (cache / folder / "0.12.partial").write_bytes(b"half")
        (cache / folder / "0").write_bytes(b"whole")
    (tmp_path / "cache.partial-00ff").mkdir()
    (tmp_path / "cache.partial-00ff" / ".nfs0001").write_bytes(b"open elsewhere")
    unlink, scandir = os.unlink, os.scandir

    def busy(path: Any, **options: Any) -> None:
        if str(path).endswith(".nfs0001") or Path(str(path)).parent.name == "a":
            raise OSError(errno.EBUSY, "Device or resource busy", str(path))
        unlink(path, **options)

    def gone(path: Any = ".") -> Any:
        if isinstance(path, str | Path) and Path(path) == cache / "vanished":
            Path(path).rename(tmp_path / "away")
        return scandir(path)

    monkeypatch.setattr(os, "unlink", busy)
    monkeypatch.setattr(os, "scandir", gone)
    sweep(cache)
    assert not (cache / "vanished").exists()
    assert sorted(file.name for file in (cache / "b").iterdir()) == ["0"]
    assert (cache / "a" / "0.12.partial").exists()
