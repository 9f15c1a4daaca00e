"""Exports: the same numbers in other formats, whole files only."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from featcache import export
from featcache.errors import CacheError, ConfigError
from featcache.export import ExportConfig, run
from featcache.reader import open_cache

Make = Callable[..., Any]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "BLOCK_BYTES", 6 * 12)  # 6 rows of 6 float16


def test_parquet_has_a_row_an_image(written: Make) -> None:
    made = written(captions=2)
    cache = open_cache(made.path)
    file = cache.to_parquet(made.path.with_name("out.parquet"))
    table = pd.read_parquet(file)
    assert table["id"].tolist() == cache.ids
    assert table["path"].tolist() == cache.paths
    assert table["split"].tolist() == cache.splits
    assert table["label"].fillna("?").tolist()[:5] == ["oak", "?", "日本", "oak", "elm"]
    assert list(table["captions"][3]) == ["caption 3-0", "caption 3-1"]
    valid = table["projected"].notna().to_numpy()
    np.testing.assert_array_equal(valid, made.arrays["rows/valid"])
    np.testing.assert_array_equal(
        np.stack(table["projected"][valid].tolist()), made.arrays["image/projected"][valid]
    )
    read = pq.ParquetFile(file)
    assert read.metadata.num_row_groups == 4
    assert read.schema_arrow.metadata[b"fingerprint"].decode() == cache.fingerprint
    assert read.schema_arrow.field("projected").type.list_size == 6
    assert str(read.schema_arrow.field("projected").type.value_type) == "halffloat"


def test_parquet_of_several_labels_and_views(written: Make) -> None:
    made = written(task="multi_label", views=2)
    file = open_cache(made.path).to_parquet(made.path.with_name("out.parquet"))
    table = pq.read_table(file)
    assert table.column("labels")[6].as_py() == ["elm", "日本"]
    assert table.column("labels")[8].as_py() == []
    assert table.schema.field("projected").metadata == {b"shape": b"[2, 6]"}
    row = np.asarray(table.column("projected")[9].as_py(), np.float16).reshape(2, 6)
    np.testing.assert_array_equal(row, made.arrays["image/projected"][9])
    assert "captions" not in table.column_names


def test_numpy_has_a_file_an_array_and_tables(written: Make) -> None:
    made = written(captions=1)
    cache = open_cache(made.path)
    folder = cache.to_numpy(made.path.with_name("out"))
    for name in ("image/projected", "text/projected"):
        values = np.load(folder / f"{name.replace('/', '.')}.npy")
        np.testing.assert_array_equal(values, made.arrays[name])
    rows = pd.read_parquet(folder / "rows.parquet")
    assert rows["id"].tolist() == cache.ids
    assert rows["valid"].tolist() == made.arrays["rows/valid"].tolist()
    captions = pd.read_parquet(folder / "captions.parquet")
    assert captions["caption"].tolist() == cache.captions[1]
    assert captions["row"].tolist() == list(range(20))
    classes = pd.read_parquet(folder / "classes.parquet")
    assert classes["name"].tolist() == ["oak", "elm", "日本"]
    assert json.loads((folder / "cache.json").read_text())["fingerprint"] == cache.fingerprint


@pytest.mark.parametrize("form", ["numpy", "parquet"])
def test_the_job_writes_what_is_chosen_and_overwrites_nothing(
    written: Make, form: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    made = written()
    out = made.path.with_name("deep") / "out"
    config = ExportConfig(cache=made.path, format=form, out=out, arrays=("image/projected",))
    assert run(config) == out
    printed = capsys.readouterr().out.splitlines()
    assert [" ".join(line.split()) for line in printed] == [
        "image/projected 20 rows of 6",
        str(out),
    ]
    with pytest.raises(CacheError, match="out: exists already; delete it or choose another --out"):
        run(config)
    other = config.model_copy(update={"out": out.with_name("two"), "arrays": ("image/tokens",)})
    with pytest.raises(CacheError, match="no array 'image/tokens'"):
        run(other)
    assert not other.out.exists()


def test_a_failed_export_leaves_nothing(written: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    made = written(captions=1)
    cache = open_cache(made.path)

    def stop(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "_row_table", stop)
    for write in (cache.to_parquet, cache.to_numpy):
        with pytest.raises(KeyboardInterrupt):
            write(made.path.with_name("out"))
    assert [path.name for path in made.path.parent.iterdir()] == ["cache"]


def test_parquet_takes_only_arrays_with_a_row_an_image(written: Make) -> None:
    made = written(captions=2)
    with pytest.raises(ConfigError, match="text/projected has 40 rows, not one for each of the 20"):
        export.to_parquet(
            open_cache(made.path), made.path.with_name("out"), arrays=("text/projected",)
        )
