import errno
import io
import json
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from featcache.backbones.blip import BlipConfig
from featcache.caption import CaptionConfig, run
from featcache.captioning.caption_list import CaptionList, open_list
from featcache.captioning.captioner import Captioner
from featcache.config import run_job
from featcache.datasets.path_lists import read_captions
from featcache.errors import BackboneError, CacheError, ConfigError, DatasetError


@pytest.fixture
def make(image_folder, tiny_captioner, tmp_path):
    """Configuration that captions the small image folder; keywords override."""

    def build(**changes):
        values = {
            "dataset": {"root": str(image_folder)},
            "model": str(tiny_captioner),
            "out": str(tmp_path / "captions.txt"),
            "num_beams": 2,
            "max_tokens": 6,
            "batch_size": 4,
            "num_readers": 2,
            "device": "cpu",
            "precision": "fp32",
            **changes,
        }
        return CaptionConfig.model_validate(values)

    return build


def parsed(path):
    """`path caption` lines, as long-tail datasets read them."""
    rows = [line.split(" ", 1) for line in path.read_text(encoding="utf-8").splitlines()]
    return dict(rows)


@pytest.fixture(scope="module")
def captioner(tiny_captioner):
    return Captioner(str(tiny_captioner), torch.device("cpu"), "fp32")


@pytest.mark.parametrize("prompt", ["a picture of", ""])
@pytest.mark.parametrize("num_beams", [1, 3])
def test_captions_are_the_models_own(tiny_captioner, captioner, make_photo, prompt, num_beams):
    from transformers import BertTokenizer, BlipForConditionalGeneration

    model = BlipForConditionalGeneration.from_pretrained(tiny_captioner, local_files_only=True)
    tokenizer = BertTokenizer.from_pretrained(tiny_captioner, local_files_only=True)
    images = [make_photo(40, 50, seed) for seed in range(3)]
    values = captioner.processor(images=images, return_tensors="pt")["pixel_values"]
    inputs = tokenizer([prompt] * 3, return_tensors="pt", return_token_type_ids=False)
    found = model.eval().generate(
        pixel_values=values, num_beams=num_beams, max_new_tokens=6, **(inputs if prompt else {})
    )
    expected = tokenizer.batch_decode(found, skip_special_tokens=True)
    pixels = torch.from_numpy(
        np.stack([np.array(image.resize((32, 32), Image.Resampling.BICUBIC)) for image in images])
    ).permute(0, 3, 1, 2)
    mine = captioner.captions(pixels, prompt=prompt, num_beams=num_beams, max_tokens=6)
    assert [f"{prompt} {text}".strip() for text in mine] == expected
    assert all(mine)


def test_the_list_has_a_line_for_each_image(make, image_folder, capsys):
    config = make()
    report = run(config)
    assert (report.num_written, report.num_done, report.unreadable) == (14, 0, [])
    captions = parsed(config.out)
    assert len(captions) == 14
    listed = read_captions(config.out, set(captions))  # what long-tail datasets read it with
    assert listed == {path: [caption] for path, caption in captions.items()}
    assert all((image_folder / path).is_file() for path in captions)
    assert all(caption.strip() == caption != "" for caption in captions.values())
    assert config.out.read_bytes().endswith(b"\n")
    record = json.loads((config.out.parent / "captions.txt.json").read_text())
    assert (record["prompt"], record["num_beams"]) == ("a picture of", 2)
    assert "14 captions written, 0 kept" in capsys.readouterr().out
    before = config.out.read_bytes()
    assert run(config).num_done == 14
    assert config.out.read_bytes() == before


def test_the_folder_dataset_reads_the_list(make):
    config = make(split="val")
    run(config)
    captions = parsed(config.out)
    dataset = config.dataset.model_copy(update={"captions": config.out})
    manifest = dataset.open()
    rows = manifest.block(0, len(manifest))
    counts = np.diff(rows.caption_offsets).tolist()
    assert counts == [int(path in captions) for path in rows.paths]
    assert rows.captions == [captions[path] for path in rows.paths if path in captions]
    assert sum(counts) == 4
    (config.out.parent / "other.txt").write_text("elsewhere/1.jpg a dog\n")
    other = dataset.model_copy(update={"captions": config.out.parent / "other.txt"})
    with pytest.raises(DatasetError, match="no caption is of a listed image"):
        other.open()


def test_interrupted_and_resumed_equals_uninterrupted(make, tmp_path, monkeypatch):
    whole = make(out=str(tmp_path / "whole.txt"))
    run(whole)
    config = make()
    captions, calls = Captioner.captions, []

    def interrupted(self, *arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return captions(self, *arguments, **options)

    monkeypatch.setattr(Captioner, "captions", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(config)
    monkeypatch.undo()
    assert len(parsed(config.out)) == 8
    with open(config.out, "ab") as file:  # what a crash in the middle of a write leaves behind
        file.write(b"train/cat/half.jpg a pict")
    report = run(config)
    assert (report.num_written, report.num_done) == (6, 8)
    assert parsed(config.out) == parsed(whole.out)


def test_a_grown_dataset_gets_what_is_missing(make, image_folder, make_jpeg):
    config = make(split="val")
    assert run(config).num_written == 4
    (image_folder / "val/cat/new.jpg").write_bytes(make_jpeg(50, 50, 99))
    report = run(config)
    assert (report.num_written, report.num_done) == (1, 4)
    assert "val/cat/new.jpg" in parsed(config.out)
    assert run(make()).num_written == 10
    with pytest.raises(ConfigError, match="split 'tset': the dataset has train, val"):
        run(make(split="tset"))


def test_unreadable_images_are_reported_and_tried_again(make, image_folder, make_jpeg, capsys):
    broken = image_folder / "train/cat/02.jpg"
    broken.write_bytes(b"not an image")
    config = make()
    report = run(config)
    assert [(one.path, one.id) for one in report.unreadable] == [("train/cat/02.jpg",) * 2]
    failures = config.out.with_name("captions.txt.unreadable.csv")
    assert pd.read_csv(failures)["path"].tolist() == ["train/cat/02.jpg"]
    assert "train/cat/02.jpg" not in parsed(config.out)
    assert "1 images have no caption" in capsys.readouterr().out
    broken.write_bytes(make_jpeg(40, 40, 2))
    assert run(config).num_written == 1
    assert not failures.exists()


def test_captions_are_one_line_and_never_empty(make, monkeypatch):
    config = make(split="val", batch_size=2)
    answers = iter([["a dog", ""], ["two cats", "x"]])
    monkeypatch.setattr(Captioner, "captions", lambda *_, **__: next(answers))
    report = run(config)
    assert [one.reason for one in report.unreadable] == ["empty caption"]
    assert sorted(parsed(config.out).values()) == ["a dog", "two cats", "x"]


def test_newlines_of_the_model_are_flattened(captioner, monkeypatch):
    monkeypatch.setattr(
        captioner.tokenizer, "batch_decode", lambda *_, **__: [" a dog\non  a\r\nmat "]
    )
    pixels = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    assert captioner.captions(pixels, prompt="", num_beams=1, max_tokens=3) == ["a dog on a mat"]


def test_a_path_with_a_blank_is_refused_before_anything_is_opened(make, image_folder, make_jpeg):
    (image_folder / "train/cat/my cat.jpg").write_bytes(make_jpeg(40, 40, 2))
    with pytest.raises(ConfigError, match=r"'train/cat/my cat.jpg' has a blank .*rename"):
        run(make(model="/no/such/model"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_beams": 3}, "num_beams differs: the list was written with 2, this job wants 3"),
        ({"prompt": "the"}, "prompt differs"),
        ({"precision": "bf16"}, "precision differs"),
    ],
)
def test_a_list_is_never_mixed(make, changes, message):
    run(make(split="val"))
    with pytest.raises(ConfigError, match=message):
        run(make(**changes))


def test_a_list_of_unknown_origin_is_left_alone(make):
    config = make()
    config.out.write_text("train/cat/00.jpg mine\n")
    with pytest.raises(ConfigError, match=r"captions.txt.json beside it.* is not"):
        run(config)
    assert config.out.read_text() == "train/cat/00.jpg mine\n"


def test_two_writers_are_kept_apart(tmp_path):
    path = tmp_path / "list.txt"
    with (
        open_list(path, {"model": "x"}),
        pytest.raises(CacheError, match="another process is writing it"),
        open_list(path, {"model": "x"}),
    ):
        pass
    with open_list(path, {"model": "x"}) as captions:
        captions.append(["a.jpg"], ["a dog"])
    assert path.read_text() == "a.jpg a dog\n"


def test_a_full_disk_leaves_whole_lines(tmp_path):
    class Full(io.FileIO):
        def write(self, data):
            if self.tell() > 12:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data[:5])

    path = tmp_path / "list.txt"
    with Full(path, "w") as file:
        captions = CaptionList(path, file, set())
        captions.append(["a.jpg"], ["dog"])
        with pytest.raises(CacheError, match=r"No space left on device.* goes on"):
            captions.append(["b.jpg", "c.jpg"], ["cat", "mat"])
    assert path.read_text() == "a.jpg dog\n"
    assert captions.done == {"a.jpg"}


def test_a_retrieval_models_weights_are_refused(make, tiny_blip):
    with pytest.raises(BackboneError, match="they are those of BlipForImageTextRetrieval"):
        run(make(model=str(tiny_blip)))
    assert BlipConfig(model=str(tiny_blip)).kind == "blip"


def test_the_command_line_says_what_it_does(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["caption", "--help"])
    with pytest.raises(SystemExit):
        run_job(CaptionConfig, run)
    shown = capsys.readouterr().out
    assert "path caption" in shown
    assert "--num_beams" in shown


def test_it_runs_from_the_command_line(make, monkeypatch, capfd):
    config = make(split="val")
    arguments = [
        *("--dataset.root", str(config.dataset.root), "--model", config.model, "--split", "val"),
        *("--out", str(config.out), "--num_beams", "1", "--max_tokens", "4", "--device", "cpu"),
    ]
    monkeypatch.setattr(sys, "argv", ["caption", *arguments])
    with pytest.raises(SystemExit) as ended:
        run_job(CaptionConfig, run)
    assert ended.value.code == 0
    output = capfd.readouterr()
    assert "4 captions written" in output.out
    assert output.err == ""  # no progress bar over the weights, no warnings
    assert len(parsed(config.out)) == 4
