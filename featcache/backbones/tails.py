"""The last blocks of a vision transformer on their own: norm, pooling and projection included.

A cache that holds the sequence entering the last n blocks can be finished, or trained from there,
without any pixel. The modules here share the backbone's weights and hold no others, so that a deep
copy of one is exactly what training needs.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

_CLIP_STEM = (
    "conv1",
    "class_embedding",
    "positional_embedding",
    "patch_dropout",
    "ln_pre",
    "transformer",
)
_TIMM_STEM = (
    "patch_embed",
    "cls_token",
    "reg_token",
    "dist_token",
    "pos_embed",
    "pos_drop",
    "patch_drop",
    "norm_pre",
    "blocks",
)


class ClipTail(nn.Module):
    """Last blocks of open_clip's VisionTransformer."""

    def __init__(self, visual: Any, num_blocks: int) -> None:
        """Shares weights with `visual`.

        Args:
            visual: open_clip.transformer.VisionTransformer.
            num_blocks: blocks from the end.
        """
        super().__init__()
        self.blocks = nn.Sequential(*list(visual.transformer.resblocks)[-num_blocks:])
        self.rest = _without(visual, _CLIP_STEM)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, P) projected features from (B, L, W) tokens that enter the blocks."""
        pooled: Tensor = self.rest._pool(self.blocks(tokens))[0]  # private, but the only way in
        return pooled if self.rest.proj is None else pooled @ self.rest.proj


class TimmTail(nn.Module):
    """Last blocks of timm's VisionTransformer, and what an adapter puts behind it."""

    def __init__(self, trunk: Any, num_blocks: int, head: nn.Module | None = None) -> None:
        """Shares weights with `trunk` and `head`.

        Args:
            trunk: timm.models.vision_transformer.VisionTransformer.
            num_blocks: blocks from the end.
            head: open_clip's adapter; None = the trunk's features before its classifier.
        """
        super().__init__()
        self.blocks = nn.Sequential(*list(trunk.blocks)[-num_blocks:])
        self.rest = _without(trunk, _TIMM_STEM)
        self.head = head

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, P) projected features from (B, L, W) tokens that enter the blocks; see `head`."""
        x = self.rest.norm(self.blocks(tokens))
        pooled: Tensor = self.rest.forward_head(x, pre_logits=self.head is None)
        return pooled if self.head is None else self.head(pooled)


def can_cut(trunk: nn.Module) -> bool:
    """Whether a timm model is a vision transformer whose blocks take nothing but the tokens.

    Relatives (EVA, BEiT, …) hand position information to each block, or do something between them.
    """
    from timm.models.vision_transformer import VisionTransformer

    return (
        isinstance(trunk, VisionTransformer)
        and type(trunk).forward_features is VisionTransformer.forward_features
    )


@contextmanager
def kept_input(block: nn.Module) -> Iterator[list[Tensor]]:
    """A list that receives the first argument of each call of `block` inside the context."""
    kept: list[Tensor] = []

    def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        kept.append(inputs[0])

    hook = block.register_forward_pre_hook(keep)
    try:
        yield kept
    finally:
        hook.remove()


def _without(module: Any, names: tuple[str, ...]) -> Any:
    """A shallow copy that shares everything with `module` but the named children and parameters."""
    shell = copy.copy(module)
    for kind in ("_modules", "_parameters"):
        kept = {name: value for name, value in getattr(module, kind).items() if name not in names}
        object.__setattr__(shell, kind, kept)
    assert isinstance(shell, nn.Module)
    return shell
