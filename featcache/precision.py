"""Which arithmetic a tower runs in, and the check of a fast one against float32.

`auto` is a rule, so that it gives the same answer on each run: bfloat16 where the device has it
natively, float16 on older GPUs, float32 on other CPUs. The fast one is then compared with float32
on real images, and float32 is taken if they disagree: both the figure and the choice are recorded.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from featcache.backbones.base import Backbone, BackboneConfig, FeatureRequest
from featcache.errors import BackboneError, ConfigError
from featcache.identity import Precision

PrecisionChoice = Literal["auto", "fp32", "bf16", "fp16"]
"""`auto` or a fixed arithmetic."""


def resolve_device(name: str) -> torch.device:
    """The device called `name`; `auto` = the first GPU if there is one, else the CPU.

    Raises:
        ConfigError: if there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(
            f"device: no such device {name!r}; expected auto, cpu or cuda:N"
        ) from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device: {name!r} is not supported; expected auto, cpu or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device: {name!r} asked for, but torch sees {torch.cuda.device_count()} GPUs; "
            "set device cpu, or install torch with CUDA"
        )
    return device


def fastest_precision(device: torch.device) -> Precision:
    """What `auto` tries first on a device, as a cast of the weights: autocast is slow on CPUs."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp16"
    features = torch.cpu.get_capabilities()
    return "bf16" if features.get("avx512_bf16") or features.get("amx_bf16") else "fp32"


@dataclass(frozen=True)
class Sample:
    """A batch of real images to compare encoders on.

    Attributes:
        pixels: (B, 3, H, W) as `Backbone.encode_image` takes them.
        positions: places in the batch that hold a readable image.
        texts: B texts for the joint encoder; None if it is not compared.
        captioned: those of `positions` whose text is a caption.
    """

    pixels: Tensor
    positions: list[int]
    texts: list[str] | None = None
    captioned: list[int] = field(default_factory=list)


def open_checked(
    config: BackboneConfig,
    device: torch.device,
    choice: PrecisionChoice,
    request: FeatureRequest,
    min_cosine: float,
    samples: Callable[[Backbone], Iterator[Sample]],
) -> tuple[Backbone, float | None, str]:
    """The backbone in the arithmetic that `choice` leads to, checked on real images.

    Args:
        config: the backbone.
        device: where it runs.
        choice: `auto`, or a fixed arithmetic.
        request: features to compare.
        min_cosine: smallest cosine to float32 that is accepted, over images and features.
        samples: from a backbone to batches of images; the first one is used.

    Returns:
        The backbone; the smallest cosine found, None if nothing was compared; a line for the log.

    Raises:
        BackboneError: if `choice` names an arithmetic that disagrees with float32.
    """
    precision = fastest_precision(device) if choice == "auto" else choice
    if precision == "fp32":
        return config.open(str(device), "fp32"), None, f"fp32 on {device}"
    exact = config.open(str(device), "fp32")
    sample = next(samples(exact), None)
    if sample is None:  # nothing can be read: whatever is chosen, the extraction will say so
        return exact, None, f"fp32 on {device} (no readable image to check {precision} with)"
    fast = config.open(str(device), precision)
    cosine = _smallest_cosine(fast, exact, request, sample)
    if cosine is None:
        return exact, None, f"fp32 on {device} (no readable image to check {precision} with)"
    compared = f"smallest cosine to fp32 over {len(sample.positions)} images: {cosine:.6f}"
    if cosine >= min_cosine:
        return fast, cosine, f"{precision} on {device} ({compared})"
    if choice == "auto":
        return exact, cosine, f"fp32 on {device} ({precision} is below {min_cosine}: {compared})"
    raise BackboneError(
        f"precision {precision} differs from fp32 by more than min_cosine {min_cosine} allows "
        f"({compared}); set precision fp32, or lower min_cosine"
    )


def _smallest_cosine(
    fast: Backbone, exact: Backbone, request: FeatureRequest, sample: Sample
) -> float | None:
    """Over images and features; None if there is nothing to compare.

    Of the joint encoder only the first token counts: padding means nothing, and two logits have no
    direction.
    """
    joint = request.joint and bool(sample.captioned)
    request = replace(request, multimodal="pooled" if joint else "none", itm=False)
    texts = sample.texts if joint else None
    found, expected = (one.encode_image(sample.pixels, request, texts) for one in (fast, exact))
    cosines = []
    for name, values in expected.items():
        places = sample.captioned if name == "multimodal_pooled" else sample.positions
        cosines.append(cosine_similarity(found[name][places], values[places], dim=-1).min())
    return float(min(cosines)) if cosines else None
