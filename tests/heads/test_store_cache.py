"""The same commands on a cache in an object store: the same features, metrics and predictions."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from featcache import extract
from featcache.class_text import class_text_features
from featcache.errors import CacheError, StorageDeniedError
from featcache.extract import ExtractConfig
from featcache.reader import open_cache
from featcache.remote.object_store import ObjectFolder
from featcache.storage import locate
from featcache.store import verify
from heads import evaluate, predict, train
from heads.evaluate import EvaluateConfig
from heads.predict import PredictConfig
from heads.train import TrainConfig


def extracted(cache: str, images: Path, clip: Path) -> str:
    arguments = ["--dataset.root", str(images), "--backbone.model", f"local-dir:{clip}"]
    options = ["--device", "cpu", "--batch_size", "4", "--shard_rows", "4", "--cache", cache]
    extract.run(ExtractConfig.from_command_line([*arguments, *options]))
    return cache


def outcome(cache: str, folder: Path) -> dict[str, Any]:
    """Everything that two heads say about a cache, by file name."""
    found: dict[str, Any] = {}
    for kind, options in (("linear", ["--optim.epochs", "5"]), ("zero_shot", [])):
        run = folder / kind
        arguments = ["--head.kind", kind, "--cache", cache, "--run", str(run), "--quiet"]
        report = train.run(TrainConfig.from_command_line([*arguments, *options]))
        found[f"{kind} trained"] = {k: report.metrics.get(k) for k in ("metric", "val", "test")}
        evaluate.run(EvaluateConfig.from_command_line(["--run", str(run), "--split", "val"]))
        scores = json.loads((run / "metrics_val.json").read_bytes())
        assert scores.pop("cache") == cache
        assert scores["top1"] >= 0
        found[f"{kind} metrics"] = scores
        out = run / "rows.csv"
        flags = ["--run", str(run), "--cache", cache, "--split", "val", "--out", str(out)]
        predict.run(PredictConfig.from_command_line([*flags, "--quiet"]))
        found[f"{kind} predictions"] = pd.read_csv(out).to_dict("list")
    return found


def test_heads_learn_the_same_from_a_store(
    image_folder: Path, tiny_clip: Path, bucket: str, tmp_path: Path
) -> None:
    local = extracted(str(tmp_path / "cache"), image_folder, tiny_clip)
    there = extracted(f"{bucket}/deep/cache", image_folder, tiny_clip)
    folder = locate(there)
    for entry in folder.list():
        if entry.key != "zarr.json" and not entry.key.startswith("shards/"):  # these hold times
            assert folder.read(entry.key) == Path(local, entry.key).read_bytes(), entry.key
    assert outcome(there, tmp_path / "a") == outcome(local, tmp_path / "b")
    held = {entry.key.split("/")[1] for entry in folder.list("class_text")} - {"zarr.json"}
    assert held == {p.name for p in Path(local, "class_text").iterdir()} - {"zarr.json"}
    extract.run(  # complete: nothing to do, and an unreadable store would say so
        ExtractConfig.from_command_line(
            [
                *("--dataset.root", str(image_folder), "--cache", there, "--device", "cpu"),
                *("--backbone.model", f"local-dir:{tiny_clip}", "--restart"),
            ]
        )
    )
    assert open_cache(there).complete


def test_a_cache_in_a_store_grows_like_a_local_one(
    image_folder: Path, tiny_clip: Path, bucket: str, tmp_path: Path, make_jpeg: Any
) -> None:
    local = extracted(str(tmp_path / "cache"), image_folder, tiny_clip)
    there = extracted(f"{bucket}/cache", image_folder, tiny_clip)
    run = tmp_path / "run"
    arguments = ["--head.kind", "zero_shot", "--run", str(run), "--quiet"]
    train.run(TrainConfig.from_command_line(["--cache", there, *arguments]))
    assert list(locate(there).list("class_text"))
    before = open_cache(there)
    (image_folder / "train" / "cat" / "00.jpg").unlink()
    (image_folder / "train" / "cat" / "20.jpg").write_bytes(make_jpeg(50, 40, 20))
    (image_folder / "val" / "dog" / "21.jpg").write_bytes(make_jpeg(40, 50, 21))
    for cache in (local, there):
        extracted(cache, image_folder, tiny_clip)
    after = open_cache(there)
    assert after.num_rows == 15
    assert [entry["fingerprint"] for entry in after.history] == [before.fingerprint]
    assert verify(there) == []
    expected = open_cache(local)
    assert after.fingerprint == expected.fingerprint
    assert after.ids == expected.ids
    for name in ("image/projected", "rows/content", "rows/valid", "rows/stamp"):
        assert (after.array(name).read() == expected.array(name).read()).all()
    assert [name for name in keys(there, "class_text") if "/c/" in name]  # carried over
    with pytest.raises(CacheError, match="updated while open"):
        before.array("rows/content")
    assert {key.partition("/")[0] for key in keys(bucket)} == {"cache"}  # nothing beside it
    evaluate.run(EvaluateConfig.from_command_line(["--run", str(run), "--split", "val"]))


def keys(place: str, prefix: str = "") -> list[str]:
    return [entry.key for entry in locate(place).list(prefix)]


def test_class_text_is_not_kept_where_writing_is_denied(
    image_folder: Path, tiny_clip: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = open_cache(extracted(f"{bucket}/cache", image_folder, tiny_clip))

    def denied(self: ObjectFolder, *args: Any) -> None:
        raise StorageDeniedError("denied")

    monkeypatch.setattr(ObjectFolder, "write_if", denied)
    opened = []

    def backbone() -> Any:
        from featcache.class_text import open_cache_backbone

        opened.append(1)
        return open_cache_backbone(cache)

    first = class_text_features(cache, ["a {name}"], backbone)
    assert (class_text_features(cache, ["a {name}"], backbone) == first).all()
    assert len(opened) == 2


def test_an_extraction_waits_for_no_other_writer(
    image_folder: Path, tiny_clip: Path, bucket: str
) -> None:
    content = {"token": "t", "pid": 1, "host": "elsewhere", "processes": "x"}
    locate(bucket).write("cache.lock", json.dumps(content).encode())
    with pytest.raises(CacheError, match=r"cache: process 1 on elsewhere is writing this cache"):
        extracted(f"{bucket}/cache", image_folder, tiny_clip)
