"""Where each library keeps the matrices of its transformer blocks.

Only modules whose forward is known to read a matrix as it is listed here are listed: a library's
own variants may hand a layer's weight to a function, and a layer put in its place would be ignored.
"""

from collections.abc import Iterator
from typing import Any

from torch import nn

from featcache.backbones.trainable import Block, Site, TrainableTowers


def stacked(weight: str, width: int) -> dict[str, Site]:
    """Query, key and value in the rows of one weight, `width` rows each."""
    return {
        letter: Site(weight, (part * width, (part + 1) * width))
        for part, letter in enumerate("qkv")
    }


def clip_blocks(model: nn.Module, prefix: str) -> list[Block]:
    """Those of one of open_clip's own transformers; none if it is of another kind."""
    from open_clip.transformer import ResidualAttentionBlock

    try:
        modules = model.get_submodule(prefix)
    except AttributeError:
        return []
    blocks = []
    for index, module in enumerate(modules.children()):
        if not isinstance(module, ResidualAttentionBlock):
            return []
        name = f"{prefix}.{index}"
        sites = stacked(f"{name}.attn.in_proj_weight", int(module.attn.embed_dim))
        sites["out"] = Site(f"{name}.attn.out_proj.weight")
        sites["fc1"] = Site(f"{name}.mlp.c_fc.weight")
        sites["fc2"] = Site(f"{name}.mlp.c_proj.weight")
        blocks.append(Block(name, sites))
    return blocks


def pool_blocks(model: nn.Module, prefix: str) -> list[Block]:
    """CLIP's attention pooling behind a ResNet, its only attention, as one block without MLP."""
    from open_clip.modified_resnet import AttentionPool2d

    try:
        module = model.get_submodule(prefix)
    except AttributeError:
        return []
    if not isinstance(module, AttentionPool2d):
        return []
    layers = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "c_proj"}
    sites = {site: Site(f"{prefix}.{layer}.weight") for site, layer in layers.items()}
    return [Block(prefix, sites)]


def timm_blocks(model: nn.Module, prefix: str = "") -> list[Block]:
    """Those of a timm model: ViT, EVA and DINOv3, Swin; none of models without a known attention.

    Args:
        model: holds the timm model.
        prefix: its dotted name in there.
    """
    from timm.layers import Mlp

    blocks = []
    for name, module in _named_parts(model, prefix):
        sites = _timm_attention(getattr(module, "attn", None), f"{name}.attn")
        if sites is None:
            continue
        mlp: Any = getattr(module, "mlp", None)
        if type(mlp) is Mlp and isinstance(mlp.fc1, nn.Linear):
            sites["fc1"] = Site(f"{name}.mlp.fc1.weight")
            sites["fc2"] = Site(f"{name}.mlp.fc2.weight")
        blocks.append(Block(name, sites))
    return blocks


def _timm_attention(attention: Any, name: str) -> dict[str, Site] | None:
    """Its four matrices; None if it is of an unknown kind, or reads a weight past its layer."""
    from timm.layers import Attention, AttentionRope
    from timm.models.eva import EvaAttention
    from timm.models.swin_transformer import WindowAttention

    if type(attention) not in (Attention, AttentionRope, EvaAttention, WindowAttention):
        return None
    if getattr(attention, "q_bias", None) is not None and not attention.qkv_bias_separate:
        return None  # EVA hands the stacked weight to a function then, with a bias made of three
    if attention.qkv is None:
        sites = {letter: Site(f"{name}.{letter}_proj.weight") for letter in "qkv"}
    else:
        sites = stacked(f"{name}.qkv.weight", attention.qkv.out_features // 3)
    return sites | {"out": Site(f"{name}.proj.weight")}


def set_timm_entry(towers: TrainableTowers, trunk: Any, prefix: str) -> None:
    """States where prompts enter one of timm's plain vision transformers.

    Args:
        towers: what is stated on.
        trunk: timm.models.vision_transformer.VisionTransformer.
        prefix: its dotted name in the model, and a dot; "" if it is the model.
    """
    towers.prompt_entry = f"{prefix}norm_pre"
    towers.num_prefix_tokens = int(trunk.num_prefix_tokens)
    towers.width = int(trunk.embed_dim)
    towers.patch_size = int(trunk.patch_embed.patch_size[0])


def blip_image_blocks(vision: Any, prefix: str) -> list[Block]:
    """Those of BLIP's vision tower, its attention fused or not."""
    blocks = []
    for index, layer in enumerate(vision.encoder.layers):
        name = f"{prefix}.encoder.layers.{index}"
        width = layer.self_attn.qkv.out_features // 3
        sites = stacked(f"{name}.self_attn.qkv.weight", width)
        sites["out"] = Site(f"{name}.self_attn.projection.weight")
        sites["fc1"] = Site(f"{name}.mlp.fc1.weight")
        sites["fc2"] = Site(f"{name}.mlp.fc2.weight")
        blocks.append(Block(name, sites))
    return blocks


def bert_blocks(encoder: Any, prefix: str) -> list[Block]:
    """Those of BLIP's text tower; its attention to the image, which a text alone skips, is not."""
    layers = {
        "q": "attention.self.query",
        "k": "attention.self.key",
        "v": "attention.self.value",
        "out": "attention.output.dense",
        "fc1": "intermediate.dense",
        "fc2": "output.dense",
    }
    return [
        Block(
            f"{prefix}.encoder.layer.{index}",
            {
                site: Site(f"{prefix}.encoder.layer.{index}.{layer}.weight")
                for site, layer in layers.items()
            },
        )
        for index in range(len(encoder.encoder.layer))
    ]


def _named_parts(model: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """Modules within a part, by names that count from the whole."""
    for name, module in model.get_submodule(prefix).named_modules():
        yield ".".join(filter(None, (prefix, name))), module
