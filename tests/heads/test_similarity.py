"""Similarity matrices: cosines of every source, own pairs, and the picture."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from featcache import extract
from featcache.backbones.base import FeatureRequest
from featcache.backbones.open_clip import OpenClipConfig
from featcache.errors import ConfigError, DatasetError
from featcache.extract import ExtractConfig
from featcache.images import load_pixels
from heads.similarity import (
    Similarity,
    SimilarityConfig,
    first_captions,
    one_of_each_class,
    run,
    spread,
    wrapped,
)
from heads.similarity_figure import matrix

pytestmark = pytest.mark.usefixtures("opened_once")


@pytest.fixture
def captioned(tmp_path: Path, make_jpeg: Callable[[int, int, int], bytes]) -> Path:
    """Table of eight images with two captions each; two share their first one."""
    lines = ["path,split,caption"]
    for number in range(8):
        (tmp_path / f"{number}.jpg").write_bytes(make_jpeg(40, 50 + number, number))
        for text in (f"picture {number // 2 if number < 2 else number}", f"second {number}"):
            lines.append(f"{number}.jpg,test,{text}")
    file = tmp_path / "captions.csv"
    file.write_text("\n".join(lines))
    return file


def config(tiny_clip: Path, out: Path, **options: Any) -> SimilarityConfig:
    values = {
        "backbone": {"model": f"local-dir:{tiny_clip}"},
        "precision": "fp32",
        "device": "cpu",
        "out": out / "matrix.png",
    }
    return SimilarityConfig.model_validate(values | options)


def test_cosines_are_those_of_the_towers_and_a_cache_gives_the_same(
    captioned: Path, tiny_clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = {"kind": "table", "file": captioned, "repeated_rows": "captions"}
    options = {"dataset": dataset, "num_images": 4}
    found = run(config(tiny_clip, tmp_path, **options))
    assert found.paths == ["0.jpg", "2.jpg", "4.jpg", "6.jpg"]
    assert found.texts == ["picture 0", "picture 2", "picture 4", "picture 6"]
    backbone = OpenClipConfig(model=f"local-dir:{tiny_clip}").open()
    for column, path in enumerate(found.paths):
        pixels = load_pixels((tmp_path / path).read_bytes(), backbone.spec.pixels, "fast")
        image = backbone.encode_image(pixels, FeatureRequest())["projected"].numpy()[0]
        for row, text in enumerate(found.texts):
            other = backbone.encode_text([text]).numpy()[0]
            cosine = image @ other / np.linalg.norm(image) / np.linalg.norm(other)
            assert found.cosines[row, column] == pytest.approx(cosine, abs=1e-5)
    table = pd.read_csv(tmp_path / "matrix.csv", index_col="text")
    assert list(table.columns) == found.paths
    np.testing.assert_allclose(table.to_numpy(), found.cosines, rtol=1e-5)
    assert (tmp_path / "matrix.png").read_bytes().startswith(b"\x89PNG")

    cache = tmp_path / "cache"
    base = config(tiny_clip, tmp_path, **options)
    values = {"dataset": base.dataset, "backbone": base.backbone, "cache": cache, "device": "cpu"}
    extract.run(ExtractConfig.model_validate({**values, "precision": "fp32"}))
    own = {"backbone": OpenClipConfig(), "cache": cache, "num_images": 4}
    again = run(config(tiny_clip, tmp_path, **own))
    assert (again.paths, again.texts) == (found.paths, found.texts)
    np.testing.assert_allclose(again.cosines, found.cosines, atol=2e-3)  # stored as float16
    asked = run(config(tiny_clip, tmp_path, **own, texts=["picture 4", "other"]))
    assert asked.own is None
    np.testing.assert_allclose(asked.cosines[0], found.cosines[2], atol=2e-3)
    capsys.readouterr()


def test_equal_captions_are_one_text_that_several_images_own() -> None:
    captions = ["a", "b", "a", "c", "d", "b"]
    texts, numbers, own = first_captions(np.asarray([0, 1, 2]), np.asarray([0, 2, 4, 6]), captions)
    assert texts == ["a", "d"]
    assert numbers.tolist() == [0, 4]
    assert own.tolist() == [[True, True, False], [False, False, True]]


def test_summary() -> None:
    scores = np.asarray([[0.9, 0.1], [0.8, 0.3]], np.float32)
    found = Similarity("", ["a", "b"], ["x", "y"], scores, np.eye(2, dtype=bool)).summary()
    assert found == pytest.approx(
        {"own": 0.6, "foreign": 0.45, "images_right": 1.0, "texts_right": 0.5}
    )


def test_classes_stand_in_for_captions(
    image_folder: Path, tiny_clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = {"kind": "folder", "root": image_folder}
    found = run(config(tiny_clip, tmp_path, dataset=dataset))
    assert found.texts == ["cat", "dog"]
    assert [path.split("/")[:2] for path in found.paths] == [["val", "cat"], ["val", "dog"]]
    assert "own text is best" in capsys.readouterr().out
    (image_folder / "val" / "cat" / "bad.jpg").write_bytes(b"no image")
    mine = {"images": image_folder / "val" / "cat", "texts": "a, b"}
    shown = run(config(tiny_clip, tmp_path, **mine))
    assert shown.texts == ["a, b"]
    assert shown.cosines.shape == (1, 2)
    assert "left out: bad.jpg" in capsys.readouterr().out


def test_spread_and_classes() -> None:
    assert spread(10, 4).tolist() == [0, 2, 5, 7]
    assert spread(3, 8).tolist() == [0, 1, 2]
    places, classes = one_of_each_class(np.asarray([-1, 2, 0, 2, 1, 0]), 2)
    assert (places.tolist(), classes.tolist()) == ([2, 4], [0, 1])
    assert wrapped("word " * 100, 20, 2).count("\n") == 1


def test_own_pairs_are_framed_and_a_missing_image_is_grey(tmp_path: Path) -> None:
    scores = np.asarray([[0.9, 0.1]], np.float32)
    own = np.asarray([[True, False]])
    made = matrix(Similarity(tmp_path, ["gone.jpg", "gone2.jpg"], ["text"], scores, own))
    axes = made.axes[0]
    assert len(axes.get_images()) == 3
    assert [patch.get_x() for patch in axes.patches] == [pytest.approx(-0.47)]
    assert {text.get_text() for text in axes.texts} == {"0.90", "0.10"}


def test_what_cannot_be_done_is_said_in_one_line(
    image_folder: Path, captioned: Path, tiny_clip: Path, tmp_path: Path
) -> None:
    folder = {"kind": "folder", "root": image_folder}
    with pytest.raises(ValueError, match="give one of images, dataset, cache"):
        config(tiny_clip, tmp_path)
    with pytest.raises(ValueError, match="needs texts"):
        config(tiny_clip, tmp_path, images=image_folder)
    with pytest.raises(ValueError, match="leave backbone out"):
        config(tiny_clip, tmp_path, cache=tmp_path)
    with pytest.raises(DatasetError, match="no split 'dev'; it has train, val"):
        run(config(tiny_clip, tmp_path, dataset=folder, split="dev"))
    with pytest.raises(ConfigError, match="empty text"):
        run(config(tiny_clip, tmp_path, dataset=folder, texts=[" "]))
    bare = tmp_path / "bare.csv"
    bare.write_text("path,split\n0.jpg,test\n")
    with pytest.raises(DatasetError, match="give --texts"):
        run(config(tiny_clip, tmp_path, dataset={"kind": "table", "file": bare}))
