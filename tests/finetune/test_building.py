"""What the options of class names mean: weight, scale, and when names are encoded."""

import json
import types
from typing import Any, cast

import numpy as np
import pandas as pd
import pytest
import torch

from featcache.adapters import ADAPTERS
from featcache.backbones.base import Backbone
from featcache.backbones.open_clip import OpenClipConfig
from finetune.tuning.building import build_head, build_objective
from finetune.tuning.examples import Material
from finetune.tuning.objective import Objective, ObjectiveName
from finetune.tuning.options import ClassifierConfig, TextConfig
from heads.parts import Part, Parts

from .colours import TINY

PART = Part("train", np.arange(4), np.array([0, 1, 1, 0]))
MATERIAL = cast(
    Material,
    types.SimpleNamespace(
        classes=pd.DataFrame({"name": ["cat", "dog"]}),
        kind="table",
        num_classes=2,
        task="single_label",
    ),
)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    file = tmp_path_factory.mktemp("building") / "building-tiny.json"
    file.write_text(json.dumps(TINY))
    return OpenClipConfig(model=str(file), pretrained="random:3").open()


def objective(
    backbone: Backbone,
    name: ObjectiveName = "classification",
    adapter: str = "linear",
    text: TextConfig | None = None,
    **options: Any,
) -> Objective:
    config = ADAPTERS[adapter].model_validate(options)
    device = torch.device("cpu")
    head, _ = build_head(ClassifierConfig(), None, name, MATERIAL, backbone, device)
    attached = config.attach(backbone.trainable())
    parts = Parts(PART, PART, None)
    text = text or TextConfig()
    return build_objective(name, head, None, text, MATERIAL, backbone, attached, config, parts, 1)


def test_alignment_counts_as_published(backbone: Backbone) -> None:
    """Three tenths beside the head, with the scale that the backbone was trained with."""
    made = objective(backbone)
    assert made.text_weight == 0.3
    assert made.text_scale == pytest.approx(backbone.spec.logit_scale)
    assert made.text_scale == pytest.approx(1 / 0.07), "else the next test shows nothing"
    chosen = objective(backbone, text=TextConfig(weight=0.5, scale=7.0))
    assert (chosen.text_weight, chosen.text_scale) == (0.5, 7.0)


def test_class_names_alone_have_clip_loras_scale(backbone: Backbone) -> None:
    made = objective(backbone, "image_text", "full")
    assert (made.head, made.text_weight, made.text_scale) == (None, 1.0, 100.0)


@pytest.mark.parametrize(
    ("options", "live"),
    [
        ({"adapter": "full", "towers": "image"}, False),
        ({"adapter": "full", "towers": "text"}, True),
        ({"adapter": "full", "towers": "both"}, True),
        ({"adapter": "linear"}, False),
    ],
)
def test_names_are_encoded_in_every_step_where_their_tower_is_trained(
    backbone: Backbone, options: dict[str, Any], live: bool
) -> None:
    text = objective(backbone, **options).text
    assert text is not None
    assert (text.fixed is None) == live
    vectors = text()
    assert vectors.requires_grad == live
    assert torch.allclose(vectors.norm(dim=-1), torch.ones(2))
