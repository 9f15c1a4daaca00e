"""An image's bytes out of a file and out of a tar, marks of its version, reasons when it fails."""

import io
import os
import tarfile
from pathlib import Path

import pytest
import xxhash

from featcache.image_bytes import read_bytes, stamp, tar_member_path


def tar_of(path: Path, members: dict[str, bytes]) -> dict[str, str]:
    """Writes a tar; returns each member's path as rows name it."""
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    with tarfile.open(path) as tar:
        return {
            item.name: tar_member_path(path.name, item.offset_data, item.size, item.name)
            for item in tar.getmembers()
        }


def test_files_and_members_of_tars(tmp_path: Path) -> None:
    members = {"a/b c.jpg": b"first", "x@1+2.tar/y.png": bytes(range(256)) * 9}
    paths = tar_of(tmp_path / "some.tar", members)
    for name, data in members.items():
        assert read_bytes(tmp_path, paths[name]) == data
    (tmp_path / "plain@2.jpg").write_bytes(b"plain")
    assert read_bytes(str(tmp_path), "plain@2.jpg") == b"plain"


def test_what_cannot_be_read_has_a_short_reason(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "some.tar", {"a.jpg": b"x" * 600})["a.jpg"]
    (tmp_path / "folder").mkdir()
    for name, reason in {
        "no.jpg": "missing",
        "no.tar@512+3/a.jpg": "missing",
        "folder": "is a directory",
    }.items():
        with pytest.raises(ValueError, match=f"^{reason}$"):
            read_bytes(tmp_path, name)
    os.truncate(tmp_path / "some.tar", 700)
    with pytest.raises(ValueError, match=r"^the tar ends before this member does$"):
        read_bytes(tmp_path, path)


def test_the_stamp_of_a_file_is_the_hash_of_its_size_and_time(tmp_path: Path) -> None:
    names = ["a.jpg", "a b/c@2.jpg", "x.tar@1/y.jpg", "some.arrow@z/image"]
    for number, name in enumerate(names):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"x" * number)
        status = file.stat()
        expected = xxhash.xxh3_64_intdigest(f"{status.st_size} {status.st_mtime_ns}".encode())
        for root, path in ((tmp_path, name), (str(tmp_path), name), ("elsewhere", str(file))):
            assert stamp(root, path) == expected
    assert stamp(tmp_path, "a.jpg/b.jpg") == 0


def test_stamping_a_file_makes_no_path_objects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They take more time than everything else of it."""
    (tmp_path / "a.jpg").write_bytes(b"x")
    expected = stamp(tmp_path, "a.jpg")
    monkeypatch.setattr("featcache.image_bytes.Path", None)
    monkeypatch.setattr("featcache.image_bytes.CONTAINERS", None)
    assert stamp(tmp_path, "a.jpg") == expected != 0


def test_stamps_change_with_the_file_and_differ_inside_a_tar(tmp_path: Path) -> None:
    paths = tar_of(tmp_path / "some.tar", {"a.jpg": b"one", "b.jpg": b"one"})
    first, second = (stamp(tmp_path, path) for path in paths.values())
    assert first != second
    assert (first, second) == tuple(stamp(tmp_path, path) for path in paths.values())
    os.utime(tmp_path / "some.tar", ns=(1, 1))
    assert stamp(tmp_path, paths["a.jpg"]) not in (first, 0)
    assert stamp(tmp_path, "no.jpg") == stamp(tmp_path, "no.tar@0+1/a") == 0
    (tmp_path / "a.jpg").write_bytes(b"one")
    before = stamp(tmp_path, "a.jpg")
    (tmp_path / "a.jpg").write_bytes(b"longer")
    assert stamp(tmp_path, "a.jpg") not in (before, 0)
