"""Several arrays a head: what it is given of images, captions and masks, and what is left out."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pandas as pd
import pytest
import torch
from pydantic import SerializeAsAny
from torch import Tensor

from featcache.caption_means import CaptionMeans
from featcache.errors import CacheError, CacheMismatchError
from featcache.join import open_joined
from featcache.reader import open_cache
from heads import evaluate, predict, run_folder, train
from heads.base import Features, FeatureSpec, Head, HeadConfig
from heads.data import FeatureTables, HeadArrays, open_arrays
from heads.evaluate import EvaluateConfig
from heads.models import HEADS
from heads.models.linear import LinearConfig
from heads.optim import OptimConfig
from heads.parts import cooccurrence, labelled_part
from heads.predict import PredictConfig
from heads.run_folder import RunError, load_run
from heads.train import TrainConfig

CacheMaker = Callable[..., Path]
CPU = torch.device("cpu")
NUM_ROWS, DIM, TEXT_DIM, STEPS, WIDTH = 40, 6, 5, 3, 4
COUNTS = [row % 4 for row in range(NUM_ROWS)]
"""Captions of each row: every fourth has none."""


class PairConfig(HeadConfig):
    """A linear layer over image and caption; its loss also sees what only training reads."""

    needs: ClassVar[tuple[str, ...]] = ("image/projected", "text/projected")
    kind: Literal["pair"] = "pair"
    """Head kind."""
    only_text: bool = False
    """Read the caption alone."""

    def arrays(self) -> tuple[str, ...]:
        """One or both."""
        return self.needs[1:] if self.only_text else self.needs

    def training_arrays(self) -> tuple[str, ...]:
        """The joint encoder's tokens and their mask."""
        return ("image/multimodal", "image/multimodal_mask")

    def wants_cooccurrence(self) -> bool:
        """Always."""
        return True

    def build(self, spec: FeatureSpec) -> "Pair":
        """A layer over all that is read."""
        return Pair(spec, sum(spec.width(name) for name in self.arrays()))


class Pair(Head):
    def __init__(self, spec: FeatureSpec, width: int) -> None:
        super().__init__()
        self.spec = spec
        self.layer = torch.nn.Linear(width, spec.num_classes)
        self.seen: list[Features] = []

    def forward(self, *features: Tensor) -> Tensor:
        return self.layer(torch.cat(features, dim=1))

    def loss(self, features: Features, targets: Tensor, progress: float) -> dict[str, Tensor]:
        *own, tokens, mask = features
        assert mask.dtype == torch.bool
        assert tokens.shape == (len(targets), STEPS, WIDTH)
        assert not tokens[~mask].any(), "what is not there is zero"
        logits = self.forward(*own)
        return {"loss": torch.nn.functional.cross_entropy(logits, targets)}


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes `PairConfig` a known kind."""
    monkeypatch.setitem(HEADS, "pair", PairConfig)


@pytest.fixture
def captioned(make_cache: CacheMaker) -> Callable[..., Path]:
    """`captioned(name)`: 40 rows, none to three captions each, with a joint encoder's features."""

    def make(name: str = "captioned", seed: int = 0, **options: Any) -> Path:
        rng = np.random.default_rng(seed)
        counts = options.pop("counts", COUNTS)
        labels = [[row % 2] for row in range(NUM_ROWS)]
        centres = 2.0 * np.asarray(labels)
        tokens = rng.normal(size=(NUM_ROWS, STEPS, WIDTH)).astype(np.float32)
        mask = np.arange(STEPS) < 1 + np.arange(NUM_ROWS)[:, None] % STEPS
        without = np.asarray(counts) == 0
        tokens[~mask] = 0
        tokens[without], mask[without] = np.nan, False
        more = {
            "image/multimodal": tokens,
            "image/multimodal_mask": mask,
            "image/multimodal_pooled": tokens[:, 0],
            "text/projected": rng.normal(size=(sum(counts), TEXT_DIM)).astype(np.float32),
        }
        return make_cache(
            name,
            (rng.normal(size=(NUM_ROWS, DIM)) + centres).astype(np.float32),
            labels,
            ["train"] * 20 + ["val"] * 12 + ["test"] * 8,
            num_classes=2,
            captions=[[f"caption {row}.{i}" for i in range(n)] for row, n in enumerate(counts)],
            more=options.pop("more", more),
            text=True,
            multimodal="states",
            **options,
        )

    return make


def slow_means(path: Path) -> np.ndarray:
    """Row by row, from the definition."""
    cache = open_cache(path)
    offsets, _ = cache.captions
    stored = cache.array("text/projected").read().astype(np.float64)
    means = np.zeros((cache.num_rows, stored.shape[1]))
    for row in range(cache.num_rows):
        own = stored[offsets[row] : offsets[row + 1]]
        if len(own):
            means[row] = np.mean([one / np.linalg.norm(one) for one in own], axis=0)
    return means


class AnyTrainConfig(TrainConfig):
    """The job with a head that is in no folder."""

    head: SerializeAsAny[HeadConfig]
    """Which head."""


def config(cache: Path, head: HeadConfig, run: Path, **options: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "cache": cache,
        "optim": OptimConfig(epochs=3),
        "run": run,
        "quiet": True,
        "device": "cpu",
    }
    return AnyTrainConfig(**(values | options), head=head)


class TestCaptionMeans:
    def test_rows_are_means_of_unit_vectors_and_zeros_without_a_caption(
        self, captioned: CacheMaker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = captioned()
        expected = slow_means(path)
        means = open_cache(path).caption_means()
        assert means.shape == (NUM_ROWS, TEXT_DIM)
        np.testing.assert_allclose(means.read(), expected, atol=1e-6)
        assert not means.read()[np.asarray(COUNTS) == 0].any()
        rows = np.asarray([7, 0, 39, 7, 4, 3])
        monkeypatch.setattr("featcache.caption_means._BLOCK_BYTES", 2 * TEXT_DIM * 4)
        np.testing.assert_allclose(means.read(rows), expected[rows], atol=1e-6)
        np.testing.assert_allclose(means.read(slice(3, 9)), expected[3:9], atol=1e-6)
        assert means.read(np.zeros(0, np.int64)).shape == (0, TEXT_DIM)

    def test_a_join_has_the_means_of_its_members_side_by_side(self, captioned: CacheMaker) -> None:
        paths = captioned("one"), captioned("two", seed=1, weights="other")
        joined = open_joined(paths)
        lengths = [np.linalg.norm(slow_means(path), axis=1, keepdims=True) for path in paths]
        parts = [
            slow_means(path) / np.maximum(length, 1e-6)
            for path, length in zip(paths, lengths, strict=True)
        ]
        np.testing.assert_allclose(
            joined.caption_means().read(), np.concatenate(parts, axis=1), atol=1e-6
        )
        assert joined.caption_counts.tolist() == COUNTS
        assert np.diff(joined.caption_offsets).tolist() == COUNTS


class TestTables:
    @pytest.mark.parametrize("free", [None, 0], ids=["held", "from files"])
    def test_batches_and_slices_hold_the_rows_of_every_array(
        self, captioned: CacheMaker, monkeypatch: pytest.MonkeyPatch, free: int | None
    ) -> None:
        path = captioned()
        cache = open_cache(path)
        if free is not None:
            monkeypatch.setattr("heads.data._free_memory", lambda device: free)
        arrays = open_arrays(cache, PairConfig(), training=True)
        names = [*PairConfig().arrays(), *PairConfig().training_arrays()]
        assert list(arrays.arrays) == names
        assert arrays.readable is None, "the image is there without a caption too"
        rows = np.arange(3, 33)
        tables = FeatureTables(arrays, rows, CPU)
        assert {table.held for table in tables.tables} == {"device" if free is None else "files"}
        assert tables.feature_dims == dict(zip(names, (DIM, TEXT_DIM, WIDTH, STEPS), strict=True))
        expected = [
            cache.array("image/projected").read(),
            slow_means(path),
            np.nan_to_num(cache.array("image/multimodal").read()),
            cache.array("image/multimodal_mask").read(),
        ]
        index = torch.tensor([29, 0, 5, 5])
        for found, whole in zip(tables.batch(index), expected, strict=True):
            np.testing.assert_allclose(found, whole[rows[index]], atol=1e-6)
        for found, whole in zip(tables.slice(25, 30), expected, strict=True):
            np.testing.assert_allclose(found, whole[rows[25:30]], atol=1e-6)
        dtypes = [part.dtype for part in tables.batch(index)]
        assert dtypes == [torch.float32] * 3 + [torch.bool]

    def test_one_view_of_a_row_is_read_in_all_arrays(self, make_cache: CacheMaker) -> None:
        rng = np.random.default_rng(0)
        projected = rng.normal(size=(6, 3, 4)).astype(np.float32)
        path = make_cache(
            "views",
            projected,
            [[row % 2] for row in range(6)],
            ["train"] * 6,
            num_classes=2,
            num_views=3,
            more={"image/pooled": 10 + projected, "text/projected": np.ones((6, 2), np.float32)},
            captions=[["a"]] * 6,
        )
        cache = open_cache(path)
        names = ("image/projected", "image/pooled")
        arrays = {name: cache.array(name) for name in names}
        arrays["text/projected"] = cache.caption_means()
        tables = FeatureTables(HeadArrays(arrays, cache.caption_counts > 0), np.arange(6), CPU)
        assert tables.num_views == 3
        index, views = torch.tensor([5, 0, 2]), torch.tensor([2, 0, 1])
        plain, pooled, text = tables.batch(index, views)
        np.testing.assert_array_equal(plain, projected[index, views])
        np.testing.assert_allclose(pooled, 10 + projected[index, views], rtol=1e-6)
        assert text.shape == (3, 2)
        np.testing.assert_array_equal(tables.batch(index)[0], projected[index, 0])

    def test_statistics_leave_out_rows_without_features(self, captioned: CacheMaker) -> None:
        cache = open_cache(captioned())
        arrays = open_arrays(cache, LinearConfig(feature="multimodal"))
        mean, std = FeatureTables(arrays, np.arange(NUM_ROWS), CPU).statistics()
        there = cache.array("image/multimodal_pooled").read()[np.asarray(COUNTS) > 0]
        np.testing.assert_allclose(mean, there.mean(0), atol=1e-6)
        np.testing.assert_allclose(std, there.std(0), atol=1e-6)

    def test_a_captioned_row_of_nan_is_refused(self, captioned: CacheMaker) -> None:
        cache = open_cache(captioned(counts=[1] * NUM_ROWS))
        arrays = open_arrays(cache, LinearConfig(feature="multimodal"))
        assert FeatureTables(arrays, np.arange(NUM_ROWS), CPU).tables[0].held == "device"
        bad = np.ones((NUM_ROWS, WIDTH), np.float32)
        bad[11] = np.nan
        other = captioned("bad", counts=[1] * NUM_ROWS, more={"image/multimodal_pooled": bad})
        arrays = open_arrays(open_cache(other), LinearConfig(feature="multimodal"))
        with pytest.raises(CacheError, match="row 11 of the cache is valid but holds NaN"):
            FeatureTables(arrays, np.arange(NUM_ROWS), CPU)

    @pytest.mark.parametrize(
        ("name", "flag"),
        [
            ("image/tokens", r"--features\.tokens all"),
            ("image/multimodal_mask", r"--features\.multimodal states"),
            ("text/projected", r"--features\.text from a dataset with captions"),
        ],
    )
    def test_an_array_that_is_not_there_is_named_with_its_option(
        self, make_single: CacheMaker, name: str, flag: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(PairConfig, "arrays", lambda self: (name,))
        with pytest.raises(CacheError, match=f"head pair reads {name}, .* extract it with {flag}"):
            open_arrays(open_cache(make_single()), PairConfig())

    def test_a_join_says_what_it_cannot_give(self, captioned: CacheMaker) -> None:
        joined = open_joined([captioned("one"), captioned("two", weights="other")])
        with pytest.raises(CacheError, match=r"a join has only image/projected, .*text/projected"):
            open_arrays(joined, PairConfig(), training=True)
        arrays = open_arrays(joined, PairConfig())
        assert FeatureTables(arrays, np.arange(NUM_ROWS), CPU).feature_dims == {
            "image/projected": 2 * DIM,
            "text/projected": 2 * TEXT_DIM,
        }

    def test_joint_vectors_of_a_join_stand_side_by_side(self, captioned: CacheMaker) -> None:
        paths = captioned("one"), captioned("two", seed=1, weights="other")
        arrays = open_arrays(open_joined(paths), LinearConfig(feature="multimodal"))
        assert arrays.readable is not None
        assert arrays.readable.tolist() == [count > 0 for count in COUNTS]
        (found,) = FeatureTables(arrays, np.arange(NUM_ROWS), CPU).slice(0, NUM_ROWS)
        for half, path in zip(found.split(WIDTH, dim=1), paths, strict=True):
            plain = np.nan_to_num(open_cache(path).array("image/multimodal_pooled").read())
            lengths = np.maximum(np.linalg.norm(plain, axis=1, keepdims=True), 1e-6)
            np.testing.assert_allclose(half, plain / lengths, atol=1e-6)


def test_a_head_on_image_and_caption_is_trained_evaluated_and_predicts(
    captioned: CacheMaker, pair: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = captioned()
    told: list[FeatureSpec] = []
    build = PairConfig.build
    monkeypatch.setattr(
        PairConfig, "build", lambda self, spec: told.append(spec) or build(self, spec)
    )
    report = train.run(config(path, PairConfig(), tmp_path / "run"))
    spec = told[0]
    assert (spec.num_rows, spec.feature_dim, spec.width("text/projected")) == (20, DIM, TEXT_DIM)
    assert spec.cooccurrence.tolist() == [[10, 0], [0, 10]]
    features, targets = spec.support()
    assert [len(part) for part in features] == [20] * 4
    assert targets.tolist() == [row % 2 for row in range(20)]
    np.testing.assert_allclose(features[1], slow_means(path)[:20], atol=1e-6)
    record = run_folder.read_json(report.run / "head.json")
    assert [one["array"] for one in record["features"]] == list(PairConfig.needs)
    assert [one["width"] for one in record["training_features"]] == [WIDTH, STEPS]
    loaded = load_run(report.run)
    assert loaded.features == {"image/projected": DIM, "text/projected": TEXT_DIM}
    assert told[-1].num_rows == 20
    assert told[-1].width("image/multimodal") == WIDTH
    scores = evaluate.run(EvaluateConfig(run=report.run, device="cpu"))
    assert scores.metrics == report.metrics["test"]
    asked = PredictConfig(run=report.run, cache=path, out=tmp_path / "o.csv", device="cpu")
    table = predict.run(asked).table
    cache = open_cache(path)
    with torch.no_grad():
        images = torch.from_numpy(cache.array("image/projected").read())
        logits = loaded.head(images, torch.from_numpy(slow_means(path)).float())
    assert table["class_1"].tolist() == [f"c{c}" for c in logits.argmax(1).tolist()]


def test_rows_without_the_only_thing_a_head_reads_are_left_out_and_counted(
    captioned: CacheMaker, pair: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, head = captioned(), PairConfig(only_text=True)
    report = train.run(config(path, head, tmp_path / "run", quiet=False))
    assert report.metrics["num_train_rows"] == 15
    shown = capsys.readouterr().out
    line = "5 rows of train without a caption, 3 rows of val without a caption, 2 rows of test"
    assert line in shown
    assert (report.metrics["val"]["num_rows"], report.metrics["test"]["num_rows"]) == (9, 6)
    scores = evaluate.run(EvaluateConfig(run=report.run, device="cpu")).metrics
    assert (scores["num_rows"], scores["num_without_caption"]) == (6, 2)
    out = tmp_path / "o.csv"
    predicted = predict.run(PredictConfig(run=report.run, cache=path, out=out, device="cpu"))
    assert len(predicted.table) == 30
    assert {one.reason for one in predicted.unreadable} == {
        "no caption, and the head reads nothing else"
    }
    assert [one.id for one in predicted.unreadable] == [f"r{row}" for row in range(0, 40, 4)]


def test_a_split_without_any_caption_is_refused(
    captioned: CacheMaker, pair: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bare = captioned("bare", counts=[0] * 20 + [1] * 20)
    head = PairConfig(only_text=True)
    with pytest.raises(
        CacheError, match=r"none of the 20 labelled rows of split 'train' has a cap"
    ):
        train.run(config(bare, head, tmp_path / "run"))
    report = train.run(config(captioned(), head, tmp_path / "run"))
    untested = captioned("untested", counts=[1] * 32 + [0] * 8)
    with pytest.raises(RunError, match="8 have no caption, and the head reads nothing else"):
        evaluate.run(EvaluateConfig(run=report.run, cache=untested, split="test", device="cpu"))
    report = train.run(config(untested, head, tmp_path / "untested"))
    assert "test" not in report.metrics
    assert "split 'test' is not reported: none of its 8 labelled rows has a cap" in caplog.text


def test_captions_read_in_another_way_are_another_feature(
    captioned: CacheMaker, pair: None, tmp_path: Path
) -> None:
    path = captioned()
    report = train.run(config(path, PairConfig(), tmp_path / "run"))
    other = captioned("other", text_policy="picture_of")
    with pytest.raises(CacheMismatchError, match=r"features.text_policy differs: .*'picture_of'"):
        evaluate.run(EvaluateConfig(run=report.run, cache=other, device="cpu"))
    images = train.run(
        config(path, LinearConfig(lrs=(0.1,), weight_decays=(0.0,)), tmp_path / "images")
    )
    assert evaluate.run(EvaluateConfig(run=images.run, cache=other, device="cpu")).metrics


def test_a_head_that_reads_no_text_never_opens_it(
    captioned: CacheMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("captions were read")

    monkeypatch.setattr(CaptionMeans, "take", refuse)
    monkeypatch.setattr("featcache.reader.Cache.caption_offsets", property(refuse))
    head = LinearConfig(lrs=(0.1,), weight_decays=(0.0,))
    assert train.run(config(captioned(), head, tmp_path / "run")).score > 0


def test_cooccurrence_counts_pairs_of_labels(make_multi: CacheMaker) -> None:
    part = labelled_part(open_cache(make_multi()), "train")
    counts = cooccurrence(part, 6)
    hot = pd.DataFrame(part.targets).to_numpy()
    for one in range(6):
        for other in range(6):
            assert counts[one, other] == ((hot[:, one] > 0) & (hot[:, other] > 0)).sum()


def test_a_run_folder_of_a_head_with_one_array_is_still_read(
    make_single: CacheMaker, tmp_path: Path
) -> None:
    head = LinearConfig(lrs=(0.1,), weight_decays=(0.0,))
    cache = make_single()
    report = train.run(config(cache, head, tmp_path / "run"))
    file = report.run / "head.json"
    record = run_folder.read_json(file)
    (only,) = record.pop("features")
    del record["training_features"], record["num_rows"]
    record |= {"feature": only["array"], "feature_dim": only["width"]}
    run_folder.write_json(file, record)
    assert load_run(report.run).features == {"image/projected": 12}
    scores = evaluate.run(EvaluateConfig(run=report.run, device="cpu"))
    assert scores.metrics == report.metrics["test"]
