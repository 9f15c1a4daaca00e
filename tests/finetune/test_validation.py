"""Zero-shot accuracy and recall against slow written-out definitions."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from featcache.backbones.base import PixelSpec
from finetune.contrastive import validation
from finetune.contrastive.architectures import build, tokenizer
from finetune.contrastive.validation import Validation, retrieval_recall, zero_shot_top1
from finetune.images.loading import LoadingConfig
from heads.run_folder import RunError

from .toy_pretraining import TINY_RN, TINY_VIT, toy_config, write_toy


def test_zero_shot_skips_rows_without_label_and_breaks_ties_low() -> None:
    images = torch.eye(3)
    classes = torch.stack([images[0], images[1], images[1]])
    assert zero_shot_top1(images, classes, np.array([0, 1, -1])) == 1.0
    assert zero_shot_top1(images, classes, np.array([0, 2, 1])) == pytest.approx(1 / 3)


def test_recall_equals_a_sort_of_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation, "ROWS_AT_A_TIME", 3)
    random = np.random.default_rng(0)
    own = [[0, 1], [2], [1, 3, 4], [5], [5, 6], [7], [8]]  # texts 1 and 5 have two images
    offsets = np.cumsum([0, *map(len, own)])
    images = F.normalize(torch.from_numpy(random.normal(size=(7, 4))), dim=-1)
    texts = F.normalize(torch.from_numpy(random.normal(size=(9, 4))), dim=-1)
    found = retrieval_recall(images, texts, offsets, np.concatenate(own), ks=(1, 3))
    scores = (images @ texts.T).numpy()
    for k in (1, 3):
        hits = [bool(set(np.argsort(-scores[i])[:k]) & set(own[i])) for i in range(7)]
        assert found[f"image_to_text_recall_at_{k}"] == pytest.approx(np.mean(hits))
        owners = [{i for i in range(7) if text in own[i]} for text in range(9)]
        hits = [bool(set(np.argsort(-scores[:, j])[:k]) & owners[j]) for j in range(9)]
        assert found[f"text_to_image_recall_at_{k}"] == pytest.approx(np.mean(hits))


def test_a_collapsed_model_recalls_nothing() -> None:
    same = torch.ones(6, 2)
    found = retrieval_recall(same, same, np.arange(7), np.arange(6))
    assert set(found.values()) == {0.0}
    nothing = torch.full((6, 2), torch.nan)
    found = retrieval_recall(nothing, nothing, np.arange(7), np.arange(6))
    assert set(found.values()) == {0.0}


def test_ranks_that_reach_all_candidates_are_left_out() -> None:
    """Of 6 images and 6 texts, recall at 6 is 1 whatever the model."""
    one = F.normalize(torch.eye(6), dim=-1)
    found = retrieval_recall(one, one, np.arange(7), np.arange(6), ks=(1, 5, 6, 10))
    assert {name.rpartition("_")[2] for name in found} == {"1", "5"}


def test_any_of_an_images_own_captions_is_a_hit() -> None:
    """One caption is the best of all, the other the worst; and likewise for a caption's images."""
    images = F.normalize(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.1]]), dim=-1)
    texts = F.normalize(torch.tensor([[1.0, 0.05], [-1.0, 0.2], [0.1, 1.0]]), dim=-1)
    offsets, own = np.array([0, 2, 3, 4]), np.array([0, 1, 2, 0])
    found = retrieval_recall(images, texts, offsets, own, ks=(1,))
    assert found["image_to_text_recall_at_1"] == pytest.approx(2 / 3)  # the third has the first's
    assert found["text_to_image_recall_at_1"] == pytest.approx(2 / 3)  # the second is the third's


def measured(folder: Path, model: nn.Module, size: int = 16) -> dict[str, float]:
    """Metrics of the toy's validation split."""
    config = toy_config(folder)
    manifest, tokens = config.dataset.open(), tokenizer(TINY_VIT)
    texts, prompts = Validation.tables(manifest, "val", "a {name}", tokens)
    spec = PixelSpec((size, size), (0.5,) * 3, (0.5,) * 3)
    options = LoadingConfig(num_readers=2, max_unreadable=0.5)
    opened = Validation.open(manifest, "val", texts, prompts, spec, options, torch.device("cpu"))
    try:
        return opened.measure(model)
    finally:
        opened.images.close()


def test_captions_of_unreadable_images_are_no_misses(tmp_path: Path) -> None:
    """The metrics are those of the readable rows, as if the others were not in the table."""
    write_toy(tmp_path)
    table = tmp_path / "toy.csv"
    lines = table.read_text().splitlines()
    torch.manual_seed(0)
    model = build(TINY_VIT)
    table.write_text("\n".join(lines[:-1]))
    expected = measured(tmp_path, model)
    (tmp_path / "47.png").write_bytes(b"no picture")
    table.write_text("\n".join([*lines[:-1], lines[-1].rsplit(",", 1)[0] + ",nobody's words"]))
    assert measured(tmp_path, model) == pytest.approx(expected, abs=1e-9)


def test_a_model_in_training_is_measured_as_it_is_used(tmp_path: Path) -> None:
    """By running statistics, which stay as they are; and it goes on in training."""
    write_toy(tmp_path)
    torch.manual_seed(0)
    model = build(TINY_RN)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 2.0)
            norm.running_mean = torch.randn(norm.num_features) * 0.3
    expected = measured(tmp_path, model.eval(), 32)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    found = measured(tmp_path, model.train(), 32)
    assert found == expected
    assert all(part.training for part in model.modules())
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_diverged_weights_are_not_measured(tmp_path: Path) -> None:
    write_toy(tmp_path)
    torch.manual_seed(0)
    model = build(TINY_VIT)
    model.text_projection.data.fill_(torch.nan)
    with pytest.raises(RunError, match="text features are NaN or infinite"):
        measured(tmp_path, model)
