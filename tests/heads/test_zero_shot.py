"""The zero-shot classifier: ensembling, choice of prompts, scores."""

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from featcache.errors import BackboneError, ConfigError
from featcache.prompts import TEMPLATES
from featcache.reader import open_cache
from heads import evaluate, train, vocabulary
from heads.base import FeatureSpec
from heads.evaluate import EvaluateConfig
from heads.models.zero_shot import ZeroShot, ZeroShotConfig, ensemble
from heads.run_folder import load_run, read_tensors


def spec(prompts: torch.Tensor | None, task: str = "single_label", dim: int = 8) -> FeatureSpec:
    classes = pd.DataFrame({"name": ["a", "b", "c"], "count": 1})
    return FeatureSpec(dim, 3, task, np.ones(3, np.int64), classes, prompts, 100.0)


def prompts(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([1.0, 50.0])[:, None, None]
    return lengths * torch.randn(2, 3, 8, generator=generator)


def test_each_template_is_normalised_before_the_mean() -> None:
    found = ensemble(prompts()).numpy()
    given = prompts().numpy().astype(np.float64)
    for c in range(3):
        total = np.zeros(8)
        for t in range(2):
            total += given[t, c] / np.linalg.norm(given[t, c])
        np.testing.assert_allclose(found[c], total / np.linalg.norm(total), atol=1e-6)
    plain = torch.nn.functional.normalize(prompts().mean(0), dim=-1).numpy()
    assert np.abs(found - plain).max() > 0.1, "the long template did not dominate anyway"


def test_scores_are_scaled_cosines_of_features_of_any_length() -> None:
    head = ZeroShotConfig(scale=7.0).build(spec(prompts()))
    features = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    expected = torch.cosine_similarity(features[:, None], ensemble(prompts())[None], dim=-1)
    torch.testing.assert_close(head(features), 7 * expected)
    torch.testing.assert_close(head(30 * features), 7 * expected)
    assert not list(head.parameters())


def test_scale_defaults_to_the_backbones() -> None:
    assert ZeroShotConfig().build(spec(prompts())).scale == 100.0


def test_a_multi_label_score_of_the_threshold_is_one_half() -> None:
    head = ZeroShotConfig(cosine_threshold=0.25).build(spec(prompts(), "multi_label"))
    vector = head.vectors[0]
    other = torch.linalg.qr(torch.stack([vector, torch.ones(8)], 1)).Q[:, 1]
    feature = 0.25 * vector + (1 - 0.25**2) ** 0.5 * other
    assert float(head(feature[None]).sigmoid()[0, 0]) == pytest.approx(0.5, abs=1e-4)


@pytest.mark.parametrize(
    ("columns", "options", "expected"),
    [
        (["common_name", "scientific_name"], {}, "both"),
        (["common_name", "scientific_name"], {"name_type": "common"}, "common"),
        (["common_name", "scientific_name", "genus"], {"templates": "biology"}, "biology"),
        (["genus"], {}, "biology"),
        (["make", "model"], {}, "vehicles"),
        ([], {}, "generic"),
        ([], {"name_type": "scientific"}, "scientific"),
    ],
)
def test_choice_of_prompts(columns: list[str], options: dict, expected: str) -> None:
    classes = pd.DataFrame({name: ["x"] for name in ["name", *columns]})
    assert ZeroShotConfig(**options).template_names(classes, "table") == list(TEMPLATES[expected])


def test_own_templates_are_taken_as_they_are() -> None:
    classes = pd.DataFrame({"name": ["x"]})
    config = ZeroShotConfig(templates=["the {name}"])
    assert config.template_names(classes, "table") == ["the {name}"]


def test_contradicting_and_unknown_prompts_are_refused() -> None:
    with pytest.raises(ValueError, match="both choose the prompts"):
        ZeroShotConfig(name_type="both", templates="biology")
    with pytest.raises(ConfigError, match="no template set 'bio'; known: biology"):
        ZeroShotConfig(templates="bio").template_names(pd.DataFrame({"name": ["x"]}), "table")


def test_features_outside_the_shared_space_are_refused() -> None:
    with pytest.raises(BackboneError, match="width 8, image features 9"):
        ZeroShotConfig().build(spec(prompts(), dim=9))


def test_there_is_nothing_to_train() -> None:
    head = ZeroShot(ensemble(prompts()), scale=1.0)
    assert not head.trainable
    with pytest.raises(TypeError, match="nothing to train"):
        head.loss((torch.zeros(1, 8),), torch.zeros(1, dtype=torch.int64), 0.0)


def test_weights_have_to_fit() -> None:
    classes = pd.DataFrame({"name": ["x"]})
    with pytest.raises(ConfigError, match="found 2 weights for 1 templates; give one for each"):
        ZeroShotConfig(templates="plain", template_weights=[1, 2]).template_names(classes, "table")
    with pytest.raises(ValueError, match="sum to 0; at least one has to be above 0"):
        ZeroShotConfig(template_weights=[0, 0])
    with pytest.raises(ValueError, match="both weigh the templates"):
        ZeroShotConfig(template_weights=[1], weigh_templates="validation")
    with pytest.raises(ValueError, match="greater than or equal to 0"):
        ZeroShotConfig(template_weights=[1, -1])


GOOD, BAD = "a good {name}", "a bad {name}"


class Encoder:
    """A text tower whose good sentences point at the class centres, bad ones at the next class."""

    def __init__(self, cache: Any, centres: np.ndarray) -> None:
        self.spec = SimpleNamespace(identity=cache.identity.backbone)
        self.precision = "fp32"
        self.centres = centres
        self.num_texts = 0

    def encode_text(self, texts: Sequence[str]) -> torch.Tensor:
        self.num_texts += len(texts)
        rows = []
        for text in texts:
            number = int(text.rsplit("c", 1)[1])
            rows.append(self.centres[(number + ("bad" in text)) % len(self.centres)])
        return torch.tensor(np.asarray(rows)).float()


@pytest.fixture
def trained(
    make_single: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> tuple[Callable[..., train.TrainReport], Encoder]:
    """Trains zero-shot heads on a cache whose text tower counts what it encodes."""
    path = make_single(noise=0.5)
    cache = open_cache(path)
    rows = cache.rows("train")
    features = cache.array("image/projected").read(rows).astype(np.float64)
    labels = cache.labels(rows)
    encoder = Encoder(cache, np.stack([features[labels == c].mean(0) for c in range(5)]))
    monkeypatch.setattr(vocabulary, "open_cache_backbone", lambda cache, device: encoder)

    def run(name: str, **options: Any) -> train.TrainReport:
        head = ZeroShotConfig(templates=[GOOD, BAD], **options)
        folder = path.parent.parent / name
        return train.run(
            train.TrainConfig(cache=path, head=head, run=folder, quiet=True, device="cpu")
        )

    return run, encoder


def test_new_weights_encode_no_text(
    trained: tuple[Callable[..., train.TrainReport], Encoder],
) -> None:
    run, encoder = trained
    plain = run("plain")
    assert encoder.num_texts == 10
    good, bad = run("good", template_weights=[1, 0]), run("bad", template_weights=[0, 1])
    assert encoder.num_texts == 10
    assert good.score > 0.9 > plain.score > bad.score
    loaded = load_run(good.run)
    expected = torch.nn.functional.normalize(torch.tensor(encoder.centres).float(), dim=-1)
    torch.testing.assert_close(loaded.head.vectors, expected)


def test_plain_cosines_have_no_metrics_at_a_threshold(
    make_multi: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = make_multi()
    encoder = Encoder(open_cache(path), np.random.default_rng(8).normal(size=(6, 12)))
    monkeypatch.setattr(vocabulary, "open_cache_backbone", lambda cache, device: encoder)
    found = {}
    for threshold in (None, 0.3):
        head = ZeroShotConfig(templates=[GOOD], cosine_threshold=threshold)
        run = path.parent.parent / str(threshold)
        config = train.TrainConfig(cache=path, head=head, run=run, device="cpu")
        report = train.run(config)
        printed = [capsys.readouterr().out]
        scores = evaluate.run(EvaluateConfig(run=run, split="test", device="cpu"))
        assert scores.metrics == report.metrics["test"]
        printed.append(capsys.readouterr().out)
        line = "no precision, recall and F1: plain cosines"
        assert [line in text for text in printed] == [threshold is None] * 2
        found[threshold] = scores
    plain, counted = found[None], found[0.3]
    assert plain.metrics["map"] == counted.metrics["map"] > 0.8
    assert {"micro_f1", "cp", "of1"} <= counted.metrics.keys() - plain.metrics.keys()
    assert plain.metrics.items() <= counted.metrics.items()
    assert set(counted.per_class) - set(plain.per_class) == {
        "num_predicted",
        "precision",
        "recall",
        "f1",
    }


def test_validation_picks_the_template(
    trained: tuple[Callable[..., train.TrainReport], Encoder],
) -> None:
    run, encoder = trained
    report = run("validation", weigh_templates="validation")
    assert encoder.num_texts == 10
    assert report.metrics["candidate"] == GOOD
    assert set(report.metrics["by_candidate"]) == {"", GOOD, BAD}
    good = run("good", template_weights=[1, 0])
    assert report.score == good.score
    loaded = load_run(report.run)
    assert loaded.config.templates == [GOOD]
    assert loaded.record["templates"] == [GOOD], "the folder keeps what the head needs"
    kept = read_tensors(report.run / "prompts.safetensors").tensors["prompts"]
    assert len(kept) == 1
    assert len(read_tensors(good.run / "prompts.safetensors").tensors["prompts"]) == 2
    torch.testing.assert_close(loaded.head.vectors, load_run(good.run).head.vectors)


def test_several_sets_are_compared_as_sets() -> None:
    names = [*TEMPLATES["cars"], "the {name}"]
    given = torch.randn(9, 3, 8, generator=torch.Generator().manual_seed(0))
    classes = pd.DataFrame({"name": ["a", "b", "c"], "count": 1})
    counts = np.ones(3, np.int64)
    full = FeatureSpec(8, 3, "single_label", counts, classes, given, 100.0, templates=names)
    config = ZeroShotConfig(templates=["cars", "the {name}"], weigh_templates="validation")
    assert config.template_names(classes, "table") == names
    features = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    found = dict(config.build(full).candidates(features))
    assert list(found) == ["", "cars", "the {name}"]
    for name, part in (("", given), ("cars", given[:8]), ("the {name}", given[8:])):
        vectors = ensemble(part)
        expected = 100 * torch.nn.functional.normalize(features, dim=-1) @ vectors.T
        torch.testing.assert_close(found[name], expected)
        torch.testing.assert_close(config.only(name).build(full)(features), expected)
