"""BLIP through transformers: image and text features, and the joint encoder of image with caption.

Reference: Li et al., BLIP: Bootstrapping Language-Image Pre-training for Unified Vision-Language
Understanding and Generation, 2022, section 3.1 (unimodal encoders, image-grounded text encoder).

The two contrastive features are the projections of the vision tower's and the text tower's first
token. The joint encoder is the same text tower with cross-attention to all image tokens; its first
token goes into the matching head.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from featcache.backbones.base import (
    DTYPES,
    Backbone,
    BackboneConfig,
    BackboneSpec,
    FeatureRequest,
    PixelInput,
    PixelSpec,
)
from featcache.backbones.blocks import bert_blocks, blip_image_blocks
from featcache.backbones.hugging_face import (
    find_source,
    fuse_attention,
    import_transformers,
    load_model,
    load_part,
    pixel_spec,
)
from featcache.backbones.local_dir import readable_by_all
from featcache.backbones.prompt_tower import BertPromptTower, PromptTower
from featcache.backbones.tails import kept_input
from featcache.backbones.towers import layer_index, pool_tokens
from featcache.backbones.trainable import TowerName, TrainableTowers
from featcache.backbones.weights import weights_hash
from featcache.errors import BackboneError
from featcache.identity import BackboneIdentity, Precision, fingerprint, hash_strings

PRESETS = {
    "base": "Salesforce/blip-itm-base-coco",
    "large": "Salesforce/blip-itm-large-coco",
}
"""Image-text matching models trained on COCO, by size."""

_VISION_KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "image_size",
    "patch_size",
    "hidden_act",
    "layer_norm_eps",
)
_TEXT_KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "hidden_act",
    "layer_norm_eps",
)
_SIZES = {768: "base", 1024: "large"}
_TOKENIZER_KEYS = ("do_lower_case", "strip_accents", "tokenize_chinese_chars")


class BlipConfig(BackboneConfig):
    """BLIP image-text retrieval models of transformers."""

    kind: Literal["blip"] = "blip"
    """Backbone kind."""
    model: str = "base"
    """base or large (Salesforce/blip-itm-…-coco), ORG/NAME of another hub repository, or a folder
    with config.json, model.safetensors, tokenizer and image processor, read without network."""
    max_text_tokens: int = Field(default=50, ge=3)
    """Tokens that a text is padded or cut to, its first and last one included, 3 or more."""
    enc_token: bool = False
    """Whether the joint encoder sees [ENC] in place of [CLS], as BLIP's own training did;
    transformers, and what was trained on its features, keep [CLS]."""

    @property
    def default_text_policy(self) -> str:
        """BLIP's captions were trained behind a prompt."""
        return "picture_of"

    def open(self, device: str = "cpu", precision: Precision = "fp32") -> "Blip":
        """The encoder with its weights loaded, in evaluation mode, gradients off.

        Raises:
            BackboneError: transformers is not installed, unknown model, files that are missing,
                damaged or of another model, or options that the model's tables do not hold.
        """
        transformers = import_transformers()
        source = find_source("backbone.model", self.model, PRESETS)
        model = load_model(transformers.BlipForImageTextRetrieval, source)
        tokenizer = load_part(transformers.AutoTokenizer, source)
        tokenizer.padding_side = tokenizer.truncation_side = "right"
        processor = load_part(transformers.BlipImageProcessor, source)
        text, vision = model.config.text_config, model.config.vision_config
        if self.max_text_tokens > text.max_position_embeddings:
            raise BackboneError(
                f"backbone.max_text_tokens {self.max_text_tokens} is more than the "
                f"{text.max_position_embeddings} positions of {self.model}"
            )
        if len(tokenizer) > text.vocab_size:
            raise BackboneError(
                f"{self.model}: its tokenizer has {len(tokenizer)} tokens, the model "
                f"{text.vocab_size}; put both from one checkpoint into the folder"
            )
        architecture = {
            "vision": {key: getattr(vision, key) for key in _VISION_KEYS},
            "text": {key: getattr(text, key) for key in _TEXT_KEYS},
            "image_text_hidden_size": model.config.image_text_hidden_size,
            "tokenizer": _tokenizer_hash(tokenizer),
        }
        identity = BackboneIdentity(
            kind="blip",
            # By size: the same weights may come from the hub today and from a folder tomorrow.
            name=f"blip-{_SIZES.get(vision.hidden_size, vision.hidden_size)}-{vision.image_size}",
            weights=weights_hash(model),
            architecture=fingerprint(architecture),
            options={"max_text_tokens": self.max_text_tokens, "enc_token": self.enc_token},
        )
        return Blip(
            model,
            tokenizer,
            processor,
            identity,
            pixel_spec(processor, int(vision.image_size), source),
            torch.device(device),
            precision,
            max_text_tokens=self.max_text_tokens,
            first_token=_enc_token(tokenizer, text) if self.enc_token else None,
        )


class Blip(Backbone):
    """A BLIP retrieval model as a frozen encoder of images, texts, and images with texts.

    Attributes:
        model: transformers' `BlipForImageTextRetrieval`, weights cast to `precision`.
        tokenizer: its tokenizer.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        processor: Any,
        identity: BackboneIdentity,
        pixels: PixelSpec,
        device: torch.device,
        precision: Precision,
        *,
        max_text_tokens: int,
        first_token: int | None,
    ) -> None:
        """The encoder around a loaded model.

        Args:
            model: transformers' retrieval model.
            tokenizer: its tokenizer.
            processor: its image processor.
            identity: what the weights are.
            pixels: what the vision tower expects.
            device: where it goes.
            precision: type of weights and activations.
            max_text_tokens: length of every text.
            first_token: id put in place of a text's first token in the joint encoder; None = none.
        """
        self.tokenizer = tokenizer
        self.max_text_tokens = max_text_tokens
        self._processor = processor
        self._first_token = first_token
        vision, text = model.config.vision_config, model.config.text_config
        side = int(vision.image_size) // int(vision.patch_size)
        self.spec = BackboneSpec(
            identity=identity,
            pixels=pixels,
            projected_dim=int(model.config.image_text_hidden_size),
            pooled_dim=int(vision.hidden_size),
            token_grid=(side, side),
            token_dim=int(vision.hidden_size),
            num_layers=int(vision.num_hidden_layers),
            # Checkpoints of transformers do not hold the learned temperature, only its start.
            logit_scale=math.exp(float(model.config.logit_scale_init_value)),
            has_text=True,
            num_prefix_tokens=1,
            can_finish=True,
            joint=(max_text_tokens, int(text.hidden_size)),
        )
        fuse_attention(model.vision_model)
        self.model = model
        self.move(device, precision)

    def move(self, device: str | torch.device, precision: Precision) -> None:
        """Puts the towers elsewhere; see `Backbone.move`."""
        self.device, self.precision = torch.device(device), precision
        # torch computes a layer norm's statistics in float32, whatever the type of its input.
        self.model = self.model.to(device=self.device, dtype=DTYPES[precision])
        self._prepare = PixelInput(self.spec.pixels, self.device, precision)

    def save(self, folder: Path) -> None:
        """Writes transformers' form, tokenizer and image processor with it; see `Backbone.save`."""
        for part in (self.model, self.tokenizer, self._processor):
            part.save_pretrained(folder)
        readable_by_all(folder / "model.safetensors")

    def encode_image(
        self, pixels: Tensor, request: FeatureRequest, texts: Sequence[str] | None = None
    ) -> dict[str, Tensor]:
        """Image features of a batch from one pass of the vision tower; see `Backbone.encode_image`.

        "pooled" is the first token behind the last norm, what the projection takes; "tokens" are
        the patches in front of that norm.
        """
        self.spec.require(request)
        with torch.inference_mode():
            states, features = self._look(self._prepare(pixels), request)
            first = states[:, 0]
            if request.projected:
                features["projected"] = self.model.vision_proj(first)
            if request.pooled:
                features["pooled"] = first
            if request.joint:
                features |= self._join(states, texts, request)
            return {
                name: value.clone() if value.dtype == torch.bool else _float32(value)
                for name, value in features.items()
            }

    def trainable(self) -> TrainableTowers:
        """The two contrastive towers opened for gradients; see `Backbone.trainable`."""
        return _TrainableBlip(self)

    def tail(self, num_blocks: int) -> nn.Module:
        """Last blocks as a module; see `Backbone.tail`."""
        self.spec.require_tail(num_blocks)
        return BlipTail(self.model, num_blocks)

    def prompt_tower(self) -> PromptTower:
        """The text tower on its own; see `Backbone.prompt_tower`."""
        return BertPromptTower(
            self.model.text_encoder,
            self.model.text_proj,
            self.tokenize,
            self.device,
            self.max_text_tokens,
        )

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """(n, P) float32 text features on `device`; see `Backbone.encode_text`."""
        with torch.inference_mode():
            features = _float32(self._read(*self.tokenize(texts)))
        return features.clone()  # outside: an ordinary tensor, which autograd accepts

    def tokenize(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(n, max_text_tokens) int64 token ids, and the same of 1 for tokens and 0 for padding.

        Texts that are too long keep their end token.
        """
        encoded = self.tokenizer(
            list(texts),
            padding="max_length",
            truncation=True,
            max_length=self.max_text_tokens,
            return_tensors="pt",
        )
        return encoded["input_ids"], encoded["attention_mask"]

    def reference_transform(self) -> Callable[[Any], Tensor]:
        """The image processor of transformers."""

        def transform(image: Any) -> Tensor:
            values: Tensor = self._processor(images=image, return_tensors="pt")["pixel_values"]
            return values[0]

        return transform

    def _read(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(n, P) projected texts of (n, T) token ids and their mask."""
        # Padding is masked, so columns that hold nothing else need not be computed.
        longest = int(mask.sum(1).max()) if len(mask) else 1
        ids, mask = ids[:, :longest].to(self.device), mask[:, :longest].to(self.device)
        states = self.model.text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        features: Tensor = self.model.text_proj(states[:, 0])
        return features

    def _look(self, x: Tensor, request: FeatureRequest) -> tuple[Tensor, dict[str, Tensor]]:
        """(B, 1 + L, W) states behind the last norm, and the tokens asked for."""
        vision = self.model.vision_model
        if not request.tokens:
            return vision(pixel_values=x).last_hidden_state, {}
        # A block's output is the next one's input, and the last one's is the norm's.
        blocks = [*vision.encoder.layers, vision.post_layernorm]
        if request.before_last:
            index = self.spec.num_layers - request.before_last
        else:
            index = layer_index(request, self.spec.num_layers) + 1
        with kept_input(blocks[index]) as kept:
            states = vision(pixel_values=x).last_hidden_state
        if request.before_last:
            return states, {"tokens": kept[0]}
        assert self.spec.token_grid is not None
        patches = pool_tokens(kept[0][:, 1:], self.spec.token_grid, request.token_pool)
        return states, {"tokens": patches}

    def _join(
        self, states: Tensor, texts: Sequence[str] | None, request: FeatureRequest
    ) -> dict[str, Tensor]:
        """Features of the joint encoder over image states (B, 1 + L, W) and B texts."""
        assert texts is not None, "the joint encoder needs a text for each image"
        assert len(texts) == len(states), f"{len(texts)} texts for {len(states)} images"
        ids, mask = (part.to(self.device) for part in self.tokenize(texts))
        if self._first_token is not None:
            ids[:, 0] = self._first_token
        # Every image token counts, so the cross-attention needs no mask.
        joint = self.model.text_encoder(
            input_ids=ids, attention_mask=mask, encoder_hidden_states=states
        ).last_hidden_state
        features: dict[str, Tensor] = {}
        if request.multimodal == "states":
            features |= {"multimodal": joint, "multimodal_mask": mask.bool()}
        if request.multimodal != "none":
            features["multimodal_pooled"] = joint[:, 0]
        if request.itm:
            features["itm"] = self.model.itm_head(joint[:, 0])
        return features


class _TrainableBlip(TrainableTowers):
    """BLIP's two contrastive towers with gradients; the joint encoder is not among them."""

    def __init__(self, backbone: Blip) -> None:
        super().__init__()
        model: Any = backbone.model
        self.model = model
        self.name = backbone.spec.identity.name
        self.feature_dim = backbone.spec.projected_dim
        self._backbone = backbone
        self.blocks = {
            "image": blip_image_blocks(model.vision_model, "vision_model"),
            "text": bert_blocks(model.text_encoder, "text_encoder"),
        }
        self.width = int(model.config.vision_config.hidden_size)
        self.patch_size = int(model.config.vision_config.patch_size)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """(B, P) image features; see `TrainableTowers.encode_image`."""
        states = self._backbone._look(self._backbone._prepare(pixels), FeatureRequest())[0]
        project: Any = self.model.vision_proj
        features: Tensor = project(states[:, 0])
        return features

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Token ids, padded; see `TrainableTowers.tokenize`."""
        return self._backbone.tokenize(texts)[0]

    def encode_text(self, tokens: Tensor) -> Tensor:
        """(n, P) text features; see `TrainableTowers.encode_text`."""
        padding: int = self._backbone.tokenizer.pad_token_id
        return self._backbone._read(tokens, (tokens != padding).long())

    def tower_of(self, name: str) -> TowerName | None:
        """The tower of a weight; cross-attention and matching head belong to both."""
        if name.startswith(("itm_head.", "text_encoder.")):
            alone = "crossattention" not in name and not name.startswith("itm_head.")
            return "text" if alone else None
        return "image" if name.startswith("vision_") else "text"

    def tail(self, num_blocks: int) -> nn.Module:
        """Last blocks, sharing weights; see `Backbone.tail`."""
        return self._backbone.tail(num_blocks)


class BlipTail(nn.Module):
    """Last blocks of BLIP's vision tower, its norm and its projection."""

    def __init__(self, model: Any, num_blocks: int) -> None:
        """Shares weights with `model`.

        Args:
            model: transformers' retrieval model.
            num_blocks: blocks from the end.
        """
        super().__init__()
        vision = model.vision_model
        self.blocks = nn.ModuleList(list(vision.encoder.layers)[-num_blocks:])
        self.norm, self.projection = vision.post_layernorm, model.vision_proj

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, P) projected features from (B, 1 + L, W) tokens that enter the blocks."""
        for block in self.blocks:
            output = block(tokens)
            tokens = output[0] if isinstance(output, tuple) else output
        projected: Tensor = self.projection(self.norm(tokens)[:, 0])
        return projected


def _float32(values: Tensor) -> Tensor:
    """A copy of its own, so that the batch's larger tensors can be freed."""
    return values.to(torch.float32, copy=True)


def _tokenizer_hash(tokenizer: Any) -> str:
    """Hash over vocabulary and normalisation."""
    tokens = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    settings = [f"{key}={tokenizer.init_kwargs.get(key)}" for key in _TOKENIZER_KEYS]
    return hash_strings([f"{number} {token}" for token, number in tokens] + settings)


def _enc_token(tokenizer: Any, text: Any) -> int:
    """Id of [ENC]; BLIP appends [DEC] (its start token) and [ENC] to BERT's vocabulary."""
    found = tokenizer.get_vocab().get("[ENC]")
    number = int(text.bos_token_id) + 1 if found is None else int(found)
    if number >= text.vocab_size:
        raise BackboneError(
            f"backbone.enc_token: the model has {text.vocab_size} tokens and none is [ENC] "
            f"(expected number {number}); set backbone.enc_token false"
        )
    return number
