"""Arithmetic of CLIP's towers, by formula, and how much of it a device could do.

    python benchmarks/flops.py    # the formulas beside torch's own count of the same forward pass

A multiplication with its addition counts as two. Only matrix products count, as is the custom for
model FLOPs utilisation (Chowdhery et al., "PaLM" (2022), appendix B): no softmax, norms or
additions; attention counts whole, causal or not; recomputation (gradient checkpointing, gradient
caching) is no useful work and does not count.

Forward pass of a transformer, a sequence of L tokens, width W, N blocks, MLP of r·W:

    N·[ 2·L·(4 + 2r)·W²  (q, k, v, out and the MLP)  +  4·L²·W  (scores, and values by weights) ]

Backward is two forwards: gradients by activations and by weights. A frozen matrix has no gradient
by itself, and before the first trained one nothing goes backward at all: `training_flops`.
"""

from typing import Any, Literal

import torch

PEAK_BF16 = {
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
}
"""Dense bfloat16 FLOP/s with float32 sums, from the makers' data sheets; first match counts."""


def transformer_flops(length: int, width: int, layers: int, mlp_ratio: float = 4.0) -> float:
    """Of the blocks, for one sequence, forward."""
    dense = 2 * length * (4 + 2 * mlp_ratio) * width**2
    return layers * (dense + 4 * length**2 * width)


def image_flops(config: dict[str, Any]) -> float:
    """Of a ViT image tower, for one image, forward.

    Args:
        config: open_clip's model configuration.

    Raises:
        ValueError: for another kind of tower.
    """
    vision = config["vision_cfg"]
    if not isinstance(vision.get("layers"), int) or "timm_model_name" in vision:
        raise ValueError("only open_clip's own ViT towers have a formula here")
    width, patch = vision["width"], vision["patch_size"]
    patches = (vision["image_size"] // patch) ** 2
    stem = 2 * patches * 3 * patch**2 * width
    blocks = transformer_flops(patches + 1, width, vision["layers"], vision.get("mlp_ratio", 4.0))
    return stem + blocks + 2 * width * config["embed_dim"]


def text_flops(config: dict[str, Any], length: int | None = None) -> float:
    """Of CLIP's text tower, for one text, forward.

    Args:
        config: open_clip's model configuration.
        length: tokens that are encoded; None = the context length.
    """
    text = config["text_cfg"]
    length = length or text.get("context_length", 77)
    width = text["width"]
    blocks = transformer_flops(length, width, text["layers"], text.get("mlp_ratio", 4.0))
    return blocks + 2 * width * config["embed_dim"]


def training_flops(forward: float, trained: Literal["all", "thin", "none"] = "all") -> float:
    """Of forward and backward of a tower that takes `forward` one way.

    Args:
        forward: FLOPs of its forward pass.
        trained: all = every weight; thin = small matrices beside frozen ones, from the first block
            on (LoRA, prompts): gradients by activations only; none = frozen.
    """
    return forward * {"all": 3.0, "thin": 2.0, "none": 1.0}[trained]


def peak_flops(device: torch.device) -> float | None:
    """Dense bfloat16 FLOP/s of a GPU by its data sheet; None if it is not in `PEAK_BF16`."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in PEAK_BF16.items() if known in name), None)


def main() -> None:
    import open_clip
    from torch.utils.flop_counter import FlopCounterMode

    for name in ("ViT-B-32", "ViT-B-16", "ViT-L-14"):
        config = open_clip.get_model_config(name)
        with torch.device("meta"):
            model = open_clip.CLIP(**config)
            side = config["vision_cfg"]["image_size"]
            inputs = torch.zeros(1, 3, side, side), torch.zeros(1, 77, dtype=torch.int64)
        for tower, formula, data in (
            ("image", image_flops(config), inputs[0]),
            ("text", text_flops(config), inputs[1]),
        ):
            with FlopCounterMode(display=False) as counter:
                getattr(model, f"encode_{tower}")(data)
            counted = counter.get_total_flops()
            print(
                f"{name:10s} {tower:6s} formula {formula / 1e9:7.3f} GFLOP  "
                f"counted {counted / 1e9:7.3f}  ratio {formula / counted:.4f}"
            )


if __name__ == "__main__":
    main()
