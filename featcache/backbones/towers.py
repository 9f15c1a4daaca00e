"""Image towers of open_clip: which features each kind offers, all from one pass."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from featcache.backbones.base import FeatureRequest


class Tower:
    """An image tower's features in one pass; this base offers the projected one only.

    Attributes:
        pooled_dim: width of the feature before the projection; 0 if there is none.
        token_grid, token_dim, num_layers: see `BackboneSpec`.
    """

    pooled_dim = 0
    token_grid: tuple[int, int] | None = None
    token_dim: int | None = None
    num_layers = 0

    def __init__(self, visual: Any) -> None:
        self.visual = visual

    def __call__(self, x: Tensor, request: FeatureRequest) -> dict[str, Tensor]:
        """Features by name of normalised pixels (B, 3, H, W); "projected" is always there."""
        return {"projected": _first(self.visual(x))}


class _VisionTransformer(Tower):
    def __init__(self, visual: Any) -> None:
        super().__init__(visual)
        self.pooled_dim = 0 if visual.proj is None else int(visual.proj.shape[0])
        self.token_grid = (int(visual.grid_size[0]), int(visual.grid_size[1]))
        self.token_dim = int(visual.conv1.out_channels)
        self.num_layers = len(visual.transformer.resblocks)

    def __call__(self, x: Tensor, request: FeatureRequest) -> dict[str, Tensor]:
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
            x, indices=[_layer_index(request, self.num_layers)], output_fmt="NLC"
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

    def __call__(self, x: Tensor, request: FeatureRequest) -> dict[str, Tensor]:
        if not request.tokens:
            return super().__call__(x, request)
        result = self.visual.forward_intermediates(x, indices=[4])
        cells = result["image_intermediates"][0]
        return {"projected": result["image_features"], "tokens": cells.flatten(2).transpose(1, 2)}


class _Timm(Tower):
    """Pooled is what enters the adapter's projection, if it has one; tokens of ViT trunks only."""

    def __init__(self, visual: Any) -> None:
        super().__init__(visual)
        layers = dict(visual.head.named_children())
        if "proj" in layers:
            self.pooled_dim = int(layers["proj"].in_features) if "pool" not in layers else 0
        elif "mlp" in layers:
            self.pooled_dim = int(layers["mlp"].fc1.in_features) if "pool" not in layers else 0
        trunk = visual.trunk
        grid = getattr(getattr(trunk, "patch_embed", None), "grid_size", None)
        blocks = getattr(trunk, "blocks", None)
        if grid is not None and blocks is not None and hasattr(trunk, "forward_intermediates"):
            self.token_grid = (int(grid[0]), int(grid[1]))
            self.token_dim = int(trunk.embed_dim)
            self.num_layers = len(blocks)

    def __call__(self, x: Tensor, request: FeatureRequest) -> dict[str, Tensor]:
        features: dict[str, Tensor] = {}

        def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            features["pooled"] = inputs[0]

        hook = self.visual.head.register_forward_pre_hook(keep) if request.pooled else None
        try:
            if request.tokens:
                layer = _layer_index(request, self.num_layers)
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


def _layer_index(request: FeatureRequest, num_layers: int) -> int:
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
