"""The loss of fine-tuning against the equations written out, row by row."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from featcache.backbones.trainable import TowerName, TrainableTowers
from finetune.tuning.loop import score
from finetune.tuning.objective import ClassText, Objective
from heads.losses.binary_cross_entropy import BinaryCrossEntropy
from heads.losses.cross_entropy import CrossEntropy
from heads.models.linear import Linear
from heads.parts import Part
from heads.run_folder import RunError

NUM_CLASSES, DIM, SCALE, WEIGHT = 3, 4, 20.0, 0.3
PROMPTS = [["a x", "a y", "a z"], ["one x", "one y", "one z"]]


class ToyText(TrainableTowers):
    """A text is the sum of its letters' vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.name, self.feature_dim, self.blocks = (
            nn.Embedding(128, DIM),
            "toy",
            DIM,
            {},
        )

    def encode_image(self, pixels: Tensor) -> Tensor:
        return pixels

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        return torch.tensor([[ord(c) for c in text.rjust(8)] for text in texts])

    def encode_text(self, tokens: Tensor) -> Tensor:
        return self.model(tokens).sum(1)

    def tower_of(self, name: str) -> TowerName | None:
        return "text"

    def tail(self, num_blocks: int) -> nn.Module:
        raise NotImplementedError


@pytest.fixture
def towers() -> ToyText:
    torch.manual_seed(1)
    return ToyText()


def made(towers: ToyText, task: str, trained: bool = False) -> Objective:
    torch.manual_seed(2)
    head = Linear(
        DIM,
        NUM_CLASSES,
        scaling="unit",
        weight=torch.randn(NUM_CLASSES, DIM),
        offset=torch.randn(3),
    )
    criterion = CrossEntropy() if task == "single_label" else BinaryCrossEntropy()
    text = ClassText(PROMPTS, towers, trained)
    return Objective(head, criterion, task, text, WEIGHT, SCALE)  # type: ignore[arg-type]


def class_vectors(towers: ToyText) -> np.ndarray:
    """T in float64: each template normed, mean, norm."""
    table = towers.model.weight.detach().double().numpy()
    rows = []
    for c in range(NUM_CLASSES):
        units = []
        for template in PROMPTS:
            vector = sum(table[ord(letter)] for letter in template[c].rjust(8))
            units.append(vector / np.linalg.norm(vector))
        mean = np.mean(units, axis=0)
        rows.append(mean / np.linalg.norm(mean))
    return np.asarray(rows)


def softmax_loss(logits: np.ndarray, label: int) -> float:
    return float(math.log(np.exp(logits).sum()) - logits[label])


def sigmoid_loss(logits: np.ndarray, wanted: np.ndarray) -> float:
    pairs = zip(logits, wanted, strict=True)
    return float(np.mean([math.log1p(math.exp(-z if y else z)) for z, y in pairs]))


@pytest.mark.parametrize("task", ["single_label", "multi_label"])
def test_equals_the_equations(towers: ToyText, task: str) -> None:
    objective = made(towers, task)
    features = torch.randn(5, DIM) * 3
    single = torch.tensor([0, 2, 1, 1, 0])
    several = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0], [0, 0, 1]]).float()
    targets = single if task == "single_label" else several
    objective.start_offset(features)
    assert objective.head is not None
    weight, bias = (t.detach().double().numpy() for t in objective.head.trained_state().values())
    text = class_vectors(towers)
    offset = 0.0
    if objective.offset is not None:
        units = features.double().numpy()
        units = units / np.linalg.norm(units, axis=1, keepdims=True)
        offset = -SCALE * float((units @ text.T).mean())
        assert float(objective.offset.detach()) == pytest.approx(offset, rel=1e-5)
    losses = []
    for row, wanted in zip(features.double().numpy(), targets.numpy(), strict=True):
        unit = row / np.linalg.norm(row)
        own, aligned = weight @ unit + bias, SCALE * (text @ unit) + offset
        loss = softmax_loss if task == "single_label" else sigmoid_loss
        losses.append(loss(own, wanted) + WEIGHT * loss(aligned, wanted))
    found = objective(features, targets, objective.vectors())
    assert float(found["loss"].detach()) == pytest.approx(np.mean(losses), rel=1e-5)
    parts = found["class_loss"] + WEIGHT * found["text_loss"]
    torch.testing.assert_close(found["loss"], parts)


def test_text_is_encoded_anew_only_where_its_tower_is_trained(towers: ToyText) -> None:
    fixed, live = made(towers, "single_label"), made(towers, "single_label", trained=True)
    features, targets = torch.randn(2, DIM), torch.tensor([0, 1])
    before = float(fixed(features, targets, fixed.vectors())["loss"].detach())
    assert float(live(features, targets, live.vectors())["loss"].detach()) == pytest.approx(before)
    with torch.no_grad():
        towers.model.weight.add_(torch.randn_like(towers.model.weight))
    assert float(fixed(features, targets, fixed.vectors())["loss"].detach()) == before
    loss = live(features, targets, live.vectors())["loss"]
    assert float(loss.detach()) != pytest.approx(before, rel=1e-3)
    loss.backward()
    assert towers.model.weight.grad is not None


def test_without_a_head_only_class_names_count(towers: ToyText) -> None:
    text = ClassText(PROMPTS, towers, trained=False)
    objective = Objective(None, CrossEntropy(), "single_label", text, 0.0, SCALE)
    found = objective(torch.randn(2, DIM), torch.tensor([0, 1]), objective.vectors())
    assert found.keys() == {"loss", "text_loss"}
    assert torch.equal(found["loss"], found["text_loss"])
    assert list(objective.parameters()) == []


def test_validation_in_which_nothing_is_labelled_is_refused(towers: ToyText) -> None:
    """Its mean average precision would be no number, and no epoch the best."""
    objective, device = made(towers, "multi_label"), torch.device("cpu")
    targets = np.zeros((5, NUM_CLASSES), np.uint8)
    with pytest.raises(RunError, match="no image of 'val' has a label"):
        score(objective, torch.randn(5, DIM), Part("val", np.arange(5), targets), device)
    targets[2, 1] = 1
    found, _ = score(objective, torch.randn(5, DIM), Part("val", np.arange(5), targets), device)
    assert 0 < found["cls"] <= 1
