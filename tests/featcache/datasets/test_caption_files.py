"""Captions of image files, out of tables and lists."""

from pathlib import Path

import pandas as pd
import pytest

from featcache.datasets.caption_files import captions_of
from featcache.errors import DatasetError

WANTED = {"b.jpg": ["one", "two, three"], "sub/a 1.jpg": ["four"]}
ROWS = [("sub/a 1.jpg", "four"), ("x.jpg", "no"), ("b.jpg", "one"), ("b.jpg", "two, three")]


def write(folder: Path, suffix: str, order: list[int]) -> Path:
    """The rows in some order, as a file of that kind."""
    file = folder / f"captions{suffix}"
    rows = [ROWS[place] for place in order]
    if suffix == ".txt":
        file.write_text("".join(f"{path} {text}\n" for path, text in rows))
    elif suffix == ".parquet":
        pd.DataFrame(rows, columns=["path", "caption"]).to_parquet(file)
    else:
        separator = "\t" if suffix == ".tsv" else ","
        pd.DataFrame(rows, columns=["path", "caption"]).to_csv(file, index=False, sep=separator)
    return file


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet", ".txt"])
@pytest.mark.parametrize("order", [[0, 1, 2, 3], [2, 0, 3, 1]])
def test_f49_captions_meet_images_by_path_and_not_by_position(
    tmp_path: Path, suffix: str, order: list[int]
) -> None:
    file = write(tmp_path, suffix, order)
    assert captions_of(file, {"z.jpg", "b.jpg", "sub/a 1.jpg"}) == WANTED


def test_a_cell_may_hold_several_captions_or_none(tmp_path: Path) -> None:
    file = tmp_path / "c.csv"
    file.write_text('path,captions\na.jpg,"[""one"", ""two""]"\nb.jpg,\nc.jpg,[]\n')
    assert captions_of(file, {"a.jpg", "b.jpg", "c.jpg"}) == {"a.jpg": ["one", "two"]}


def test_what_is_wrong_with_a_file_is_said_in_a_line(tmp_path: Path) -> None:
    file = write(tmp_path, ".csv", [0, 1])
    with pytest.raises(DatasetError, match=r"no caption is of one of the 1 images, its first row"):
        captions_of(file, {"nothing.jpg"})
    with pytest.raises(DatasetError, match="no such file"):
        captions_of(tmp_path / "no.csv", {"a.jpg"})
    file.write_text("file,text\na.jpg,one\n")
    with pytest.raises(DatasetError, match="expected columns path and caption, found file, text"):
        captions_of(file, {"a.jpg"})
