import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from featcache.backbones.open_clip import OpenClipConfig
from featcache.backbones.prompt_tower import PromptTower
from featcache.errors import ConfigError
from heads import optim as optimisation
from heads.base import FeatureSpec
from heads.losses import LOSSES, default_loss
from heads.losses.base import ClassStatistics
from heads.losses.class_specific_embedding import token_distances
from heads.models.lmpt_token import LmptToken, LmptTokenConfig
from heads.prompt_sequences import Position, prompt_sequences

from ..toy_tower import END, START, ToyTower

DIM, COUNTS = 16, np.asarray([120, 40, 6, 1])
NAMES = ["cat", "fire salamander", "ox", "tv_monitor"]
STATISTICS = ClassStatistics(COUNTS, 150)


def spec(
    tower: PromptTower | None = None, task: str = "multi_label", loss: str | None = None
) -> FeatureSpec:
    chosen = LOSSES[loss]() if loss else default_loss(task)
    return FeatureSpec(
        feature_dim=DIM,
        num_classes=len(NAMES),
        task=task,
        class_counts=COUNTS,
        classes=pd.DataFrame({"name": NAMES}),
        prompts=None,
        logit_scale=50.0,
        mean=torch.ones(DIM),
        std=torch.ones(DIM),
        num_rows=150,
        criterion=chosen.build(STATISTICS),
        text_tower=lambda: tower or ToyTower(DIM),
    )


def batch(num_rows: int = 24) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(98, 124, (num_rows, 30), generator=generator)
    lengths = torch.randint(0, 31, (num_rows, 1), generator=generator)
    ids[torch.arange(30) >= lengths] = 0
    targets = (torch.rand(num_rows, len(NAMES), generator=generator) < 0.4).float()
    return (torch.randn(num_rows, DIM, generator=generator), ids), targets


def build(tower: PromptTower | None = None, seed: int = 0, **options: Any) -> LmptToken:
    torch.manual_seed(seed)
    return LmptTokenConfig(**options).build(spec(tower))


@pytest.fixture(scope="module")
def clip_tower(tiny_clip: Path) -> PromptTower:
    return OpenClipConfig(model=f"local-dir:{tiny_clip}").open().prompt_tower()


@pytest.mark.parametrize("csc", [True, False])
def test_the_embeddings_of_a_phrase_give_the_zero_shot_features_of_that_phrase(
    tiny_clip: Path, csc: bool
) -> None:
    backbone = OpenClipConfig(model=f"local-dir:{tiny_clip}").open()
    names = [*NAMES, "Flora sp.", "St. Bernard's lily (white)"]
    classes = pd.DataFrame({"name": names})
    counts = np.ones(len(names), np.int64)
    wanted = dataclasses.replace(
        spec(backbone.prompt_tower()),
        classes=classes,
        class_counts=counts,
        num_classes=len(names),
        feature_dim=32,
        mean=None,
        std=None,
    )
    head = LmptTokenConfig(ctx_init="a photo of a", csc=csc, chunk=4).build(wanted).eval()
    texts = [f"a photo of a {name.replace('_', ' ')}." for name in names]
    expected = F.normalize(backbone.encode_text(texts), dim=-1)
    torch.testing.assert_close(head.vectors, expected, atol=1e-6, rtol=0)
    images = torch.randn(5, 32)
    torch.testing.assert_close(
        head(images), 50 * F.normalize(images, dim=-1) @ expected.T, atol=1e-4, rtol=0
    )
    assert head.prompts is not None
    assert head.prompts.context.shape[-2] == 4, "M is the number of tokens of the phrase"


@pytest.mark.parametrize(
    ("position", "expected"),
    [("end", "VVVVVox."), ("middle", "VVoxVVV."), ("front", "oxVVVVV.")],
)
def test_f18_positions_permute_and_names_stay_whole(position: Position, expected: str) -> None:
    tower = ToyTower(DIM)
    found = prompt_sequences(tower, ["ox", "fire salamander"], 5, position)
    marked = found.ids.scatter(1, found.places, ord("V"))

    def written(row: int) -> str:
        ids = marked[row, : int(found.lengths[row])].tolist()
        assert (ids[0], ids[-1]) == (START, END)
        return "".join(map(chr, ids[1:-1]))

    assert written(0) == expected
    assert written(1) == expected.replace("ox", "firesalamander")
    assert found.lengths.tolist() == [10, 22], "the same end for all positions"
    assert (found.ids[0, 10:] == 0).all()
    assert found.mask.sum(1).tolist() == [10, 22]


def test_f18_real_token_lengths_of_clip_names(clip_tower: PromptTower) -> None:
    found = prompt_sequences(clip_tower, ["dog", "hippopotamus amphibius"], 3, "middle")
    ids, lengths = clip_tower.tokenize(["dog.", "hippopotamus amphibius."])
    assert lengths[1] > lengths[0] + 1, "a name of several tokens"
    assert found.lengths.tolist() == (lengths + 3).tolist()
    for row in range(2):
        name = ids[row, 1 : lengths[row] - 2].tolist()
        assert found.ids[row, 2 : 2 + len(name)].tolist() == name, "V name V V"


def test_prompts_that_do_not_fit_name_the_class() -> None:
    with pytest.raises(ConfigError, match="30 context vectors and the tokens of class 'fire sala"):
        build(n_ctx=30)
    with pytest.raises(ConfigError, match="n_ctx=3 contradicts head"):
        build(n_ctx=3, ctx_init="a b")


@pytest.mark.parametrize("csc", [True, False])
def test_f17_csc_can_be_switched(csc: bool) -> None:
    head = build(csc=csc, n_ctx=3)
    assert head.prompts is not None
    assert head.prompts.context.shape == ((4, 3, 6) if csc else (3, 6))
    before = head.class_vectors().detach()
    with torch.no_grad():
        head.prompts.context.view(-1, 3, 6)[0] += 1.0
    moved = (head.class_vectors() - before).abs().sum(1) > 1e-3
    assert moved.tolist() == [True, *[not csc] * 3]


@pytest.mark.parametrize(
    "changed",
    [
        {"cse": "nn_hinge"},
        {"cse_margin": 0.9},
        {"count_power": 0.0},
        {"m_ctx": 0},
        {"class_token_position": "front"},
        {"classification_weight": 0.9},
        {"cse_form": "sentence"},
        {"threshold": False},
        {"scale": 10.0},
        {"class_name": "the {name}"},
        {"ctx_init": "of a"},
        {"n_ctx": 4},
    ],
)
def test_f17_every_option_changes_what_is_trained_on(changed: dict[str, Any]) -> None:
    features, targets = batch()
    plain = build().loss(features, targets, 0.0)["loss"]
    if changed.get("cse_form") == "sentence":
        features = (features[0], torch.randn(len(targets), DIM))
    other = build(**changed).loss(features, targets, 0.0)["loss"]
    assert plain.item() != other.item()


@pytest.mark.parametrize("loss", [kind for kind in LOSSES if not LOSSES[kind].needs_cosines])
def test_f17_every_loss_on_logits_trains_the_context(loss: str) -> None:
    task = LOSSES[loss].tasks[-1]
    torch.manual_seed(0)
    head = LmptTokenConfig(classification_weight=1.0).build(spec(task=task, loss=loss))
    features, targets = batch()
    wanted = targets if task == "multi_label" else targets.argmax(1)
    parts = head.loss(features[:1], wanted, 0.0)
    assert "cse_loss" not in parts, "CoOp reads no captions"
    parts["loss"].backward()  # type: ignore[no-untyped-call]
    assert head.prompts is not None
    assert head.prompts.context.grad is not None
    assert head.prompts.context.grad.abs().sum() > 0


def test_lambda_one_reads_no_captions() -> None:
    assert LmptTokenConfig().training_arrays() == ("text/token_ids",)
    assert LmptTokenConfig(cse_form="sentence").training_arrays() == ("text/projected",)
    assert LmptTokenConfig(classification_weight=1).training_arrays() == ()


def test_the_loss_is_the_weighted_sum_of_both_parts() -> None:
    head = build(classification_weight=0.3, n_ctx=2, m_ctx=1)
    (image, ids), targets = batch()
    parts = head.loss((image, ids), targets, 0.0)
    assert head.prompts is not None
    prompts, mask = head.prompts.embeddings(), head.prompts.mask
    tower = head.prompts.tower
    length = prompts.shape[1]
    distances = token_distances(
        tower.embed((ids[:, :length] - 1).clamp(min=0)), ids[:, :length] > 0, prompts, mask, 1
    )
    assert head.losses.cse is not None
    cse = head.losses.cse(distances, targets)
    bce = F.binary_cross_entropy_with_logits(head.train()(image), targets)
    torch.testing.assert_close(parts["loss"], 0.3 * bce + 0.7 * cse)


def test_f12_captions_are_read_by_tokens_as_far_as_prompts_go() -> None:
    head = build(n_ctx=2)
    (image, ids), targets = batch()
    assert head.prompts is not None
    length = head.prompts.ids.shape[1]
    cut = ids.clone()
    cut[:, length:] = 120
    same = [head.loss((image, one), targets, 0.0)["cse_loss"] for one in (ids, cut)]
    assert torch.equal(*same)
    cut[:, 3] = 120
    assert head.loss((image, cut), targets, 0.0)["cse_loss"] != same[0]


def test_f13_labels_do_not_compete() -> None:
    head = build(threshold=False).eval()
    both = (head.vectors[0] + head.vectors[1])[None]
    probabilities = head(both).sigmoid()
    assert (probabilities[0, :2] > 0.5).all(), "a picture can hold two things"
    others = copy.deepcopy(head)
    others.vectors[1] = -others.vectors[1]
    others.prompts = None
    assert torch.equal(others(both)[:, 0], head(both)[:, 0]), "a class is scored by itself"


@pytest.mark.parametrize("chunk", [1, 3])
def test_chunks_give_the_same_loss_and_gradients(chunk: int) -> None:
    features, targets = batch()
    gradients = []
    for size in (None, chunk):
        head = build(chunk=size, n_ctx=3)
        loss = head.loss(features, targets, 0.0)["loss"]
        loss.backward()  # type: ignore[no-untyped-call]
        assert head.prompts is not None
        gradients.append((loss.detach(), head.prompts.context.grad))
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-5)


def test_class_vectors_are_made_again_only_when_the_context_has_changed() -> None:
    tower = ToyTower(DIM)
    head = build(tower, n_ctx=2).eval()
    image = torch.randn(3, DIM)
    with torch.inference_mode():
        first = head(image)
        calls = tower.calls
        assert torch.equal(head(image), first)
    assert tower.calls == calls
    optimizer = optimisation.build(
        optimisation.OptimConfig(optimizer="adamw", lr=0.1, weight_decay=0.0), head.train()
    )
    features, targets = batch()
    head.loss(features, targets, 0.0)["loss"].backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    head.eval()
    with torch.inference_mode():
        assert (head(image) - first).abs().max() > 1e-3, "a fused step is noticed"
    torch.testing.assert_close(head.vectors, head.class_vectors(), atol=1e-6, rtol=0)
    assert not head.vectors.is_inference()


def test_a_trained_head_predicts_without_a_tower() -> None:
    head = build(n_ctx=2)
    assert head.prompts is not None
    with torch.no_grad():
        head.prompts.context += 0.3
        assert head.threshold is not None
        head.threshold += 0.1
    head.eval()
    state = head.trained_state()
    assert state.keys() == {"prompts.context", "threshold", "vectors"}
    loaded = LmptTokenConfig(n_ctx=2).build(
        dataclasses.replace(spec(), text_tower=None, criterion=None, mean=None, std=None)
    )
    loaded.load_trained_state(state)
    image = torch.randn(6, DIM)
    torch.testing.assert_close(loaded.eval()(image), head(image))
    with pytest.raises(ValueError, match="not in both"):
        loaded.load_trained_state({"vectors": state["vectors"]})


def test_the_threshold_starts_where_logits_say_how_common_labels_are() -> None:
    head = build()
    assert head.threshold is not None
    # Rows with mean 1 and deviation 1 in each column, as the statistics say.
    rows = 1 + torch.randn(4000, DIM, generator=torch.Generator().manual_seed(0))
    logit = head.eval()(rows).mean().sigmoid().item()
    assert logit == pytest.approx(COUNTS.mean() / 150, abs=0.15)
    assert build(threshold=False).threshold is None
    single = LmptTokenConfig().build(spec(task="single_label"))
    assert single.threshold is None, "a softmax does not see it"


def test_the_threshold_is_not_decayed() -> None:
    groups = build().param_groups(0.1, 0.5)
    assert [group["weight_decay"] for group in groups] == [0.5, 0.0]
