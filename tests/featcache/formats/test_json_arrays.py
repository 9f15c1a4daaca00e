"""Piecewise JSON: what `json.loads` gives, from windows of any size, and one line for a mistake."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from featcache.errors import DatasetError
from featcache.formats import json_arrays
from featcache.formats.json_arrays import read_arrays

COLUMNS = {"id": pa.int64(), "name": pa.large_string()}
DOCUMENT = {
    "info": {"a": [1, {"b": "]}"}], "c": None},
    "version": 12,
    "images": [
        {"id": 3, "name": 'quote " brace }, { back\\slash', "more": [[], {"x": {}}]},
        {"name": "Ünïcode 日本 🌱", "id": -7, "width": 1.5e3},
        {"id": 9007199254740993, "name": ""},
    ],
    "empty": [],
    "numbers": [1, 23, 456],
    "images2": [{"id": 0, "name": "other"}],
}


def one_line(error: pytest.ExceptionInfo[DatasetError], file: Path) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert str(file) in text
    return text


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 64, 1 << 20])
@pytest.mark.parametrize(
    "options",
    [{}, {"indent": 1}, {"ensure_ascii": False, "separators": (",", ":")}],
    ids=["plain", "indented", "dense"],
)
def test_equals_loading_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int, options: dict[str, Any]
) -> None:
    file = tmp_path / "a.json"
    file.write_text(json.dumps(DOCUMENT, **options), encoding="utf-8")
    monkeypatch.setattr(json_arrays, "_PIECE", piece)
    monkeypatch.setattr(json_arrays, "_BATCH", 2)
    arrays = {"images": COLUMNS, "empty": COLUMNS, "numbers": None, "absent": COLUMNS}
    found = read_arrays(file, arrays)
    assert set(found) == {"images", "empty", "numbers"}
    wanted = json.loads(file.read_text(encoding="utf-8"))["images"]
    assert found["images"].to_pylist() == [{k: one[k] for k in COLUMNS} for one in wanted]
    assert found["empty"].num_rows == 0
    assert found["numbers"] == [1, 23, 456]


@pytest.mark.parametrize("text", ["[]", " [ ] \r\n", "{}", '\ufeff{"x": []}'])
def test_nothing_in_it(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_bytes(text.encode())
    assert read_arrays(tmp_path / "a.json", {"": None}) == (
        {"": []} if "[ " in text or text == "[]" else {}
    )


def test_a_bare_list(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"id": 1, "name": "x"}]\n')
    assert read_arrays(tmp_path / "a.json", {"": None})[""] == [{"id": 1, "name": "x"}]
    assert read_arrays(tmp_path / "a.json", {"": COLUMNS})[""].to_pylist()[0]["name"] == "x"


def test_a_file_cut_off_anywhere_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_arrays, "_PIECE", 16)
    text = json.dumps(DOCUMENT)
    file = tmp_path / "a.json"
    for length in range(len(text)):
        file.write_text(text[:length])
        with pytest.raises(DatasetError) as error:
            read_arrays(file, {"images": COLUMNS})
        one_line(error, file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"images": [{"id": 1, "name": "a"}, {"id": "2", "name": "b"}]}',
            "element 1 of 'images' has id \"2\"; expected a whole",
        ),
        ('{"images": [{"id": 1.5, "name": "a"}]}', "has id 1.5; expected a whole number"),
        ('{"images": [{"id": 1, "name": null}]}', "has name null; expected text"),
        ('{"images": [{"id": 1, "name": 5}]}', "has name 5; expected text"),
        ('{"images": [{"id": 1}]}', "element 0 of 'images' has no 'name'; found id"),
        ('{"images": [{"id": 1, "name": "\\ud800"}]}', "has name .*; expected text"),
        (
            '{"images": [{"id": 9007199254740993, "name": "a"}, {"id": 1.0, "name": "a"}]}',
            "elements 0 to 1 of 'images' have id of different types",
        ),
        ('{"images": [7]}', "element 0 of 'images' is 7; expected an object"),
        ('{"images": [{"id": 1 "name": "a"}]}', "delimiter"),
        ('{"images": [{"id": 1, "name": "a"} {}]}', "expected a comma"),
        ('{"images": [{"id": 1, "name": "a"},]}', "Expecting value"),
        ('{"images": []} x', "text after the end"),
        ("{images: []}", "Expecting value in a name"),
        ('{"images" []}', 'expected "name": value'),
        ("12", "expected a JSON object or array"),
        (" ", "the file is empty"),
    ],
)
def test_mistakes(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "a.json"
    file.write_text(text + " " * 40)
    with pytest.raises(DatasetError, match=message) as error:
        read_arrays(file, {"images": COLUMNS})
    one_line(error, file)


def test_not_text_or_not_there(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no such file"):
        read_arrays(tmp_path / "none.json", {})
    (tmp_path / "a.json").write_bytes(b'{"images": ["\xff"]}')
    with pytest.raises(DatasetError, match="not UTF-8") as error:
        read_arrays(tmp_path / "a.json", {"images": None})
    one_line(error, tmp_path)


def test_a_mistake_early_on_does_not_read_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_arrays, "_PIECE", 100)
    file = tmp_path / "a.json"
    file.write_text('{"images": [{"id" 1}' + "x" * 5000)
    reader = json_arrays._Reader(file, stream := file.open(encoding="utf-8"))
    with stream, pytest.raises(DatasetError, match="delimiter"):
        list(reader.arrays())
    assert reader._before + len(reader._text) < 1000
