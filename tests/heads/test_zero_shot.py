"""The zero-shot classifier: ensembling, choice of prompts, scores."""

import numpy as np
import pandas as pd
import pytest
import torch

from featcache.errors import BackboneError, ConfigError
from featcache.prompts import TEMPLATES
from heads.base import FeatureSpec
from heads.models.zero_shot import ZeroShot, ZeroShotConfig, ensemble


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
        head.loss(torch.zeros(1, 8), torch.zeros(1, dtype=torch.int64), 0.0)
