"""Predictions, end to end: toy images, a tiny CLIP, extraction, training, prediction."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from featcache import extract
from featcache import submission as featcache_submission
from featcache.errors import BackboneError, CacheMismatchError, ConfigError, DatasetError
from featcache.extract import ExtractConfig
from featcache.prediction_table import read_predictions
from featcache.reader import open_cache
from featcache.submission import SubmissionConfig
from heads import predict, train
from heads.encoding import open_backbone
from heads.models.linear import LinearConfig
from heads.models.naive import NaiveConfig
from heads.models.router import RouterConfig
from heads.models.zero_shot import ZeroShotConfig
from heads.optim import OptimConfig
from heads.predict import PredictConfig
from heads.predictions import rule_of
from heads.run_folder import load_run
from heads.train import TrainConfig


@pytest.fixture
def extracted(image_folder: Path, tiny_clip: Path, tmp_path: Path) -> Path:
    """Cache of ten training and four validation images of cats and dogs."""
    model = tmp_path / "clip"
    shutil.copytree(tiny_clip, model)
    cache = tmp_path / "cache" / "pets"
    extract.run(
        ExtractConfig.model_validate(
            {
                "dataset": {"kind": "folder", "root": image_folder},
                "backbone": {"model": f"local-dir:{model}"},
                "cache": cache,
                "device": "cpu",
                "batch_size": 4,
            }
        )
    )
    return cache


def trained(cache: Path, **options: Any) -> Path:
    values: dict[str, Any] = {
        "head": LinearConfig(lrs=(0.1,), weight_decays=(0.0,)),
        "optim": OptimConfig(epochs=5),
        "run": cache.parent.parent / "run",
        "quiet": True,
    }
    return train.run(TrainConfig(cache=cache, **(values | options))).run


def test_image_files_and_cached_rows_give_the_same_predictions(
    extracted: Path, image_folder: Path, tmp_path: Path
) -> None:
    run = trained(extracted)
    rows = predict.run(
        PredictConfig(run=run, cache=extracted, split="val", out=tmp_path / "rows.csv", quiet=True)
    )
    shutil.rmtree(extracted)
    files = predict.run(
        PredictConfig(run=run, images=image_folder / "val", out=tmp_path / "f.parquet", quiet=True)
    )
    one = pd.read_csv(tmp_path / "rows.csv")
    other = pd.read_parquet(tmp_path / "f.parquet")
    assert len(one) == len(other) == 4
    assert one["path"].str.removeprefix("val/").tolist() == other["path"].tolist()
    assert one["class_1"].tolist() == other["class_1"].tolist()
    np.testing.assert_allclose(one["probability_1"], other["probability_1"], rtol=1e-3)
    np.testing.assert_allclose(one["probability_1"] + one["probability_2"], 1, rtol=1e-5)
    assert not rows.unreadable
    assert not files.unreadable


def test_unreadable_images_are_listed_with_a_reason_and_not_guessed(
    extracted: Path, tmp_path: Path, make_jpeg: Callable[..., bytes]
) -> None:
    run = trained(extracted)
    folder = tmp_path / "new"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "good.JPG").write_bytes(make_jpeg(50, 50, 1))
    (folder / "cut.jpg").write_bytes(make_jpeg(50, 50, 2)[:300])
    (folder / "empty.png").touch()
    (folder / "notes.txt").write_text("not an image")
    report = predict.run(PredictConfig(run=run, images=folder, out=tmp_path / "out.csv"))
    assert report.table["id"].tolist() == ["deep/good.JPG"]
    listed = pd.read_csv(tmp_path / "out.csv.unreadable.csv")
    assert listed["path"].tolist() == ["cut.jpg", "empty.png"]
    assert listed["reason"].str.len().min() > 3
    single = PredictConfig(run=run, images=folder / "deep" / "good.JPG", out=tmp_path / "out.csv")
    assert len(predict.run(single).table) == 1
    assert not (tmp_path / "out.csv.unreadable.csv").exists()
    broken = single.model_copy(update={"images": folder / "cut.jpg"})
    with pytest.raises(DatasetError, match=r"none of 1 images could be read.* is cut\.jpg"):
        predict.run(broken)
    assert (tmp_path / "out.csv.unreadable.csv").exists()


def test_zero_shot_needs_no_training_and_works_without_its_cache(
    extracted: Path, image_folder: Path, tmp_path: Path
) -> None:
    run = trained(extracted, head=ZeroShotConfig(templates=["a photo of a {name}.", "{name}"]))
    cache = open_cache(extracted)
    loaded = load_run(run)
    features = torch.from_numpy(cache.array("image/projected").read(cache.rows("val"))).float()
    shutil.rmtree(extracted)
    backbone = open_backbone(loaded, loaded.members[0], torch.device("cpu"))
    texts = [f"a photo of a {name}." for name in ("cat", "dog")] + ["cat", "dog"]
    encoded = torch.nn.functional.normalize(backbone.encode_text(texts), dim=1).view(2, 2, -1)
    vectors = torch.nn.functional.normalize(encoded.mean(0), dim=1)
    cosines = torch.cosine_similarity(features[:, None], vectors[None], dim=-1)
    torch.testing.assert_close(
        loaded.head(features), loaded.record["logit_scale"] * cosines, rtol=1e-3, atol=1e-3
    )
    images = PredictConfig(run=run, images=image_folder / "val", out=tmp_path / "out.csv")
    assert len(predict.run(images).table) == 4


def test_multi_label_rows_list_all_classes_above_the_threshold(
    make_multi: Callable[..., Path], tmp_path: Path
) -> None:
    cache = make_multi(invalid=[302])
    run = trained(cache)
    config = PredictConfig(run=run, cache=cache, split="test", out=tmp_path / "o.csv", top_k=99)
    report = predict.run(config)
    assert len(report.table) == 99
    assert [one.id for one in report.unreadable] == ["r302"]
    probabilities = report.table[[f"probability_{k}" for k in range(1, 7)]].to_numpy()
    assert (np.diff(probabilities, axis=1) <= 0).all()
    for line, values in zip(report.table.to_dict("records"), probabilities, strict=True):
        expected = {line[f"class_{k + 1}"] for k in range(6) if values[k] >= 0.5}
        assert set(line["classes"]) == expected
    assert report.table["classes"].str.len().any()
    written = pd.read_csv(tmp_path / "o.csv", keep_default_na=False)
    assert written["classes"].tolist() == ["; ".join(names) for names in report.table["classes"]]


def test_a_split_alone_is_of_the_cache_trained_on(
    make_multi: Callable[..., Path], tmp_path: Path
) -> None:
    cache = make_multi()
    run = trained(cache)
    options = {"run": run, "split": "test", "out": tmp_path / "o.csv"}
    found = predict.run(PredictConfig(**options)).table
    assert len(found) == 100
    assert found.equals(predict.run(PredictConfig(**options, cache=cache)).table)
    with pytest.raises(ValueError, match="split=test is of a cache; leave it out with images"):
        PredictConfig(**options, images=tmp_path)
    shutil.rmtree(cache)
    make_multi(seed=9)
    with pytest.raises(CacheMismatchError, match=r"fingerprint .* name the cache with --cache"):
        predict.run(PredictConfig(**options))


def test_other_weights_are_refused(extracted: Path, image_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    run = trained(extracted)
    weights = tmp_path / "clip" / "open_clip_model.safetensors"
    state = load_file(weights)
    save_file({name: tensor + 0.01 for name, tensor in state.items()}, weights)
    config = PredictConfig(run=run, images=image_folder, out=tmp_path / "out.csv")
    with pytest.raises(CacheMismatchError, match=r"backbone\.weights differs"):
        predict.run(config)
    weights.unlink()
    with pytest.raises(BackboneError):
        predict.run(config)


def test_options_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give either cache or images"):
        PredictConfig(run=tmp_path, out=tmp_path / "o.csv")
    with pytest.raises(ValueError, match=r"has to end with \.csv, \.parquet, \.json"):
        PredictConfig(run=tmp_path, images=tmp_path, out=tmp_path / "o.txt")
    with pytest.raises(ValueError, match="out is unset; name a table to write"):
        PredictConfig(run=tmp_path, images=tmp_path)
    with pytest.raises(ValueError, match=r"captions=.* needs images; a cache has its own"):
        PredictConfig(run=tmp_path, cache=tmp_path, captions=tmp_path, out=tmp_path / "o.csv")
    with pytest.raises(ConfigError, match="no such file or folder"):
        predict.find_images(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="no image in"):
        predict.find_images(tmp_path)


def test_a_submission_keeps_row_order_and_label_ids(
    make_cache: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    random = np.random.default_rng(1)
    features = random.normal(size=(90, 6)).astype(np.float32)
    labels = [[n for n in range(2) if row[n] > 0] or [2] for row in features[:70]]
    table = pd.DataFrame({"name": ["person", "dog", "cup"], "label_id": ["1", "18", "4"]})
    cache = make_cache(
        "kaggle",
        features,
        labels + [[]] * 20,
        ["train"] * 60 + ["val"] * 10 + ["test"] * 20,
        num_classes=3,
        classes=table,
        task="multi_label",
        invalid=[75],
    )
    run = trained(cache)
    capsys.readouterr()
    config = PredictConfig(
        run=run, cache=cache, split="test", out=tmp_path / "p.csv", submission=tmp_path / "s.csv"
    )
    frame = predict.run(config).table
    written = pd.read_csv(tmp_path / "s.csv", dtype=str, keep_default_na=False)
    assert written["ImageID"].tolist() == [f"r{row}" for row in range(70, 90)]
    number = dict(zip(table["name"], table["label_id"], strict=True))
    expected = {"r75": ""}
    for row in frame.itertuples():
        chosen = row.classes or [row.class_1]
        expected[str(row.id)] = " ".join(sorted((number[name] for name in chosen), key=int))
    assert dict(zip(written["ImageID"], written["Labels"], strict=True)) == expected
    assert "20 rows: " in capsys.readouterr().out
    again = featcache_submission.run(
        SubmissionConfig(predictions=tmp_path / "p.csv", cache=cache, out=tmp_path / "again.csv")
    )
    kept = written[written["ImageID"] != "r75"].reset_index(drop=True)
    pd.testing.assert_frame_equal(again, kept, check_dtype=False)
    with pytest.raises(ValueError, match="needs submission"):
        PredictConfig(run=run, cache=cache, out=tmp_path / "p.csv", submission_order=tmp_path)


def rows_of(frame: pd.DataFrame) -> dict[str, list[float]]:
    """Probabilities of cat and dog by file name, whatever their order."""
    found = {}
    for row in frame.itertuples():
        pair = {row.class_1: row.probability_1, row.class_2: row.probability_2}
        found[Path(row.path).name] = [pair["cat"], pair["dog"]]
    return found


def extract_captioned(table: Path, tiny_clip: Path, cache: Path, policy: str) -> Path:
    """A cache of the images and captions of a table."""
    extract.run(
        ExtractConfig.model_validate(
            {
                "dataset": {"kind": "table", "file": table, "root": table.parent},
                "backbone": {"model": f"local-dir:{tiny_clip}"},
                "features": {"text_policy": policy},
                "cache": cache,
                "device": "cpu",
                "precision": "fp32",
                "batch_size": 4,
            }
        )
    )
    return cache


@pytest.fixture
def captioned(image_folder: Path, tiny_clip: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A cache of the images with none, one or two captions each, and the table they are in."""
    lines = ["path,label,split,captions"]
    for number, file in enumerate(sorted(image_folder.rglob("*.jpg"))):
        path = file.relative_to(image_folder).as_posix()
        split, label, _ = path.split("/")
        texts = [f"a {label}, number {number} of {i}" for i in range(number % 3)]
        lines.append(f"{path},{label},{split}," + '"' + json.dumps(texts).replace('"', '""') + '"')
    table = image_folder / "rows.csv"
    table.write_text("\n".join(lines) + "\n")
    cache = tmp_path / "cache" / "captioned"
    return extract_captioned(table, tiny_clip, cache, "picture_of"), table


@pytest.mark.parametrize("kind", ["table", "list"])
def test_images_with_captions_are_scored_as_the_cached_rows(
    captioned: tuple[Path, Path], image_folder: Path, tmp_path: Path, kind: str
) -> None:
    cache, table = captioned
    head = RouterConfig(modalities=("image", "text"), dropout=0.0)
    run = trained(cache, head=head, val_split="val")
    rows = predict.run(PredictConfig(run=run, cache=cache, out=tmp_path / "rows.csv", quiet=True))
    if kind == "list":
        opened = open_cache(cache)
        offsets, texts = opened.captions
        lines = [
            f"{opened.paths[row]} {texts[place]}"
            for row in range(opened.num_rows)
            for place in range(offsets[row], offsets[row + 1])
        ]
        table = tmp_path / "captions.txt"
        table.write_text("\n".join(lines))
    shutil.rmtree(cache)
    asked = PredictConfig(
        run=run, images=image_folder, captions=table, out=tmp_path / "f.csv", quiet=True
    )
    files = predict.run(asked)
    assert not files.unreadable
    expected, found = rows_of(rows.table), rows_of(files.table)
    assert expected.keys() == found.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=2e-3, err_msg=name)
    alone = predict.run(asked.model_copy(update={"captions": None}))
    without = rows_of(alone.table)
    number = {file.name: n for n, file in enumerate(sorted(image_folder.rglob("*.jpg")))}
    for name, values in found.items():
        same = np.allclose(without[name], values, rtol=1e-5)
        assert same == (number[name] % 3 == 0), "a caption counts exactly where there is one"


def test_captions_of_a_join_are_read_by_every_backbone_in_its_own_way(
    captioned: tuple[Path, Path], image_folder: Path, tiny_clip: Path, tmp_path: Path
) -> None:
    cache, table = captioned
    other = extract_captioned(table, tiny_clip, tmp_path / "cache" / "other", "raw")
    head = RouterConfig(modalities=("image", "text"))
    run = trained(cache, head=head, val_split="val", join=(other,))
    assert load_run(run).features == {"image/projected": 64, "text/projected": 64}
    asked = {"run": run, "out": tmp_path / "o.csv", "quiet": True}
    rows = predict.run(PredictConfig(**asked, cache=cache, join=(other,)))
    shutil.rmtree(cache)
    shutil.rmtree(other)
    files = predict.run(PredictConfig(**asked, images=image_folder, captions=table))
    expected, found = rows_of(rows.table), rows_of(files.table)
    assert expected.keys() == found.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=2e-3, err_msg=name)


def test_a_head_on_captions_alone_needs_them(
    captioned: tuple[Path, Path], image_folder: Path, tmp_path: Path
) -> None:
    cache, table = captioned
    run = trained(cache, head=NaiveConfig(feature="text"), val_split="val")
    asked = PredictConfig(run=run, images=image_folder, out=tmp_path / "f.json", quiet=True)
    with pytest.raises(ConfigError, match=r"reads captions \(text/projected\).*give --captions"):
        predict.run(asked)
    report = predict.run(asked.model_copy(update={"captions": table}))
    assert len(report.table) == 9
    assert {one.reason for one in report.unreadable} == {
        "no caption, and the head reads nothing else"
    }
    images = trained(cache, run=tmp_path / "by-image", val_split="val")
    with pytest.raises(ConfigError, match=r"reads image/projected, no captions; leave it out"):
        predict.run(asked.model_copy(update={"run": images, "captions": table}))
    other = tmp_path / "other.csv"
    other.write_text("path,caption\nelsewhere.jpg,a cat\n")
    with pytest.raises(DatasetError, match=r"no caption is of one of the 14 images, its first row"):
        predict.run(asked.model_copy(update={"captions": other}))
    other.write_text("file,text\nelsewhere.jpg,a cat\n")
    with pytest.raises(DatasetError, match=r"expected columns path and caption, found file, text"):
        predict.run(asked.model_copy(update={"captions": other}))


def test_one_image_is_shown_and_needs_no_table(
    extracted: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained(extracted)
    image = next((image_folder / "val" / "cat").iterdir())
    capsys.readouterr()
    report = predict.run(PredictConfig(run=run, images=image))
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == f"{image.name}:"
    best = report.table.iloc[0]
    assert shown[1].split() == [best["class_1"], f"{best['probability_1']:.2%}"]
    assert len(shown) == 3
    assert report.out is None
    assert not list(tmp_path.glob("*.csv"))


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".json"])
@pytest.mark.parametrize("odd", [True, False])
def test_classes_come_back_from_every_kind_of_table(
    make_cache: Callable[..., Path], tmp_path: Path, suffix: str, odd: bool
) -> None:
    rng = np.random.default_rng(0)
    names = ["plain", "None", "a; b", "[c"] if odd else ["plain", "None", 'say "d"', "e,f"]
    cache = make_cache(
        "odd",
        rng.normal(size=(60, 4)).astype(np.float32),
        [np.flatnonzero(row).tolist() for row in rng.uniform(size=(60, 4)) < 0.5],
        ["train"] * 40 + ["val"] * 20,
        num_classes=4,
        classes=pd.DataFrame({"name": names}),
        task="multi_label",
    )
    run = trained(cache)
    out = tmp_path / f"o{suffix}"
    config = PredictConfig(run=run, cache=cache, out=out, threshold=0.4, calibrated=False)
    table = predict.run(config).table
    assert len({len(chosen) for chosen in table["classes"]}) > 2
    back = read_predictions(out, names)
    assert back["classes"].tolist() == table["classes"].tolist()
    assert back["class_1"].tolist() == table["class_1"].tolist()
    np.testing.assert_allclose(
        back["probability_1"].astype(float), table["probability_1"], rtol=1e-5
    )
    if suffix == ".json":
        records = json.loads(out.read_text())
        assert [one["classes"] for one in records] == table["classes"].tolist()
        assert set(records[0]) == set(table.columns)


def test_scores_that_only_rank_say_nothing_about_presence(
    make_cache: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = make_cache(
        "ranks",
        np.eye(6, dtype=np.float32),
        [[0], [1], [0, 1]] * 2,
        ["train"] * 3 + ["val"] * 3,
        num_classes=2,
        task="multi_label",
    )
    train.run(
        TrainConfig(cache=cache, run=tmp_path / "run", quiet=True, optim=OptimConfig(epochs=1))
    )
    loaded = load_run(tmp_path / "run")
    loaded.head.has_probabilities = False
    rows = np.arange(6)
    ranked, _ = predict.predict_cache(loaded, open_cache(cache), rows)
    assert "classes" not in ranked.columns
    assert rule_of(loaded, 5, None).thresholds is None
    stated, _ = predict.predict_cache(loaded, open_cache(cache), rows, rule_of(loaded, 5, 0.5))
    assert "classes" in stated.columns
    loaded.head.has_probabilities = True
    assert rule_of(loaded, 5, None).thresholds == 0.5
