"""How fast BLIP base turns ready pixels and captions into features, against transformers itself.

    python benchmarks/blip.py                               # about 6 minutes on two cores
    python benchmarks/blip.py --repeats 1 --batch 2         # a quick look

The model has BLIP base's sizes (384 pixels) and random weights; speed does not depend on them. All
rows are measured in turn in one process; figures are medians. transformers gives contrastive and
matching outputs by two calls of `BlipForImageTextRetrieval`, and each one runs the vision tower.
"""

import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pydantic import PositiveInt
from torch import Tensor
from torch.nn.functional import cosine_similarity

from featcache.backbones.base import FeatureRequest, PixelSpec
from featcache.backbones.blip import Blip
from featcache.config import Config, run_job
from featcache.identity import BackboneIdentity, Precision

TOKENS = 50
SIDE = 384
CAPTION = "a picture of two dogs that sleep on a red sofa beside a window"


class BenchmarkConfig(Config):
    """Measures BLIP's features on this machine's CPU."""

    batch: PositiveInt = 8
    """Images of a forward pass."""
    repeats: PositiveInt = 3
    """Rounds; each measures every row of the table."""
    out: Path = Path("benchmarks/results/blip.json")
    """JSON file for the figures."""


def run(config: BenchmarkConfig) -> dict[str, Any]:
    """Builds the model, measures, prints the table and writes the JSON."""
    model, tokenizer, processor = build()
    plain = copy.deepcopy(model)  # ours gets fused attention
    fp32 = wrap(model, tokenizer, processor, "fp32")
    bf16 = wrap(copy.deepcopy(plain), tokenizer, processor, "bf16")
    pixels = torch.randint(0, 256, (config.batch, 3, SIDE, SIDE), dtype=torch.uint8)
    texts = [CAPTION] * config.batch
    values = normalised(pixels, fp32.spec.pixels)
    ids, mask = fp32.tokenize(texts)
    image, both = FeatureRequest(), FeatureRequest(multimodal="states", itm=True)

    def transformers_image() -> Tensor:
        states = plain.vision_model(pixel_values=values).last_hidden_state
        return plain.vision_proj(states[:, 0])

    def transformers_both() -> Tensor:
        inputs = {"pixel_values": values, "input_ids": ids, "attention_mask": mask}
        plain(use_itm_head=False, **inputs)
        return plain(use_itm_head=True, **inputs).itm_score

    cases: dict[str, Callable[[], Any]] = {
        "transformers, fp32, image": transformers_image,
        "featcache, fp32, image": lambda: fp32.encode_image(pixels, image),
        "featcache, bf16, image": lambda: bf16.encode_image(pixels, image),
        "transformers, fp32, image + joint": transformers_both,
        "featcache, fp32, image + joint": lambda: fp32.encode_image(pixels, both, texts),
        "featcache, bf16, image + joint": lambda: bf16.encode_image(pixels, both, texts),
    }
    rates: dict[str, list[float]] = {name: [] for name in cases}
    with torch.inference_mode():
        exact, fast = (one.encode_image(pixels, both, texts) for one in (fp32, bf16))
        difference = float((exact["itm"] - transformers_both()).abs().max())
        for _ in range(config.repeats):
            for name, case in cases.items():
                began = time.perf_counter()
                case()
                rates[name].append(config.batch / (time.perf_counter() - began))
    result = {
        "images_per_second": {name: statistics.median(found) for name, found in rates.items()},
        "largest_difference_of_itm_to_transformers": difference,
        "smallest_cosine_of_bf16": {
            name: float(cosine_similarity(fast[name], exact[name], dim=-1).min())
            for name in ("projected", "multimodal_pooled")
        },
        **config.record(),
    }
    show(result)
    config.out.parent.mkdir(parents=True, exist_ok=True)
    config.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def build() -> tuple[Any, Any, Any]:
    """BLIP base with random weights, a tokenizer of the caption's words, and the processor."""
    from transformers import (
        BertTokenizer,
        BlipConfig,
        BlipForImageTextRetrieval,
        BlipImageProcessor,
    )

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(set(CAPTION.split()))]
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(words)})
    torch.manual_seed(0)
    text = {"num_attention_heads": 12, "initializer_range": 0.02}
    model = BlipForImageTextRetrieval(
        BlipConfig(text_config=text, vision_config={"initializer_range": 0.02})
    )
    return model.eval().requires_grad_(False), tokenizer, BlipImageProcessor()


def wrap(model: Any, tokenizer: Any, processor: Any, precision: Precision) -> Blip:
    """The model as featcache's backbone; its attention is replaced by the fused one."""
    pixels = PixelSpec(
        (SIDE, SIDE), tuple(processor.image_mean), tuple(processor.image_std), resize_mode="squash"
    )
    identity = BackboneIdentity(kind="blip", name="random", weights="", architecture="")
    return Blip(
        model,
        tokenizer,
        processor,
        identity,
        pixels,
        torch.device("cpu"),
        precision,
        max_text_tokens=TOKENS,
        first_token=None,
    )


def normalised(pixels: Tensor, spec: PixelSpec) -> Tensor:
    mean, std = (torch.tensor(part)[:, None, None] for part in (spec.mean, spec.std))
    return (pixels.float() / 255 - mean) / std


def show(result: dict[str, Any]) -> None:
    for name, rate in result["images_per_second"].items():
        print(f"{name:<36} {rate:6.2f} images/s")
    found = result["largest_difference_of_itm_to_transformers"]
    print(f"largest difference of matching logits to transformers: {found:.2g}")
    for name, cosine in result["smallest_cosine_of_bf16"].items():
        print(f"smallest cosine of bf16 to fp32, {name}: {cosine:.6f}")


if __name__ == "__main__":
    run_job(BenchmarkConfig, run)
