"""BLIP as a captioner: one sentence for each image.

Reference: Li et al., BLIP, 2022, section 3.1 (image-grounded text decoder). As in its released
code, captions are continuations of "a picture of", found by a beam search.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from featcache.backbones.base import DTYPES, PixelInput, PixelSpec
from featcache.backbones.hugging_face import (
    find_source,
    fuse_attention,
    import_transformers,
    load_model,
    load_part,
    pixel_spec,
)
from featcache.backbones.weights import weights_hash
from featcache.identity import Precision

PRESETS: Mapping[str, str] = {
    "base": "Salesforce/blip-image-captioning-base",
    "large": "Salesforce/blip-image-captioning-large",
}
"""Captioning models by size."""


class Captioner:
    """A BLIP captioning model in evaluation mode.

    Attributes:
        model: transformers' `BlipForConditionalGeneration`, weights cast to `precision`.
        tokenizer: its tokenizer.
        pixels: what the vision tower expects.
        weights: hash over the float32 weights.
    """

    def __init__(self, model: str, device: torch.device, precision: Precision) -> None:
        """Opens a model.

        Args:
            model: base, large, ORG/NAME of a hub repository, or a folder.
            device: where it goes.
            precision: type of weights and activations.

        Raises:
            BackboneError: transformers is not installed, unknown model, or files that are missing,
                damaged or of another model.
        """
        transformers = import_transformers()
        source = find_source("model", model, PRESETS)
        opened = load_model(transformers.BlipForConditionalGeneration, source)
        self.tokenizer = load_part(transformers.AutoTokenizer, source)
        self.processor = load_part(transformers.BlipImageProcessor, source)
        self.weights = weights_hash(opened)
        self.pixels: PixelSpec = pixel_spec(
            self.processor, int(opened.config.vision_config.image_size), source
        )
        fuse_attention(opened.vision_model)
        self.device = device
        self.model = opened.to(device=device, dtype=DTYPES[precision])
        self._prepare = PixelInput(self.pixels, device, precision)

    def captions(
        self, pixels: Tensor, *, prompt: str, num_beams: int, max_tokens: int
    ) -> list[str]:
        """A caption without the prompt for each image; one line each, blanks tidied.

        Args:
            pixels: (B, 3, H, W) uint8 in 0..255.
            prompt: how every caption begins; empty = nothing.
            num_beams: width of the beam search; 1 = greedy.
            max_tokens: most tokens behind the prompt.
        """
        x = self._prepare(pixels)
        options: dict[str, Any] = {}
        start = 1
        if prompt:
            tokens = self.tokenizer([prompt] * len(x), return_tensors="pt")
            start = tokens["input_ids"].shape[1] - 1  # the model drops the end token
            options = {
                "input_ids": tokens["input_ids"].to(self.device),
                "attention_mask": tokens["attention_mask"].to(self.device),
            }
        with torch.inference_mode():
            found = self.model.generate(
                pixel_values=x,
                num_beams=num_beams,
                max_new_tokens=max_tokens,
                do_sample=False,
                **options,
            )
        texts = self.tokenizer.batch_decode(found[:, start:], skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]
