"""A small dual encoder, pairs for it, and both losses written out: what several tests share.

Float64, so that what must be equal is equal but for 1e-12.
"""

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.losses import PairLossConfig
from finetune.losses.info_nce import InfoNceConfig
from finetune.losses.siglip import SiglipConfig

NUM_PAIRS, DIM, END = 12, 8, 31
VISION: dict[str, Any] = {
    "image_size": 16,
    "layers": 2,
    "width": 16,
    "head_width": 8,
    "patch_size": 8,
}
TEXT = {"context_length": 6, "vocab_size": END + 1, "width": 16, "heads": 2, "layers": 2}
LOSSES: dict[str, PairLossConfig] = {"info_nce": InfoNceConfig(), "siglip": SiglipConfig()}


def features(count: int, seed: int) -> Tensor:
    """(count, DIM) float64, L2-normalised."""
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, DIM, generator=generator, dtype=torch.float64), dim=-1)


def dual_encoder(kind: str, seed: int = 0, **vision: Any) -> nn.Module:
    """A CLIP of two narrow towers in training mode, with what the loss `kind` learns besides."""
    torch.manual_seed(seed)
    loss = LOSSES[kind]
    return open_clip.CLIP(
        embed_dim=DIM,
        vision_cfg={**VISION, **vision},
        text_cfg=TEXT,
        init_logit_scale=loss.initial_scale,
        init_logit_bias=loss.initial_bias,
    ).double()


def pairs(seed: int = 1) -> tuple[Tensor, Tensor]:
    """(N, 3, 16, 16) float64 pixels and (N, 6) int64 tokens that end in the end token."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(NUM_PAIRS, 3, 16, 16, generator=generator, dtype=torch.float64)
    tokens = torch.randint(1, END, (NUM_PAIRS, 6), generator=generator)
    tokens[:, -1] = END
    return pixels, tokens


def normalised(found: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Both matrices with rows of length 1."""
    return F.normalize(found[0], dim=-1), F.normalize(found[1], dim=-1)


def learned_besides(model: Any) -> list[nn.Parameter]:
    """Logit scale and, where there is one, bias."""
    return [p for p in (model.logit_scale, model.logit_bias) if p is not None]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter's gradient; a missing one fails."""
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        found[name] = parameter.grad.clone()
    return found


def whole_batch(model: Any, kind: str) -> Tensor:
    """The loss of all pairs at once in this process, its gradients added: what all must equal."""
    pixels, tokens = pairs()
    images, texts = normalised((model.encode_image(pixels), model.encode_text(tokens)))
    loss = LOSSES[kind].loss(images, texts, model.logit_scale, model.logit_bias)
    loss.backward()
    return loss.detach()


Array = npt.NDArray[np.float64]


def written_out(kind: str, images: Array, texts: Array, scale: float, bias: float = 0.0) -> float:
    """The loss pair by pair, one exponential at a time.

    info_nce: ½[CE(z, diag) + CE(zᵀ, diag)], z = exp(s)·I·Tᵀ.
    siglip: −1/B Σᵢⱼ ln σ(lᵢⱼ·(z + b)), l = +1 on the diagonal, else −1.
    """
    count, total = len(images), 0.0
    z = [[np.exp(scale) * float(i @ t) + bias for t in texts] for i in images]
    for i, j in itertools.product(range(count), repeat=2):
        if kind == "siglip":
            total += np.log(1 + np.exp(-z[i][j] if i == j else z[i][j]))
        elif i == j:
            total -= 0.5 * (z[i][i] - np.log(sum(np.exp(z[i][k]) for k in range(count))))
            total -= 0.5 * (z[i][i] - np.log(sum(np.exp(z[k][i]) for k in range(count))))
    return float(total / count)
