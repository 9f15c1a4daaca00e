"""The report page: its findings against plain computations; that it is whole and by itself."""

import base64
import io
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from featcache import report
from featcache.backbones.open_clip import OpenClipConfig
from featcache.config import Config
from featcache.datasets.folder import FolderConfig
from featcache.errors import CacheError, ConfigError
from featcache.extract import run as extract
from featcache.extract_config import ExtractConfig
from featcache.reader import open_cache
from featcache.report import ReportConfig
from featcache.reporting import confusion as confusions
from featcache.reporting import duplicates, histogram, projection, style
from featcache.reporting.duplicates import Whitening, find_leaks, nearest, same_content

Make = Callable[..., Any]
CPU = torch.device("cpu")


class Rows:
    """Stands in for an array of a cache."""

    def __init__(self, features: np.ndarray) -> None:
        self.features = features
        self.shape = features.shape

    def read(self, rows: np.ndarray, view: int | None = None) -> np.ndarray:
        return self.features[rows]


def test_whitened_directions_vary_alike() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(4000, 6)) * [30, 10, 3, 1, 1, 1] + [50, 0, 0, 0, 0, 9]
    features = features.astype(np.float32)
    white = Whitening.fit(Rows(features), np.arange(4000), rng)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    covariance = np.cov((unit - unit.mean(0)).T, bias=True)
    shrunk = np.linalg.inv(covariance + 0.1 * np.trace(covariance) / 6 * np.eye(6))
    np.testing.assert_allclose(white.matrix @ white.matrix.T, shrunk, rtol=2e-3, atol=1e-2)
    np.testing.assert_allclose(np.linalg.norm(white.apply(features), axis=1), 1, atol=1e-5)


def test_nearest_rows_are_those_of_a_plain_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "QUERY_BLOCK", 7)
    monkeypatch.setattr(duplicates, "BASE_BLOCK", 5)
    rng = np.random.default_rng(1)
    array = Rows(rng.normal(size=(60, 8)).astype(np.float32))
    queries, base = np.arange(0, 60, 3), np.setdiff1d(np.arange(60), np.arange(0, 60, 3))
    white = Whitening.fit(array, np.arange(60), rng)
    best, partner = nearest(array, queries, base, white, CPU)
    points = white.apply(array.features)
    for place, query in enumerate(queries):
        cosines = {int(row): float(points[query] @ points[row]) for row in base}
        assert partner[place] == max(cosines, key=lambda row: cosines[row])
        assert best[place] == pytest.approx(max(cosines.values()), abs=1e-5)


def test_same_content_is_found_in_the_first_place_it_occurs() -> None:
    content = np.asarray([5, 9, 5, 7, 1, 9, 3, 5], np.uint64)
    found = same_content(content, np.asarray([4, 5, 6, 7]), np.asarray([0, 1, 2, 3]))
    assert found.tolist() == [[5, 1], [7, 0]]
    assert not len(same_content(content, np.asarray([1]), np.asarray([], np.int64)))


def test_large_splits_are_sampled_within_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "_FEWEST_QUERIES", 10)
    rng = np.random.default_rng(0)
    for num_queries, num_base, budget in ((50, 40, 2000), (50, 40, 1999), (90, 500, 1000)):
        queries, base = np.arange(num_queries), 1000 + np.arange(num_base)
        some, others = duplicates._sampled(queries, base, budget, rng)
        assert len(some) * len(others) <= budget
        assert len(some) >= 10
        assert set(some) <= set(queries)
        assert set(others) <= set(base)
        assert (np.diff(some) > 0).all()
        assert (len(some) == num_queries) == (budget == 2000)


def test_principal_components_are_those_of_scikit_learn() -> None:
    from sklearn.decomposition import PCA

    rng = np.random.default_rng(2)
    features = (rng.normal(size=(80, 10)) * np.arange(1, 11)).astype(np.float32)
    found, shares = projection.principal_components(features)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    reference = PCA().fit(unit)
    np.testing.assert_allclose(np.abs(found), np.abs(reference.transform(unit)), atol=1e-4)
    np.testing.assert_allclose(shares, reference.explained_variance_ratio_, atol=1e-5)


def test_confusions_are_those_of_scikit_learn(
    written: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sklearn.metrics import confusion_matrix

    cache = open_cache(written(num_rows=40).path)
    vectors = np.random.default_rng(3).normal(size=(2, 3, 6)).astype(np.float32)
    monkeypatch.setattr(confusions, "class_text_features", lambda *given: vectors)
    found = confusions.confusion(cache, 1000, pytest.fail)
    assert found.split == "val"
    rows = cache.rows("val")
    features = cache.array("image/projected").read(rows).astype(np.float64)
    unit = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
    predicted = (features @ unit.mean(0).T / np.linalg.norm(unit.mean(0), axis=1)).argmax(1)
    expected = confusion_matrix(cache.labels(rows), predicted, labels=range(3))
    counts = np.zeros((3, 3), int)
    np.add.at(counts, (found.true, found.taken), 1)
    np.testing.assert_array_equal(counts, expected - np.diag(np.diag(expected)))
    assert found.recall == np.trace(expected) / len(rows)
    largest = found.largest(2)
    assert [count for _, _, count, _ in largest] == sorted(counts.ravel())[::-1][:2]
    for true, taken, _, row in largest:
        assert cache.labels(np.asarray([row])) == true
        assert predicted[list(rows).index(row)] == taken


def test_several_labels_are_compared_with_as_many_predictions(
    written: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = open_cache(written(num_rows=60, task="multi_label").path)
    vectors = np.random.default_rng(4).normal(size=(1, 3, 6)).astype(np.float32)
    monkeypatch.setattr(confusions, "class_text_features", lambda *given: vectors)
    found = confusions.confusion(cache, 1000, pytest.fail)
    offsets, values = cache.label_lists
    expected, right = [], 0
    for row in cache.rows("val").tolist():
        labels = set(values[offsets[row] : offsets[row + 1]].tolist())
        feature = cache.array("image/projected").read(np.asarray([row]))[0].astype(np.float64)
        unit = vectors[0] / np.linalg.norm(vectors[0], axis=1, keepdims=True)
        chosen = set(np.argsort(-(unit @ feature))[: len(labels)].tolist())
        right += len(chosen & labels)
        expected += [(c, d, row) for c in labels - chosen for d in chosen - labels]
    found_errors = zip(
        found.true.tolist(), found.taken.tolist(), found.error_rows.tolist(), strict=True
    )
    assert sorted(found_errors) == sorted(expected)
    assert found.right == right
    confusions.draw(found, ["a", "b", "c"])


def test_a_matrix_of_many_classes_keeps_the_confused_ones() -> None:
    num_classes = 100
    true, taken = np.asarray([7] * 5 + [50]), np.asarray([90] * 5 + [51])
    counts = np.full(num_classes, 10)
    found = confusions.Confusion(
        "test", np.arange(1000), "plain", 994, 1000, true, taken, np.arange(6), counts
    )
    axes = confusions.draw(found, [f"class {c}" for c in range(num_classes)]).axes[0]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == [
        "class 7",
        "class 50",
        "class 51",
        "class 90",
    ]
    shares = axes.images[0].get_array()
    np.testing.assert_allclose(np.diag(shares), [0.5, 0.9, 1, 1])
    assert shares[0, 3] == 0.5


@pytest.mark.parametrize("num_classes", [3, 100, 1000])
def test_the_histogram_shows_every_class_in_its_group(num_classes: int) -> None:
    counts = np.arange(num_classes)[::-1] * 3
    groups = ["head" if count >= 100 else "tail" for count in counts]
    made = histogram.draw(counts, groups, [f"c{i}" for i in range(num_classes)], "train")
    (axes,) = made.axes
    if num_classes <= 400:
        heights = sorted(bar.get_height() for container in axes.containers for bar in container)
        assert heights == sorted(counts)
    assert [text.get_text() for text in made.legends[0].get_texts()] == [
        f"{group}: {groups.count(group):,} classes" for group in ("head", "tail") if group in groups
    ]


def test_points_are_coloured_by_class_taxon_or_split(written: Make, tmp_path: Path) -> None:
    cache = open_cache(written().path)
    rows = np.arange(4)
    assert projection.color_names(cache, rows) == (["oak", "no label", "日本", "oak"], "class")
    many = pd.DataFrame(
        {
            "name": [f"s{i}" for i in range(20)],
            "count": 20 - np.arange(20),
            "genus": [f"g{i // 4}" for i in range(20)],
            "family": [f"f{i // 10}" for i in range(20)],
            "group": ["head", "tail"] * 10,
        }
    )
    cache.__dict__["classes"] = many
    assert projection.color_names(cache, rows) == (["g0", "no label", "g0", "g0"], "genus")
    cache.__dict__["classes"] = many.drop(columns=["genus", "family"])
    names, title = projection.color_names(cache, np.arange(20))
    assert title == "class"
    assert set(names) == {"s0", "s1", "s2", "no label"}


class Page(HTMLParser):
    """Checks nesting; collects text, headings and pictures."""

    VOID = ("meta", "img", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "img":
            self.images.append(str(values["src"]))
            assert values["alt"]
        if "href" in values:
            self.links.append(str(values["href"]))
        if "id" in values:
            self.ids.append(str(values["id"]))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


@pytest.fixture(scope="module")
def photos(
    tiny_clip: Path,
    make_jpeg: Callable[[int, int, int], bytes],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A cache of 3 classes with a copy, a re-encoded copy and a broken image in its test split."""
    folder = tmp_path_factory.mktemp("report")
    number = 0
    for split, count in (("train", 24), ("test", 6)):
        for name in ("ash & elm", "oak", "yew"):
            for _ in range(count):
                file = folder / "images" / split / name / f"{number:03d}.jpg"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(make_jpeg(40, 48, number))
                number += 1
    train = sorted((folder / "images/train").rglob("*.jpg"))
    test = sorted((folder / "images/test").rglob("*.jpg"))
    shutil.copy(train[3], test[0])
    with Image.open(train[30]) as image:
        image.save(test[7], quality=95)
    test[12].write_bytes(b"no image")
    extract(
        ExtractConfig(
            cache=folder / "cache",
            dataset=FolderConfig(root=folder / "images"),
            backbone=OpenClipConfig(model=f"local-dir:{tiny_clip}"),
            max_invalid=0.1,
            device="cpu",
        )
    )
    return folder


def options(folder: Path, **more: Any) -> Config:
    values: dict[str, Any] = {
        "cache": folder / "cache",
        "out": folder / "report.html",
        "points": 40,
        "neighbours": "none",
        "device": "cpu",
        "quiet": True,
    }
    return ReportConfig(**(values | more))


def test_the_page_is_whole_and_needs_nothing_else(photos: Path) -> None:
    made = report.run(options(photos, neighbours="tsne"))
    text = made.out.read_text(encoding="utf-8")
    page = Page(text)
    assert re.search(r"(src|href)=\"(?!data:|#)", text) is None
    assert "url(" not in text
    assert "<script" not in text
    assert [link.removeprefix("#") for link in page.links] == page.ids
    assert page.ids == [
        "splits",
        "classes",
        "samples",
        "projection",
        "leaks",
        "confusion",
        "unreadable",
        "identity",
    ]
    for source in page.images:
        kind, data = source.removeprefix("data:").split(";base64,")
        content = base64.b64decode(data)
        if kind == "image/svg+xml":
            assert ElementTree.fromstring(content).tag.endswith("svg")
        else:
            with Image.open(io.BytesIO(content)) as image:
                assert image.format == "JPEG"
                image.load()
    (leak,) = made.leaks
    cache = open_cache(photos / "cache")
    assert [[cache.paths[row] for row in pair] for pair in leak.exact.tolist()] == [
        ["test/ash & elm/072.jpg", "train/ash & elm/003.jpg"]
    ]
    assert [[cache.paths[row] for row in pair] for pair in leak.near.tolist()] == [
        ["test/oak/079.jpg", "train/oak/030.jpg"]
    ]
    assert "test/oak/079.jpg = train/oak/030.jpg" in page.text
    assert made.confusion is not None
    assert f"{made.confusion.recall:.1%} of the images are right" in page.text
    assert "ash & elm" in page.text
    assert "ash & elm" not in text, "names are escaped"


def test_the_same_cache_gives_the_same_page(photos: Path) -> None:
    names = ("a.html", "b.html")
    pages = [report.run(options(photos, out=photos / name)).out.read_bytes() for name in names]
    assert pages[0] == pages[1]
    other = report.run(options(photos, out=photos / "c.html", seed=1)).out.read_bytes()
    assert other != pages[0]


def test_images_that_are_gone_become_grey_tiles(photos: Path, tmp_path: Path) -> None:
    made = report.run(options(photos, root=str(tmp_path), out=tmp_path / "x" / "r.html"))
    page = Page(made.out.read_text(encoding="utf-8"))
    assert "24 of them cannot be read now (grey)" in page.text
    tiles = [base64.b64decode(s.split(",")[1]) for s in page.images if "jpeg" in s]
    assert len(set(tiles)) == 1, "all say the same: missing"
    with Image.open(io.BytesIO(tiles[0])) as image:
        assert image.getpixel((3, 3)) == pytest.approx((226, 230, 234), abs=3)


@pytest.mark.parametrize("task", ["unlabelled", "single_label", "multi_label"])
def test_caches_of_every_kind_and_without_backbone(
    written: Make, tmp_path: Path, task: str
) -> None:
    made = written(num_rows=30, task=task, captions=2, views=2)
    found = report.run(
        ReportConfig(cache=made.path, out=tmp_path / "r.html", quiet=True, device="cpu")
    )
    page = Page((tmp_path / "r.html").read_text(encoding="utf-8"))
    assert found.confusion is None
    assert ("Not made" in page.text) == (task != "unlabelled")
    assert ("classes" in page.ids) == (page.text.count("3 classes with") == 1)


def test_a_confusion_asked_for_is_made_or_an_error(written: Make, tmp_path: Path) -> None:
    config = ReportConfig(
        cache=written().path, out=tmp_path / "r.html", quiet=True, zero_shot="yes"
    )
    with pytest.raises(CacheError, match="backbone kind 'none'"):
        report.run(config.model_copy(update={"neighbours": "none"}))


def test_one_split_cannot_leak(written: Make) -> None:
    cache = open_cache(written().path)
    cache.attributes = {**cache.attributes, "splits": {"train": [0, 20]}}
    assert find_leaks(cache, None, 0.9, 10**9, CPU) == []


def figure_text(title: str) -> str:
    made = style.figure(2, 2)
    style.dress(made.subplots(), title)
    return base64.b64decode(style.data_uri(made).split(",")[1]).decode()


def test_equal_figures_give_equal_bytes() -> None:
    assert figure_text("oak") == figure_text("oak")
    assert "<text" not in figure_text("oak"), "outlines: every reader has the same font"


def test_letters_that_the_font_lacks_are_left_to_the_reader() -> None:
    assert "日本" in figure_text("日本")


def test_bad_options_are_named(written: Make, tmp_path: Path) -> None:
    made = written()
    with pytest.raises(ConfigError, match=r"has to end with \.html"):
        report.run(ReportConfig(cache=made.path, out=tmp_path / "r.pdf", quiet=True))
    with pytest.raises(ConfigError, match="is a folder; name a file"):
        report.run(ReportConfig(cache=made.path, out=tmp_path, quiet=True))
    with pytest.raises(CacheError, match="no such cache"):
        report.run(ReportConfig(cache=tmp_path / "no", out=tmp_path / "r.html", quiet=True))
