"""What fine-tuning minimises: classification by a linear head, and alignment with class names.

With f an image's feature, f̂ = f / |f|, y its label, T the unit class text features, κ the scale:

    L = CE(W f̂ + b, y) + λ CE(κ f̂ Tᵀ, y)                          one label an image
    L = ℓ(W f̂ + b, y) + λ BCE(κ f̂ Tᵀ + β, y)                      several labels

ℓ is any loss on logits of `heads.losses`. β is one trained number: cosines of CLIP are all positive
and close together, so a sigmoid without it would affirm every class. Without a head
(`image_text`) only CE(κ f̂ Tᵀ, y) is left.

T is the mean over templates of unit text features, brought to norm 1; computed once, or in every
step where the text tower is trained.

Reference: Radford et al., Learning Transferable Visual Models From Natural Language Supervision,
2021, sections 3.1.4 (T) and 3.2 (linear probe); the alignment alone: Zanella and Ben Ayed, Low-Rank
Few-Shot Adaptation of Vision-Language Models, 2024, equation 3. Departs from the latter with
several labels, which it does not know.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featcache.backbones.trainable import TrainableTowers
from featcache.class_text import ensemble
from featcache.manifest import Task
from heads.losses.base import Loss
from heads.models.linear import Linear

ObjectiveName = Literal["classification", "image_text"]
"""classification = head and alignment; image_text = alignment alone, as CLIP-LoRA trains."""


class ClassText(nn.Module):
    """Unit class text features, fixed or from a text tower that is being trained."""

    fixed: Tensor | None

    def __init__(
        self, prompts: Sequence[Sequence[str]], towers: TrainableTowers, trained: bool
    ) -> None:
        """Tokenizes the prompts, and encodes them unless the tower is trained.

        Args:
            prompts: T lists of C sentences.
            towers: with a text tower, on the final device.
            trained: whether the text tower changes from step to step.
        """
        super().__init__()
        distinct = {t: i for i, t in enumerate(dict.fromkeys(t for row in prompts for t in row))}
        self._towers = (towers,)  # in a tuple: no part of this module
        self.tokens = towers.tokenize(list(distinct))
        self.index = torch.tensor([[distinct[text] for text in row] for row in prompts])
        self.register_buffer("fixed", None, persistent=False)
        if not trained:
            with torch.no_grad():
                self.fixed = self._encoded()

    def forward(self) -> Tensor:
        """(C, P) float32 unit features."""
        return self._encoded() if self.fixed is None else self.fixed

    def _encoded(self, at_a_time: int = 256) -> Tensor:
        towers = self._towers[0]
        device = next(towers.model.parameters()).device
        parts = [
            towers.encode_text(self.tokens[start : start + at_a_time].to(device)).float()
            for start in range(0, len(self.tokens), at_a_time)
        ]
        return ensemble(torch.cat(parts)[self.index.to(device)])


class Objective(nn.Module):
    """The loss of image features, with what it trains besides the backbone."""

    def __init__(
        self,
        head: Linear | None,
        criterion: Loss,
        task: Task,
        text: ClassText | None = None,
        text_weight: float = 0.0,
        text_scale: float = 100.0,
    ) -> None:
        """See the module's text.

        Args:
            head: W and b with what the head does to a feature first; None = image_text.
            criterion: ℓ; a softmax cross-entropy for one label an image unless chosen otherwise.
            task: single_label or multi_label.
            text: T; None = no alignment.
            text_weight: λ; 0 = alignment is measured and not trained.
            text_scale: κ.
        """
        super().__init__()
        assert head is not None or text is not None, "nothing to train by"
        self.head, self.criterion, self.task, self.text = head, criterion, task, text
        self.text_weight = 1.0 if head is None else text_weight
        self.text_scale = text_scale
        several = task == "multi_label" and text is not None and self.text_weight > 0
        self.offset = nn.Parameter(torch.zeros(())) if several else None

    @torch.no_grad()
    def start_offset(self, features: Tensor) -> None:
        """Begins β where the mean of all cosines has an even chance.

        Args:
            features: (n, P) of some images before training.
        """
        if self.offset is not None and self.text is not None:
            cosines = F.normalize(features.float(), dim=-1) @ self.text().T
            self.offset.fill_(-self.text_scale * cosines.mean())

    def class_logits(self, features: Tensor) -> Tensor | None:
        """(B, C) of the head, or None without one."""
        return None if self.head is None else self.head(features)

    def text_logits(self, features: Tensor, vectors: Tensor) -> Tensor:
        """(B, C) κ f̂ Tᵀ + β.

        Args:
            features: (B, P) float32.
            vectors: (C, P), of `text`.
        """
        logits = self.text_scale * F.linear(F.normalize(features, dim=-1), vectors)
        return logits if self.offset is None else logits + self.offset

    def scores(self, features: Tensor, vectors: Tensor | None) -> dict[str, Tensor]:
        """(B, C) logits by name: "cls" of the head, "txt" of the text, those there are."""
        found = {"cls": self.class_logits(features)}
        if vectors is not None:
            found["txt"] = self.text_logits(features, vectors)
        return {name: logits for name, logits in found.items() if logits is not None}

    def vectors(self) -> Tensor | None:
        """(C, P) float32 T, where it is trained by; a text tower runs in the caller's precision."""
        return self.text() if self.text is not None and self.text_weight else None

    def forward(
        self, features: Tensor, targets: Tensor, vectors: Tensor | None
    ) -> dict[str, Tensor]:
        """The mean loss of a batch under "loss", and its parts.

        Args:
            features: (B, P) float32, not normalised.
            targets: (B,) int64, or (B, C) float.
            vectors: of `vectors`.
        """
        return self.losses(self.scores(features, vectors), targets)

    def losses(self, scores: dict[str, Tensor], targets: Tensor) -> dict[str, Tensor]:
        """`forward` from `scores`."""
        parts: dict[str, Tensor] = {}
        if "cls" in scores:
            parts["class_loss"] = self.criterion(scores["cls"], targets)
        if "txt" in scores and self.text_weight:
            parts["text_loss"] = (
                F.cross_entropy(scores["txt"], targets)
                if self.task == "single_label"
                else F.binary_cross_entropy_with_logits(scores["txt"], targets)
            )
        total = parts.get("class_loss", torch.zeros((), device=targets.device))
        if "text_loss" in parts:
            total = total + self.text_weight * parts["text_loss"]
        return {"loss": total, **parts}
