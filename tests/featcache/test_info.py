"""Info: what a cache holds, finished or not, as text and as JSON."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from featcache import info
from featcache.errors import CacheError
from featcache.info import InfoConfig, describe, run
from featcache.reader import open_cache
from featcache.store import create

Make = Callable[..., Any]


def test_text_names_everything(written: Make, capsys: pytest.CaptureFixture[str]) -> None:
    made = written(captions=2)
    run(InfoConfig(cache=made.path))
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        f"cache {made.path} (complete)",
        f"fingerprint {made.plan.identity.fingerprint()}",
        "dataset folder, single_label, 20 rows, 3 classes, 40 captions",
        f"backbone open_clip tiny, fp32, weights {'w' * 32}",
        "pixels 32x32, fast mode",
        "shards 3 of 3 image, 5 of 5 text",
        "features",
        "image/projected 20 x 6 float16, 240 B",
        "text/projected 40 x 6 float16, 480 B",
        "splits",
        "train 15 rows, 13 valid, 2 unreadable, 14 labels (0.93 a row), 30 captions (2.00 a row)",
        "val 5 rows, 4 valid, 1 unreadable, 5 labels (1.00 a row), 10 captions (2.00 a row)",
        "classes 3: 0 head, 0 medium, 3 tail (>=100 / 20..99 / <20 training images)",
        "oak 5 tail",
        "日本 5 tail",
        "elm 4 tail",
        "unreadable 3 truncated",
        "é/5.jpg: truncated",
        "é/12.jpg: truncated",
        "é/19.jpg: truncated",
    ]


def test_json_of_an_unfinished_cache(planned: Make, capsys: pytest.CaptureFixture[str]) -> None:
    made = planned()
    store = create(made.path, made.plan)
    shard = store.pending()[0]
    made.write(store, shard)
    store.mark_done(shard, {"invalid": [{"row": 5, "path": "é/5.jpg", "reason": "truncated"}]})
    run(InfoConfig(cache=made.path, json=True))
    found = json.loads(capsys.readouterr().out)
    assert found["complete"] is False
    assert found["shards"] == {"image": {"done": 1, "total": 3}, "text": {"done": 0, "total": 0}}
    labels = {"labels": 14, "classes": 3, "captions": 0}
    assert found["splits"]["train"] == {"rows": 15, "valid": 7, "invalid": 1, **labels}
    labels = {"labels": 5, "classes": 3, "captions": 0}
    assert found["splits"]["val"] == {"rows": 5, "valid": 0, "invalid": 0, **labels}
    assert found["classes"][1] == {"name": "elm", "train_images": 4, "group": "tail"}
    assert found["invalid_reasons"] == {"truncated": 1}
    assert found["invalid"] == [{"row": 5, "path": "é/5.jpg", "reason": "truncated"}]
    assert found["num_invalid"] == 1
    assert found["identity"] == made.plan.identity.record()
    assert found["arrays"]["image/projected"]["shape"] == [20, 6]


def test_only_the_first_reasons_are_shown(
    written: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    made = written(num_rows=100)
    run(InfoConfig(cache=made.path))
    lines = capsys.readouterr().out.splitlines()
    assert sum(".jpg: truncated" in line for line in lines) == 5
    assert lines[-1].strip() == "and 9 more; --json lists them all"


def test_the_largest_and_smallest_classes_are_listed(
    written: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    made = written()
    found = run(InfoConfig(cache=made.path, json=True))
    capsys.readouterr()
    counts = [5, 900, 30, 0, 100, 20]
    found["num_classes"] = 6
    found["groups"] = {"head": 2, "medium": 2, "tail": 2}
    found["groups_from"] = "dataset"
    found["classes"] = [
        {"name": f"c{i}", "train_images": count, "group": "tail"} for i, count in enumerate(counts)
    ]
    lines = [" ".join(line.split()) for line in info._class_lines(found, 3)]
    assert lines == [
        "classes 6: 2 head, 2 medium, 2 tail (as the dataset states them)",
        "c1 900 tail",
        "... 3 more; --json lists them all",
        "c0 5 tail",
        "c3 0 tail",
    ]
    for num in (0, 6, 7):
        lines = info._class_lines(found, num)
        assert len(lines) == (2 if num == 0 else 7)


def test_stated_groups_win_over_counts(written: Make) -> None:
    cache = open_cache(written().path)
    cache.__dict__["classes"] = cache.classes.assign(group=["tail", "head", "medium"])
    found = describe(cache)
    assert found["groups"] == {"head": 1, "medium": 1, "tail": 1}
    assert found["groups_from"] == "dataset"


def test_the_flag_is_json(written: Make) -> None:
    config = InfoConfig.from_command_line(["--cache", "x", "--json"])
    assert config.as_json
    with pytest.raises(CacheError, match="x: no such cache"):
        run(config)
