"""Image towers of open_clip: which features each kind offers, all from one pass."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from featcache.backbones.base import FeatureRequest, PixelInput
from featcache.backbones.tails import ClipTail, TimmTail, can_cut, kept_input


class Tower:
    """An image tower's features in one pass; this base offers the projected one only.

    Attributes:
        pooled_dim: width of the feature before the projection; 0 if there is none.
        token_grid, token_dim, num_layers, num_prefix_tokens, can_finish: see `BackboneSpec`.
        blocks: transformer blocks, if it can be cut between them.
    """

    pooled_dim = 0
    token_grid: tuple[int, int] | None = None
    token_dim: int | None = None
    num_layers = 0
    num_prefix_tokens = 0
    can_finish = False
    blocks: Sequence[nn.Module] = ()

    def __init__(self, visual: Any) -> None:
        self.visual = visual

    def __call__(self, x: Tensor, request: FeatureRequest) -> dict[str, Tensor]:
        """Features by name of normalised pixels (B, 3, H, W), those asked for and maybe others."""
        if not (request.tokens and request.before_last):
            return self.run(x, request)
        with kept_input(self.blocks[-request.before_last]) as kept:
            features = self.run(x, replace(request, tokens=False))
        return {**features, "tokens": kept[0]}

    def run(self, x: Tensor, request: FeatureRequest) -> dict[str, Tensor]:
        """The same, but tokens only as the output of a block."""
        return {"projected": _first(self.visual(x))}

    def tail(self, num_blocks: int) -> nn.Module:
        """See `Backbone.tail`; only towers with `can_finish` have one."""
        raise NotImplementedError


class _VisionTransformer(Tower):
    def __init__(self, visual: Any) -> None:
        super().__init__(visual)
        self.pooled_dim = 0 if visual.proj is None else int(visual.proj.shape[0])
        self.token_grid = (int(visual.grid_size[0]), int(visual.grid_size[1]))
        self.token_dim = int(visual.conv1.out_channels)
        self.blocks = list(visual.transformer.resblocks)
        self.num_layers = len(self.blocks)
        self.num_prefix_tokens = 1
        self.can_finish = bool(visual.transformer.batch_first)

    def tail(self, num_blocks: int) -> nn.Module:
        return ClipTail(self.visual, num_blocks)

    def run(self, x: Tensor, request: FeatureRequest) -> dict[str, Tensor]:
        if not request.pooled:
            output, tokens = self._run(x, request)
            features = {"projected": output}
        else:
            with _without_projection(self.visual) as projection:
                pooled, tokens = self._run(x, request)
            features = {"projected": pooled @ projection, "pooled": pooled}
        return {**features, **tokens}

    def _run(self, x: Tensor, request: FeatureRequest) -> tuple[Tensor, dict[str, Tensor]]:
        if not request.tokens:
            return _first(self.visual(x)), {}
        result = self.visual.forward_intermediates(
            x, indices=[layer_index(request, self.num_layers)], output_fmt="NLC"
        )
        return result["image_features"], {"tokens": result["image_intermediates"][0]}


class _ResNet(Tower):
    """Tokens are the last stage's cells; the attention pool has no feature before projecting."""

    num_layers = 1

    def __init__(self, visual: Any) -> None:
        super().__init__(visual)
        height, width = pair(visual.image_size)
        self.token_grid = (height // 32, width // 32)
        self.token_dim = int(visual.layer4[-1].conv3.out_channels)

    def run(self, x: Tensor, request: FeatureRequest) -> dict[str, Tensor]:
        if not request.tokens:
            return super().run(x, request)
        result = self.visual.forward_intermediates(x, indices=[4])
        cells = result["image_intermediates"][0]
        return {"projected": result["image_features"], "tokens": cells.flatten(2).transpose(1, 2)}


class TimmTrunk(Tower):
    """What timm's models have in common: tokens of transformers by block, and the cut between them.

    Attributes:
        trunk: the timm model.
    """

    def __init__(self, visual: Any, trunk: Any) -> None:
        """Reads the trunk's sizes.

        Args:
            visual: what is called.
            trunk: the timm model in it.
        """
        super().__init__(visual)
        self.trunk = trunk
        # Not every timm model has patches or blocks, and no base class says which ones do.
        grid = getattr(getattr(trunk, "patch_embed", None), "grid_size", None)
        blocks = getattr(trunk, "blocks", None)
        if grid is not None and blocks is not None and hasattr(trunk, "forward_intermediates"):
            self.token_grid = (int(grid[0]), int(grid[1]))
            self.token_dim = int(trunk.embed_dim)
            self.blocks = list(blocks)
            self.num_layers = len(self.blocks)
            self.num_prefix_tokens = int(getattr(trunk, "num_prefix_tokens", 0))
            self.can_finish = can_cut(trunk)


class _Timm(TimmTrunk):
    """Pooled is what enters the adapter's projection, if it has one; tokens of ViT trunks only."""

    def __init__(self, visual: Any) -> None:
        super().__init__(visual, visual.trunk)
        layers = dict(visual.head.named_children())
        if "proj" in layers:
            self.pooled_dim = int(layers["proj"].in_features) if "pool" not in layers else 0
        elif "mlp" in layers:
            self.pooled_dim = int(layers["mlp"].fc1.in_features) if "pool" not in layers else 0

    def tail(self, num_blocks: int) -> nn.Module:
        return TimmTail(self.trunk, num_blocks, self.visual.head)

    def run(self, x: Tensor, request: FeatureRequest) -> dict[str, Tensor]:
        features: dict[str, Tensor] = {}

        def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            features["pooled"] = inputs[0]

        hook = self.visual.head.register_forward_pre_hook(keep) if request.pooled else None
        try:
            if request.tokens:
                layer = layer_index(request, self.num_layers)
                result = self.visual.forward_intermediates(x, indices=[layer], output_fmt="NLC")
                features["projected"] = result["image_features"]
                features["tokens"] = result["image_intermediates"][0]
            else:
                features["projected"] = self.visual(x)
        finally:
            if hook is not None:
                hook.remove()
        return features


def open_tower(visual: Any) -> Tower:
    """The tower around open_clip's image module."""
    from open_clip.modified_resnet import ModifiedResNet
    from open_clip.timm_model import TimmModel
    from open_clip.transformer import VisionTransformer

    for kind, tower in ((VisionTransformer, _VisionTransformer), (ModifiedResNet, _ResNet)):
        if isinstance(visual, kind):
            return tower(visual)
    return _Timm(visual) if isinstance(visual, TimmModel) else Tower(visual)


def run_tower(
    tower: Tower, prepare: PixelInput, pixels: Tensor, request: FeatureRequest
) -> dict[str, Tensor]:
    """float32 features of a batch of pixels; see `Backbone.encode_image`."""
    with torch.inference_mode():
        features = tower(prepare(pixels), request)
        if "tokens" in features:
            assert tower.token_grid is not None
            tokens = features["tokens"]
            if not request.before_last:
                # Patches come last; prompts that an adapter put in front of them are none.
                tokens = tokens[:, -math.prod(tower.token_grid) :]
            features["tokens"] = pool_tokens(tokens, tower.token_grid, request.token_pool)
        features = {name: value.to(torch.float32) for name, value in features.items()}
    return {name: value.clone() for name, value in features.items()}


def pool_tokens(tokens: Tensor, grid: tuple[int, int], side: int | None) -> Tensor:
    """(B, K·K, W) float32 averages over a K x K grid of the patches.

    Args:
        tokens: (B, rows·columns, W).
        grid: rows and columns.
        side: K; None = the tokens as they are.
    """
    if side is None:
        return tokens
    cells = tokens.to(torch.float32).transpose(1, 2)
    cells = cells.reshape(*cells.shape[:2], *grid)
    return nn.functional.adaptive_avg_pool2d(cells, side).flatten(2).transpose(1, 2)


def layer_index(request: FeatureRequest, num_layers: int) -> int:
    """Position of the block whose output is taken."""
    return num_layers - 1 if request.token_layer == -1 else request.token_layer - 1


@contextmanager
def _without_projection(visual: Any) -> Iterator[Tensor]:
    projection = visual.proj
    visual.proj = None
    try:
        yield projection
    finally:
        visual.proj = projection


def _first(output: Any) -> Tensor:
    """The image feature of a tower that may also return tokens (CoCa)."""
    result: Tensor = output[0] if isinstance(output, tuple) else output
    return result


def pair(size: Any) -> tuple[int, int]:
    """Height and width from one number or two."""
    return (int(size), int(size)) if isinstance(size, int) else (int(size[0]), int(size[1]))
