"""InfoNCE: every image against every caption of the batch, both ways.

Reference: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision"
(2021), section 2.3 and figure 3; van den Oord et al., "Representation Learning with Contrastive
Predictive Coding" (2018), equation 4, for the name.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

INITIAL_LOGIT_SCALE = math.log(1 / 0.07)
"""Natural logarithm of the scale that training starts from: temperature 0.07."""

MAX_LOGIT_SCALE = math.log(100.0)
"""Largest log scale; beyond it one hard pair swamps the batch and training diverges."""


def info_nce(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
    """The symmetric cross entropy ½[CE(z, diag) + CE(zᵀ, diag)] with z = exp(s)·I·Tᵀ.

    Row i of both inputs belongs together; all other rows are its negatives, so the value depends on
    B: compare runs at equal batch size only.

    Args:
        image_features: (B, P) float, L2-normalised.
        text_features: (B, P) float, L2-normalised.
        logit_scale: () or (1,) float, s: natural logarithm of the scale.

    Returns:
        () float32, in nats; ln B for a model that knows nothing.

    Raises:
        ValueError: if the two feature matrices differ in shape.
    """
    if image_features.shape != text_features.shape:
        raise ValueError(
            f"image features {tuple(image_features.shape)} and text features "
            f"{tuple(text_features.shape)} must have one shape: one row a pair"
        )
    logits = logit_scale.float().exp() * (image_features.float() @ text_features.float().T)
    targets = torch.arange(len(logits), device=logits.device)
    return 0.5 * (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets))


@torch.no_grad()
def clamp_logit_scale(logit_scale: Tensor) -> None:
    """Puts s back into [0, ln 100], in place; belongs after every optimiser step."""
    logit_scale.clamp_(0.0, MAX_LOGIT_SCALE)
