"""Verification: any flipped byte in any file is found and the file is named."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from featcache.errors import CacheCorruptError, CacheError
from featcache.layout.chunks import read_sealed, sealed, write_chunk
from featcache.reader import open_cache
from featcache.store import Store, verify
from featcache.verify import VerifyConfig, run

Make = Callable[..., Any]


def flip(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1 << random.Random(position).randrange(8)
    file.write_bytes(content)


def test_a_flipped_bit_in_any_file_is_found_and_named(written: Make) -> None:
    made = written(captions=1)
    Store.open(made.path).put_array("class_text/x", np.ones((2, 3, 4), np.float32))
    assert verify(made.path) == []
    files = sorted(file for file in made.path.rglob("*") if file.is_file())
    assert len(files) > 50
    for file in files:
        original = file.read_bytes()
        last = len(original) - 1
        for position in {0, last, random.Random(file.name).randrange(len(original))}:
            flip(file, position)
            problems = verify(made.path)
            assert len(problems) == 1, (file, position, problems)
            assert str(file) in problems[0]
            file.write_bytes(original)
    assert verify(made.path) == []


@pytest.mark.parametrize("change", [b"", b"\n"])
def test_cut_off_and_grown_files_are_found(written: Make, change: bytes) -> None:
    made = written()
    for name in ("image/projected/c/1/0", "rows/id/c/0", "shards/image/c/2", "rows/valid/c/0"):
        file = made.path / name
        original = file.read_bytes()
        file.write_bytes(original + change if change else original[:-1])
        assert [str(file) in problem for problem in verify(made.path)] == [True]
        file.write_bytes(b"")
        assert [str(file) in problem for problem in verify(made.path)] == [True]
        file.write_bytes(original)


@pytest.mark.parametrize(
    "name", ["image/projected/c/1/0", "rows/path/c/0", "shards/image/c/0", "classes/count/c/0"]
)
def test_a_missing_chunk_is_found(written: Make, name: str) -> None:
    made = written()
    (made.path / name).unlink()
    assert verify(made.path) == [f"{made.path / name}: missing"]


@pytest.mark.parametrize("name", ["image/projected", "rows/id", "shards/image", "image"])
def test_missing_metadata_are_found(written: Make, name: str) -> None:
    made = written()
    (made.path / name / "zarr.json").unlink()
    assert any(str(made.path / name) in problem for problem in verify(made.path))


def test_the_other_arrays_are_checked_behind_damaged_root_metadata(written: Make) -> None:
    made = written()
    flip(made.path / "zarr.json", 30)
    flip(made.path / "image/projected/c/0/0", 3)
    problems = verify(made.path)
    assert len(problems) == 2
    assert "image/projected/c/0/0: checksum" in problems[1]


def test_an_unfinished_cache_without_damage_is_fine(written: Make, planned: Make) -> None:
    made = written()
    store = Store.open(made.path, write=True)
    store.update_attributes(complete=False)
    (made.path / "shards/image/c/1").unlink()
    (made.path / "image/projected/c/2/0").unlink()
    assert verify(made.path) == []
    (made.path / "image/projected/c/0/0").unlink()
    assert verify(made.path) == [f"{made.path / 'image/projected/c/0/0'}: missing"]


def test_foreign_files_are_listed(written: Make) -> None:
    made = written()
    (made.path / "image/projected/c/9").mkdir()
    extra = made.path / "image/projected/c/9/0"
    extra.write_bytes(b"x" * 52)
    assert verify(made.path) == [f"{extra}: foreign file"]


def test_sound_tables_of_another_dataset_are_found(written: Make) -> None:
    made = written()
    files = Store.open(made.path).files("rows/path")
    content = files.file(0).read_bytes()[:-4].replace(b"/3.jpg", b"/4.jpg")
    files.file(0).unlink()
    write_chunk(files.file(0), content, checksummed=True)
    assert verify(made.path) == [
        f"{made.path / 'rows'}: ids, paths or splits are not those of the identity"
    ]


def test_metadata_moved_from_another_array_are_found(written: Make) -> None:
    made = written()
    name = "rows/label_offsets"
    raw = sealed(name, read_sealed(made.path, name))
    (made.path / "text/offsets/zarr.json").write_bytes(raw)
    problems = verify(made.path)
    assert len(problems) == 1
    assert "text/offsets/zarr.json: changed" in problems[0]


def test_the_job_prints_a_line_an_array_and_fails_with_a_line_a_file(
    written: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    made = written()
    report = run(VerifyConfig(cache=made.path))
    out = capsys.readouterr().out
    assert "OK  image/projected  260 B\n" in out
    assert report.arrays["image/projected"] == 5 * (4 * 12 + 4)
    flip(made.path / "image/projected/c/0/0", 5)
    flip(made.path / "rows/split/c/0", 9)
    with pytest.raises(CacheCorruptError) as caught:
        run(VerifyConfig(cache=made.path))
    assert len(str(caught.value).splitlines()) == 2
    with pytest.raises(CacheError, match="no such cache"):
        run(VerifyConfig(cache=made.path / "nothing"))


@pytest.mark.parametrize("chunk_rows", [4, 2048])
def test_reading_refuses_damaged_bytes_and_names_the_file(written: Make, chunk_rows: int) -> None:
    made = written(num_rows=2 * chunk_rows, chunk_rows=chunk_rows, shard_rows=chunk_rows)
    flip(made.path / "image/projected/c/1/0", 7)
    cache = open_cache(made.path)
    with pytest.raises(CacheCorruptError, match=r"image/projected/c/1/0: checksum .* restore"):
        cache.array("image/projected")
    flip(made.path / "rows/id/c/0", 7)
    with pytest.raises(CacheCorruptError, match="rows/id/c/0"):
        _ = cache.ids


@pytest.mark.parametrize("content", [None, b"", b"short"])
@pytest.mark.parametrize("chunk_rows", [4, 2048])
def test_even_unverified_reading_refuses_a_file_of_the_wrong_size(
    written: Make, chunk_rows: int, content: bytes | None
) -> None:
    made = written(num_rows=2 * chunk_rows, chunk_rows=chunk_rows, shard_rows=chunk_rows)
    file = made.path / "image/projected/c/1/0"
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(CacheCorruptError, match="image/projected/c/1/0"):
        open_cache(made.path, verify=False).array("image/projected")
