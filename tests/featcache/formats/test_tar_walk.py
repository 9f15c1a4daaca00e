"""Members of tars: the same as Python's tarfile finds, and one line for every damage."""

import io
import tarfile
from pathlib import Path

import pytest

from featcache.errors import DatasetError
from featcache.formats.tar_walk import Member, TarFile
from featcache.storage import Entry, LocalFolder, StoreUrl

LONG = "a" * 90 + "/" + "b" * 90 + "/" + "ü" * 60


def add(tar: tarfile.TarFile, name: str, size: int, kind: bytes = tarfile.REGTYPE) -> None:
    info = tarfile.TarInfo(name)
    info.size = size
    info.type = kind
    info.linkname = "elsewhere" if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
    tar.addfile(info, io.BytesIO(bytes(range(1, 256)) * (size // 255 + 1)))


def walk(path: Path) -> list[Member]:
    return list(TarFile(LocalFolder(path.parent), path.name).members())


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_of_tarfile(tmp_path: Path, form: int) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=form, pax_headers={"comment": "all"}) as tar:
        add(tar, "folder", 0, tarfile.DIRTYPE)
        add(tar, "folder/first.jpg", 1)
        add(tar, "empty.txt", 0)
        add(tar, "link.jpg", 0, tarfile.SYMTYPE)
        add(tar, "hard.jpg", 0, tarfile.LNKTYPE)
        add(tar, "pipe", 0, tarfile.FIFOTYPE)
        add(tar, "a" * 80 + "/" + "b" * 90, 511)
        if form != tarfile.USTAR_FORMAT:
            add(tar, LONG + ".jpg", 513)
            add(tar, "link" + "c" * 120, 0, tarfile.SYMTYPE)
        add(tar, "日本 x.png", 40_000)
        add(tar, "last", 512)
    with tarfile.open(path) as tar:
        expected = [
            Member(info.name, info.offset_data, info.size)
            for info in tar.getmembers()
            if info.isreg()
        ]
    assert walk(path) == expected


def test_sizes_beyond_octal_are_understood(tmp_path: Path) -> None:
    info = tarfile.TarInfo("big.bin")
    info.size = 9 << 30
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        header = info.tobuf(form)
        (tmp_path / "x.tar").write_bytes(header)
        with (tmp_path / "x.tar").open("r+b") as stream:
            stream.truncate(len(header) + info.size + 1024)  # a hole: takes no room on the disk
        assert walk(tmp_path / "x.tar") == [Member("big.bin", len(header), info.size)]


def test_every_cut_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        add(tar, LONG + ".jpg", 700)
        add(tar, "second.txt", 3)
    whole = path.read_bytes()
    end = len(whole.rstrip(b"\0"))
    for size in range(0, end + 512 - end % 512, 128):
        path.write_bytes(whole[:size])
        with pytest.raises(DatasetError, match=r"x.tar: is cut off") as caught:
            walk(path)
        assert "\n" not in str(caught.value)
    path.write_bytes(whole[: end + 512 - end % 512 + 512])  # one block of the end mark is enough
    assert len(walk(path)) == 2


def test_what_is_no_tar_or_damaged_is_said(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        add(tar, "one.jpg", 600)
        add(tar, "two.jpg", 5)
    good = path.read_bytes()
    for raw, message in {
        b"\x1f\x8b" + bytes(1000): "is compressed; expected a plain tar",
        b"not a tar" * 200: "is no tar: no valid header at byte 0",
        good[:1540] + b"!" + good[1541:]: r"is damaged behind member one.jpg: .* at byte 1536",
    }.items():
        path.write_bytes(raw)
        with pytest.raises(DatasetError, match=message):
            walk(path)
    info = tarfile.TarInfo("holes.bin")
    info.type = tarfile.GNUTYPE_SPARSE
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    with pytest.raises(DatasetError, match=r"member holes.bin is a sparse file"):
        walk(path)
    with pytest.raises(DatasetError, match=r"no.tar: no such tar"):
        TarFile(LocalFolder(tmp_path), "no.tar")


def test_a_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT, encoding="latin-1") as tar:
        add(tar, "é.jpg", 1)
    with pytest.raises(DatasetError, match=r"the name of member \?.jpg is not UTF-8"):
        walk(path)


def test_an_empty_tar_has_no_members(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w"):
        pass
    assert walk(tmp_path / "x.tar") == []


@pytest.mark.parametrize(
    ("size", "count", "most_requests", "largest_share"),
    [(100_000, 300, 8, 1.0), (3_000_000, 12, 13, 0.2)],
)
def test_a_store_is_asked_for_large_pieces_and_not_for_big_images(
    tmp_path: Path, size: int, count: int, most_requests: int, largest_share: float
) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        for number in range(count):
            info = tarfile.TarInfo(f"{number}.jpg")
            info.size = size
            tar.addfile(info, io.BytesIO(bytes(size)))
    pieces: list[int] = []

    class Far(LocalFolder):
        def read_range(self, key: str, start: int, stop: int) -> bytes:
            pieces.append(stop - start)
            return (tmp_path / key).read_bytes()[start:stop]

        def entry(self, key: str) -> Entry:
            return Entry(key, path.stat().st_size, "1")

    folder = Far(tmp_path)
    folder.url = StoreUrl("bucket")  # type: ignore[assignment]
    assert len(list(TarFile(folder, "x.tar").members())) == count
    assert len(pieces) <= most_requests
    assert sum(pieces) <= largest_share * path.stat().st_size + (1 << 20)
