"""Zero-shot evaluation and demonstration: toy images, a tiny CLIP, open_clip's own classifier."""

import io
import json
import tarfile
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from featcache import extract
from featcache.backbones.adapted import AdaptedConfig
from featcache.backbones.base import FeatureRequest
from featcache.backbones.open_clip import OpenClipConfig
from featcache.class_lists import CIFAR100, class_list
from featcache.errors import (
    BackboneError,
    ConfigError,
    DatasetError,
    UnreadableImagesError,
)
from featcache.extract import ExtractConfig
from featcache.images import load_pixels
from featcache.prompts import TEMPLATES
from featcache.streamed import StreamedManifest
from heads.image_text import require_text
from heads.prediction_figure import Shown, grid, write_figures
from heads.scoring import gather
from heads.zero_shot import ZeroShotJobConfig, run

pytestmark = pytest.mark.usefixtures("opened_once")

MakeJpeg = Callable[[int, int, int], bytes]
NAMES = ("oak_tree", "sea", "pine_tree")


@pytest.fixture
def photos(tmp_path: Path, make_jpeg: MakeJpeg) -> Path:
    """Folder dataset of 17 test images of three classes, two of them with underscores."""
    root = tmp_path / "photos"
    for number in range(17):
        file = root / "test" / NAMES[number % 3] / f"{number:02d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(make_jpeg(40 + number, 60 - number, number))
    return root


@pytest.fixture
def job(photos: Path, tiny_clip: Path, tmp_path: Path) -> Callable[..., ZeroShotJobConfig]:
    """`job(...)`: an evaluation of the photos by the tiny CLIP, changed by options."""

    def make(**options: Any) -> ZeroShotJobConfig:
        values = {
            "dataset": {"kind": "folder", "root": photos},
            "backbone": {"model": f"local-dir:{tiny_clip}"},
            "precision": "fp32",
            "device": "cpu",
            "out": tmp_path / "out",
            "quiet": True,
        }
        return ZeroShotJobConfig.model_validate(values | options)

    return make


def test_equals_open_clips_own_classifier(
    photos: Path, tiny_clip: Path, job: Callable[..., ZeroShotJobConfig]
) -> None:
    import open_clip

    backbone = OpenClipConfig(model=f"local-dir:{tiny_clip}").open()
    names = ["oak tree", "pine tree", "sea"]  # folders in alphabetical order
    templates = ["a photo of a {}.", "a bad {}, from above", "{}"]
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tiny_clip}")
    weights = open_clip.build_zero_shot_classifier(backbone.model, tokenizer, names, templates)
    transform = backbone.reference_transform()
    truth, ranks = [], []
    for label, name in enumerate(names):
        for file in sorted((photos / "test" / name.replace(" ", "_")).iterdir()):
            with torch.no_grad(), Image.open(file) as image:
                x = backbone.model.encode_image(transform(image)[None], normalize=True)
            order = (100 * x @ weights)[0].argsort(descending=True).tolist()
            truth.append(label)
            ranks.append(order.index(label))
    ours = [template.replace("{}", "{name}") for template in templates]
    found = run(job(mode="reference", templates=ours))
    right = np.asarray(ranks) == 0
    assert 0 < right.sum() < 17, "the toy tells nothing"
    assert found.metrics["top1"] == pytest.approx(right.mean())
    assert found.metrics["top5"] == 1
    for label in range(3):
        share = right[np.asarray(truth) == label].mean()
        assert found.per_class["top1"][label] == pytest.approx(share)


def test_probabilities_are_open_clips(
    photos: Path, tiny_clip: Path, job: Callable[..., ZeroShotJobConfig]
) -> None:
    import open_clip

    backbone = OpenClipConfig(model=f"local-dir:{tiny_clip}").open()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tiny_clip}")
    weights = open_clip.build_zero_shot_classifier(
        backbone.model, tokenizer, list(CIFAR100), ["a photo of a {}."]
    )
    file = photos / "test" / "sea" / "01.jpg"
    with torch.no_grad(), Image.open(file) as image:
        x = backbone.model.encode_image(backbone.reference_transform()(image)[None], normalize=True)
    shares, index = (35 * x @ weights)[0].softmax(0).topk(5)
    found = run(job(dataset=None, images=file, mode="reference", figure=False)).table
    assert list(found["class"]) == [CIFAR100[number] for number in index]
    np.testing.assert_allclose(found["probability"], shares, rtol=1e-4)


def test_a_cache_gives_what_its_images_give(
    job: Callable[..., ZeroShotJobConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = job()
    cache = tmp_path / "cache"
    extracting = {
        "dataset": config.dataset,
        "backbone": config.backbone,
        "cache": cache,
        "precision": "fp32",
        "device": "cpu",
    }
    extract.run(ExtractConfig.model_validate(extracting))
    own: dict[str, Any] = {"dataset": None, "backbone": OpenClipConfig()}
    from_cache = run(job(**own, cache=cache, templates="cifar10"))
    from_images = run(job(templates="cifar10"))
    assert from_cache.metrics["top1"] == from_images.metrics["top1"]
    pd.testing.assert_frame_equal(from_cache.per_class, from_images.per_class)
    renamed = tmp_path / "names.txt"
    renamed.write_text("oak_tree\npine_tree\nsea\n")
    again = run(job(**own, cache=cache, templates="cifar10", classes=str(renamed)))
    assert again.metrics["top1"] == from_images.metrics["top1"]
    file = sorted((tmp_path / "photos" / "test" / "sea").iterdir())[0]
    shown = run(job(**own, cache=cache, images=file, figure=False)).table
    assert sorted(shown["class"]) == ["oak tree", "pine tree", "sea"]
    capsys.readouterr()


def test_f32_names_have_blanks_and_classes_are_told_apart_by_number(
    job: Callable[..., ZeroShotJobConfig], tmp_path: Path
) -> None:
    names = tmp_path / "names.txt"
    names.write_text("pine_tree\npine_tree\nsea")
    config = job(classes=str(names))
    config = config.model_copy(update={"templates": "plain"})
    found = run(config)
    assert list(found.per_class["name"]) == ["pine tree", "pine tree", "sea"]
    lines = found.files.text.read_text().splitlines()
    assert lines[0] == f"Top 1 accuracy: {100 * found.metrics['top1']:.2f}"
    assert lines[1] == "Top 5 accuracy: 100.00"
    assert lines[3].split() == ["Top-1", "Top-5", "Class", "name"]
    assert len(lines) == 4 + 3, "two classes of one name are two lines"
    assert all(len(line.split("  ")) >= 3 and "pine tree" in line for line in lines[4:6])
    assert found.per_class["top1"][1] == 0, "equal names: the first is named"


def test_f32_imagenet_classes_of_one_name_stay_two(
    job: Callable[..., ZeroShotJobConfig], tmp_path: Path, make_jpeg: MakeJpeg
) -> None:
    names = {"n02012849": "crane", "n03126707": "crane", "n02119789": "kit_fox"}
    for number, wordnet_id in enumerate(names):
        folder = tmp_path / "imagenet" / wordnet_id
        folder.mkdir(parents=True)
        (folder / "1.jpg").write_bytes(make_jpeg(40, 40, number))
    lines = [f"{key} {number} {name}" for number, (key, name) in enumerate(names.items(), start=1)]
    (tmp_path / "map.txt").write_text("\n".join(lines))
    dataset = {"kind": "wordnet_folder", "root": tmp_path / "imagenet"}
    found = run(job(dataset={**dataset, "names": tmp_path / "map.txt"}))
    assert list(found.per_class["name"]) == ["crane bird", "kit fox", "construction crane"]
    assert found.files.text.read_text().count("crane") == 2
    assert len(json.loads(found.files.metrics.read_text())["templates"]) == 80


@pytest.mark.parametrize("batch_size", [1, 5])
def test_f32_accuracy_is_over_images_whatever_the_batch(
    job: Callable[..., ZeroShotJobConfig], batch_size: int
) -> None:
    whole = run(job())
    found = run(job(batch_size=batch_size))
    assert found.metrics["num_rows"] == 17
    assert found.metrics["top1"] == whole.metrics["top1"]
    assert whole.metrics["top1"] * 17 == pytest.approx(round(whole.metrics["top1"] * 17))
    pd.testing.assert_frame_equal(found.per_class, whole.per_class)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_f33_any_number_of_images_is_drawn(count: int, tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 6), (200, 10, 10))
    shown = [Shown(f"{index}.jpg", image, ["a", "b"], [0.75, 0.25]) for index in range(count)]
    axes = grid(shown).axes
    assert len(axes) == 4 * -(-count // 2)
    drawn = [one for one in axes if one.get_images()]
    assert [one.get_title(loc="left") for one in drawn] == [one.title for one in shown]
    bars = [one for one in axes if one.patches]
    assert [[bar.get_width() for bar in one.patches] for one in bars] == [[0.75, 0.25]] * count


def test_a_long_path_shows_its_end() -> None:
    image = Image.new("RGB", (8, 6))
    long = f"{'folder/' * 9}an_image.jpg"
    axes = grid([Shown(long, image, ["a"], [1.0])]).axes
    title = axes[0].get_title(loc="left")
    assert len(title) == 30
    assert long.endswith(title.removeprefix("…"))


def test_more_images_than_a_picture_holds_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("heads.prediction_figure.IMAGES_PER_PAGE", 2)
    image = Image.new("RGB", (8, 6))
    shown = [Shown(f"{index}.jpg", image, ["a"], [1.0]) for index in range(3)]
    files = write_figures(tmp_path, shown, alone=False)
    assert [file.name for file in files] == ["demo.png", "demo_2.png"]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)
    write_figures(tmp_path, shown[:1], alone=False)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["demo.png"]


@pytest.mark.parametrize("flag", ["--show_prediction", "--show_predictions", "--figure"])
def test_f33_the_flags_of_the_earlier_program(flag: str, photos: Path) -> None:
    config = ZeroShotJobConfig.from_command_line(["--img_dir", str(photos), flag])
    assert config.figure
    assert config.images == photos
    assert ZeroShotJobConfig.from_command_line(["--img_path", "a.jpg"]).images == Path("a.jpg")
    assert ZeroShotJobConfig.from_values(config.record()) == config


def test_demonstration_prints_and_draws(
    job: Callable[..., ZeroShotJobConfig],
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = photos / "test" / "sea"
    (folder / "broken.jpg").write_bytes(b"no image")
    found = run(job(images=folder, quiet=False, top_k=2))
    lines = capsys.readouterr().out.splitlines()
    best = found.table.iloc[0]
    assert lines[0] == "01.jpg"
    assert lines[1] == f"  {best['class']}: {100 * best['probability']:.2f}%"
    assert set(found.table["class"]) <= {"oak tree", "pine tree", "sea"}, "the dataset's classes"
    assert list(found.table["rank"][:2]) == [1, 2]
    assert [one.path for one in found.unreadable] == ["broken.jpg"]
    assert "1 of 7 images cannot be read" in lines[-1]
    assert [file.name for file in found.figures] == ["demo.png"]
    single = run(job(images=folder / "01.jpg", dataset=None, classes="cifar10"))
    assert [file.name for file in single.figures] == ["single_img_demo.png"]
    written = pd.read_csv(tmp_path / "out" / "predictions.csv")
    assert len(written) == 5


def test_f07_unreadable_images_are_counted_and_never_scored(
    job: Callable[..., ZeroShotJobConfig], photos: Path
) -> None:
    sound = run(job())
    (photos / "test" / "oak_tree" / "00a.jpg").write_bytes(b"no image")
    with pytest.raises(UnreadableImagesError, match="1 of 18 images cannot be read"):
        run(job())
    found = run(job(max_unreadable=0.1, batch_size=4))
    assert found.metrics["num_rows"] == 17
    assert found.metrics["top1"] == sound.metrics["top1"]
    pd.testing.assert_frame_equal(found.per_class, sound.per_class)
    listed = pd.read_csv(found.files.text.with_suffix(".unreadable.csv"))
    assert list(listed["path"]) == ["test/oak_tree/00a.jpg"]


def test_several_labels_are_measured_by_precision(
    job: Callable[..., ZeroShotJobConfig], photos: Path, tmp_path: Path
) -> None:
    files = sorted(file.relative_to(photos).as_posix() for file in photos.rglob("*.jpg"))
    lists = ["oak;sea", "sea", "oak", "", "pine"] * 4
    frame = pd.DataFrame({"path": files, "labels": lists[: len(files)], "split": "test"})
    frame.to_csv(tmp_path / "several.csv", index=False)
    dataset = {
        "kind": "table",
        "file": tmp_path / "several.csv",
        "root": photos,
        "labels_column": "labels",
        "label_separator": ";",
    }
    found = run(job(dataset=dataset, templates="plain"))
    assert found.metrics["num_rows"] == 17
    assert found.metrics["map"] == pytest.approx(found.per_class["average_precision"].mean())
    assert "micro_f1" not in found.metrics, "a cosine has no threshold of its own"
    assert found.files.text.read_text().startswith("Mean average precision: ")


def test_classes_without_an_image_are_a_dash() -> None:
    from heads.scoring import MetricsConfig, summarise
    from heads.zero_shot_scores import class_accuracies, table_text

    classes = pd.DataFrame({"name": ["a", "b"], "count": [1, 1]})
    outputs = gather([(torch.eye(2), np.asarray([0, 0]))], classes, MetricsConfig())
    scores = summarise(outputs, classes, MetricsConfig())
    table = class_accuracies(outputs, scores.per_class)
    assert table_text(scores.metrics, table).splitlines()[-2:] == [
        " 50.00  100.00  a",
        "     -       -  b",
    ]


def test_templates(job: Callable[..., ZeroShotJobConfig], tmp_path: Path) -> None:
    plain = pd.DataFrame({"name": ["a"], "count": [0]})
    assert job().template_list("", plain) == ["a photo of a {name}."]
    assert job().template_list("cifar10", plain) == ["a photo of a {name}."]
    assert len(job().template_list("wordnet_folder", plain)) == 80
    assert job().template_list("dtd", plain) == list(TEMPLATES["dtd"])
    own = tmp_path / "own.txt"
    own.write_text("a {name}\n\nthe {name}\n")
    both = job(templates=[str(own), "plain"]).template_list("cifar10", plain)
    assert both == ["a {name}", "the {name}", "a photo of a {name}."]
    with pytest.raises(ConfigError, match="No such file"):
        job(templates="missing.txt").template_list("", plain)


def test_class_lists(tmp_path: Path) -> None:
    assert len(CIFAR100) == len(set(CIFAR100)) == 100
    assert CIFAR100[1] == "aquarium fish"
    assert not any("_" in name for name in CIFAR100)
    assert list(class_list("cifar10")["name"])[:2] == ["airplane", "automobile"]
    table = tmp_path / "names.csv"
    table.write_text("name,genus\nred_oak,Quercus\nbeech,Fagus\n")
    assert class_list(str(table))[["name", "genus"]].to_numpy().tolist() == [
        ["red oak", "Quercus"],
        ["beech", "Fagus"],
    ]
    for content, message in (
        ("", "has no name in it"),
        ("genus\na\n", "no column name"),
        ("name\n\n", "has no name in it"),
    ):
        file = tmp_path / ("bad.csv" if content else "bad.txt")
        file.write_text(content)
        with pytest.raises(ConfigError, match=message):
            class_list(str(file))
    with pytest.raises(ConfigError, match="no list that is built in"):
        class_list("imagenet-names")


def test_what_cannot_be_done_is_said_in_one_line(
    job: Callable[..., ZeroShotJobConfig], photos: Path, tmp_path: Path
) -> None:
    with pytest.raises(BackboneError, match="timm reads no text"):
        run(job(backbone={"kind": "timm", "model": "resnet10t", "pretrained": "random"}))
    with pytest.raises(ConfigError, match="no split 'val' in the dataset; it has test"):
        run(job(split="val"))
    with pytest.raises(ConfigError, match="10 names, the dataset has 3 classes"):
        run(job(classes="cifar10"))
    with pytest.raises(ValueError, match="give images"):
        job(dataset=None)
    with pytest.raises(ValueError, match="both say what is evaluated"):
        job(cache=tmp_path)
    with pytest.raises(ValueError, match="leave backbone out"):
        job(dataset=None, cache=tmp_path)
    with pytest.raises(ValueError, match="split=test is of an evaluation"):
        job(images=photos, split="test")
    empty = tmp_path / "unlabelled"
    (empty / "test").mkdir(parents=True)
    (empty / "test" / "a.jpg").write_bytes((photos / "test" / "sea" / "01.jpg").read_bytes())
    frame = pd.DataFrame({"path": ["test/a.jpg"], "split": ["test"]})
    frame.to_csv(empty / "rows.csv", index=False)
    with pytest.raises(DatasetError, match="no image has a label"):
        run(job(dataset={"kind": "table", "file": empty / "rows.csv"}))
    bad = empty / "bad"
    bad.mkdir()
    (bad / "a.jpg").write_bytes(b"no image")
    with pytest.raises(DatasetError, match="none of 1 images could be read"):
        run(job(images=bad))


def test_a_record_says_what_was_measured(job: Callable[..., ZeroShotJobConfig]) -> None:
    found = run(job(templates="plain", name="my set/1"))
    assert found.files.metrics.name == "my-set-1.json"
    record = json.loads(found.files.metrics.read_text())
    assert record["templates"] == ["a photo of a {name}."]
    assert record["scale"] == 100
    assert record["split"] == "test"
    assert record["top1"] == found.metrics["top1"]


def test_backbones_without_texts_are_refused_however_they_are_opened(tiny_clip: Path) -> None:
    from dataclasses import replace

    backbone = OpenClipConfig(model=f"local-dir:{tiny_clip}").open()
    require_text(backbone)
    mute = type("Mute", (), {"spec": replace(backbone.spec, has_text=False)})()
    with pytest.raises(BackboneError, match="reads no text"):
        require_text(mute)


def test_an_adapted_backbone_is_measured_as_any_other(
    job: Callable[..., ZeroShotJobConfig],
    photos: Path,
    tiny_clip: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from featcache.adapter_folder import write_adapter
    from featcache.adapters.lora import LoraConfig

    shared = OpenClipConfig.open
    monkeypatch.setattr(OpenClipConfig, "open", lambda *options: deepcopy(shared(*options)))
    base = OpenClipConfig(model=f"local-dir:{tiny_clip}")
    lora = LoraConfig(rank=2, towers="both")
    adapter = lora.attach(base.open("cpu", "fp32").trainable())
    with torch.no_grad():
        for parameter in adapter.trained_parameters().values():
            parameter.normal_(std=0.3)
    folder = tmp_path / "adapted"
    folder.mkdir()
    write_adapter(folder, base, base.open("cpu", "fp32"), lora, adapter.state())
    backbone = AdaptedConfig(model=str(folder)).open("cpu", "fp32")
    file = photos / "test" / "sea" / "01.jpg"
    names = ["oak tree", "pine tree", "sea"]
    pixels = load_pixels(file.read_bytes(), backbone.spec.pixels, "fast")
    image = F.normalize(backbone.encode_image(pixels, FeatureRequest())["projected"], dim=1)
    texts = F.normalize(backbone.encode_text([f"a photo of a {name}." for name in names]), dim=1)
    expected = (35 * image @ texts.T)[0].softmax(0)
    options: dict[str, Any] = {"images": file, "templates": "plain", "figure": False}
    table = run(job(backbone={"kind": "adapted", "model": str(folder)}, **options)).table
    found = table.set_index("class")["probability"][names]
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    before = run(job(**options)).table.set_index("class")["probability"][names]
    assert not np.allclose(found, before, rtol=1e-2), "the change of the towers is not seen"


def test_tars_are_evaluated_and_only_one_split_is_read(
    job: Callable[..., ZeroShotJobConfig],
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for split in ("train", "test"):
        (tmp_path / "tars" / split).mkdir(parents=True)
        with tarfile.open(tmp_path / "tars" / split / "000.tar", "w") as tar:
            for file in sorted(photos.rglob("*.jpg")):
                label = str(sorted(NAMES).index(file.parent.name)).encode()
                for name, data in ((file.name, file.read_bytes()), (f"{file.stem}.cls", label)):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    names = tmp_path / "names.txt"
    names.write_text("\n".join(sorted(NAMES)))
    tars = {split: str(tmp_path / "tars" / split / "*.tar") for split in ("train", "test")}
    dataset = {"kind": "webdataset", **tars, "classes": names, "index": tmp_path / "index"}
    read: list[tuple[int, int]] = []
    block = StreamedManifest.block

    def noting(manifest: StreamedManifest, start: int, stop: int) -> Any:
        read.append((start, stop))
        return block(manifest, start, stop)

    monkeypatch.setattr(StreamedManifest, "block", noting)
    found = run(job(dataset=dataset, templates="plain"))
    assert read == [(17, 34)]
    whole = run(job(templates="plain"))
    assert found.metrics["top1"] == whole.metrics["top1"]
    assert list(found.per_class["top1"]) == list(whole.per_class["top1"])
