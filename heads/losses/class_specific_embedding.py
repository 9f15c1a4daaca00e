"""Class-specific embedding loss: draws class prompts to the captions of their images.

With Δ_ic a distance between the caption of row i and the prompt of class c, y in 0..1, n_c training
rows with class c, and C classes:

    h_ic = y Δ_ic + (1 − y) max(0, g_c − Δ_ic)
    g_c  = margin / n_c^(1/4)                  rarer classes keep other captions further away
    w_c  = C n_c^(−q) / Σ_j n_j^(−q)           their mean is 1
    L    = mean of w_c h_ic over classes, then over rows; 0 for rows without a caption

`softmargin` is all of it, `weighted` has one margin for all classes, `hinge` also no weights, and
`nn_hinge` is the plain hinge embedding loss (no weights, margin 1).

Two distances: of one caption feature and one class vector (`sentence_distances`), or of the token
embeddings of caption and prompt, position by position (`token_distances`).

Reference: Xia et al., LMPT: Prompt Tuning with Class-Specific Embedding Loss for Long-tailed
Multi-Label Visual Recognition, 2023; margins as Cao et al., Learning Imbalanced Datasets with
Label-Distribution-Aware Margin Loss, 2019, equation 13. Exponents and normalisation of w are our
reading; q defaults to 1. The distance is a mean over positions that hold tokens on both sides.
"""

from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heads.losses.base import as_multi_hot, at_least_float32

Variant = Literal["nn_hinge", "hinge", "weighted", "softmargin"]

MARGINS: dict[Variant, float] = {"nn_hinge": 1.0, "hinge": 0.2, "weighted": 0.2, "softmargin": 0.2}
"""Margin of each variant unless another is given; distances of cosines lie in 0..2."""


class Distances(NamedTuple):
    """How far each caption is from each class prompt.

    Attributes:
        values: (B, C) float32 Δ, 0..2; 0 where there is nothing to compare.
        valid: (B, C) or (B, 1) bool, whether there is.
    """

    values: Tensor
    valid: Tensor


class ClassSpecificEmbedding(nn.Module):
    """The loss for fixed class counts; has nothing to train."""

    margins: Tensor
    weights: Tensor

    def __init__(
        self,
        counts: npt.NDArray[np.int64],
        *,
        variant: Variant = "softmargin",
        margin: float | None = None,
        count_power: float = 1.0,
    ) -> None:
        """Margins and weights from class counts, computed in float64.

        Args:
            counts: (C,) n_c; a class without training rows is treated as one with a single row.
            variant: see the module's text.
            margin: of the variant, or g_c n_c^(1/4) of `softmargin`, > 0; None = `MARGINS`.
            count_power: q of the weights, 0 or more; not read by variants without weights.
        """
        super().__init__()
        numbers = torch.from_numpy(np.maximum(counts, 1).astype(np.float64))
        margins = torch.full_like(numbers, MARGINS[variant] if margin is None else margin)
        if variant == "softmargin":
            margins = margins / numbers.pow(0.25)
        weights = torch.ones_like(numbers)
        if variant in ("weighted", "softmargin"):
            # Relative to the rarest class, so that no power overflows.
            weights = (numbers / numbers.min()).pow(-count_power)
            weights = weights * (len(numbers) / weights.sum())
        # They follow from the counts: no part of what a run folder has to keep.
        self.register_buffer("margins", margins.float(), persistent=False)
        self.register_buffer("weights", weights.float(), persistent=False)

    def terms(self, distances: Tensor, targets: Tensor) -> Tensor:
        """(B, C) float32 w_c h_ic.

        Args:
            distances: (B, C) Δ of any float type.
            targets: (B, C) float 0..1, or (B,) int64 class indices.
        """
        distances = distances.float()
        wanted = as_multi_hot(targets, distances.shape[-1])
        away = F.relu(self.margins - distances)
        return self.weights * (wanted * distances + (1 - wanted) * away)

    def forward(self, distances: Distances, targets: Tensor) -> Tensor:
        """0-d float32 mean over rows of each row's mean over classes with a valid distance.

        Rows without one count as 0, so that the loss of a batch is the mean of those of its parts.
        """
        terms = self.terms(distances.values, targets)
        valid = distances.valid.expand_as(terms)
        rows = torch.where(valid, terms, 0.0).sum(1) / valid.sum(1).clamp(min=1)
        return rows.mean()


def sentence_distances(captions: Tensor, class_vectors: Tensor) -> Distances:
    """1 − cosine of each caption's feature and each class vector.

    Args:
        captions: (B, P) float32 features of captions, any length; zeros = no caption, not valid.
        class_vectors: (C, P) float32 of unit length.
    """
    lengths = captions.norm(dim=1, keepdim=True)
    valid = lengths > 0
    unit = captions / torch.where(valid, lengths, 1.0)
    return Distances(1 - at_least_float32(unit @ class_vectors.T), valid)


def token_distances(
    captions: Tensor, caption_mask: Tensor, prompts: Tensor, prompt_mask: Tensor, shift: int = 0
) -> Distances:
    """Mean over positions t of 1 − cosine of caption token t and prompt token t + shift.

    Only positions count at which both sides hold a token. One matrix product over all positions at
    once: nothing of the size B x C x L is held.

    Args:
        captions: (B, L, W) token embeddings.
        caption_mask: (B, L) bool, False at padding.
        prompts: (C, L', W) token embeddings.
        prompt_mask: (C, L') bool, False at padding.
        shift: how far prompt positions are moved, 0 or more.
    """
    length = max(0, min(captions.shape[1], prompts.shape[1] - shift))
    caption_mask = caption_mask[:, :length]
    prompt_mask = prompt_mask[:, shift : shift + length]
    left = _unit(captions[:, :length], caption_mask).flatten(1)
    right = _unit(prompts[:, shift : shift + length], prompt_mask).flatten(1)
    common = caption_mask.float() @ prompt_mask.float().T
    valid = common > 0
    values = 1 - at_least_float32(left @ right.T) / common.clamp(min=1)
    return Distances(torch.where(valid, values, 0.0), valid)


def _unit(tokens: Tensor, mask: Tensor) -> Tensor:
    """float32 tokens of length 1, zeros at padding."""
    return F.normalize(tokens.float(), dim=-1) * mask[..., None]
