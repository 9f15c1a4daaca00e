"""Any timm model as a frozen image encoder: no text, no projection, features before the classifier.

`pooled` is what timm calls pre-logits: the pooled feature that the classifier would read. There is
no `projected`: that name stands for a space shared with text, which these models do not have.
Weights come from exactly where the options say; nothing here falls back to random weights, and the
network is reached only for a tag or a `hf-hub:` name.
"""

import difflib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import PositiveInt
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
from featcache.backbones.blocks import set_timm_entry, timm_blocks
from featcache.backbones.local_dir import readable_by_all
from featcache.backbones.tails import TimmTail
from featcache.backbones.towers import TimmTrunk, layer_index, run_tower
from featcache.backbones.trainable import TowerName, TrainableTowers
from featcache.backbones.weights import LOAD_ERRORS, cast, random_seed, short_reason, weights_hash
from featcache.errors import BackboneError
from featcache.identity import BackboneIdentity, Precision, fingerprint


class TimmConfig(BackboneConfig):
    """Image encoders of timm; they know no text."""

    kind: Literal["timm"] = "timm"
    """Backbone kind."""
    model: str = "vit_small_patch16_224"
    """Architecture name (vit_base_patch16_224, resnet50, …), with its tag behind a dot or in
    `pretrained`; `local-dir:FOLDER` with timm's config.json and weights; or `hf-hub:ORG/REPO`."""
    pretrained: str = ""
    """Tag of the weights (augreg_in21k_ft_in1k, …), a weights file, or `random` / `random:SEED`;
    empty for `local-dir:`, `hf-hub:` and a model with its tag. A file's classifier is dropped."""
    image_size: PositiveInt | None = None
    """Height and width of the input in pixels; unset = the size the weights were trained with.
    Transformers interpolate their position embeddings."""

    @property
    def image_only(self) -> bool:
        """True: timm's models know no text."""
        return True

    def open(self, device: str = "cpu", precision: Precision = "fp32") -> "Timm":
        """The encoder with its weights loaded, in evaluation mode, gradients off.

        Raises:
            BackboneError: unknown model or tag, no weights named, weights that cannot be fetched or
                do not fit, or a model whose input is not three channels of a fixed size.
        """
        name, seed = self._checked()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed or 0)
            try:
                model = self._create(name, seed)
            except LOAD_ERRORS as error:
                raise BackboneError(self._load_failure(error)) from None
        model = model.eval().requires_grad_(False)
        config = model.pretrained_cfg
        identity = BackboneIdentity(
            kind="timm",
            name=str(config["architecture"]),
            weights=weights_hash(model),
            architecture=fingerprint(
                {
                    "name": config["architecture"],
                    "arguments": json.loads(json.dumps(model.pretrained_model_args, default=str)),
                    "image_size": self.image_size,
                }
            ),
        )
        return Timm(model, identity, _pixel_spec(model, self.image_size), device, precision)

    def _create(self, name: str, seed: int | None) -> Any:
        """The model without its classifier."""
        import timm

        options: dict[str, Any] = {}
        known = None if ":" in name else timm.get_pretrained_cfg(name)
        if self.image_size is not None and (known is None or known.fixed_input_size):
            options["img_size"] = self.image_size
        if seed is not None:
            return timm.create_model(name, pretrained=False, num_classes=0, **options)
        if Path(self.pretrained).is_file():
            # Loaded strictly: timm would skip what is missing, were the classifier dropped by it.
            state = _headless(timm.models.load_state_dict(self.pretrained), name)
            source = {"state_dict": state, "num_classes": 0, "classifier": None}
            model = timm.create_model(
                name, pretrained=True, num_classes=0, pretrained_cfg_overlay=source, **options
            )
            model.pretrained_cfg.pop("state_dict")  # a second copy of every weight
            return model
        model = timm.create_model(name, pretrained=True, **options)
        model.reset_classifier(0)
        return model

    def _checked(self) -> tuple[str, int | None]:
        """The name timm knows, tag included, and the seed of random weights or None."""
        import timm

        seed = random_seed(self.pretrained)
        if self.model.startswith(("local-dir:", "hf-hub:")):
            if self.pretrained:
                raise BackboneError(
                    f"backbone.pretrained {self.pretrained!r} contradicts {self.model}, which has "
                    "its own weights; leave backbone.pretrained empty"
                )
            folder = Path(self.model.partition(":")[2])
            if self.model.startswith("local-dir:") and not (folder / "config.json").is_file():
                raise BackboneError(
                    f"backbone.model {self.model}: no config.json in it; expected a folder as timm "
                    "writes it, with config.json and model.safetensors"
                )
            return self.model, None
        name, _, tag = self.model.partition(".")
        if not timm.is_model(name):
            close = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
            raise BackboneError(
                f"backbone.model {self.model!r} is not known to timm; "
                + (f"did you mean {', '.join(close)}?" if close else "see timm.list_models()")
            )
        if seed is not None or Path(self.pretrained).is_file():
            return name, seed
        if tag and self.pretrained not in ("", tag):
            raise BackboneError(
                f"backbone.pretrained {self.pretrained!r} contradicts the tag of {self.model}; "
                "drop one of them"
            )
        tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{name}.*")]
        tag = tag or self.pretrained
        if not tag:
            raise BackboneError(
                f"backbone.pretrained is empty: {name} needs weights; give one of its tags "
                f"({', '.join(tags) or 'it has none'}), a weights file, or `random`"
            )
        if tag not in tags:
            raise BackboneError(
                f"backbone.pretrained {tag!r} is neither a file nor a tag of {name}; its tags: "
                f"{', '.join(tags) or 'none'}"
            )
        return f"{name}.{tag}", None

    def _load_failure(self, error: BaseException) -> str:
        what, reason = f"{self.model} {self.pretrained}".strip(), short_reason(error)
        if Path(self.pretrained).is_file() or self.model.startswith("local-dir:"):
            return f"weights of {what} do not load: {reason}"
        if self.pretrained.startswith("random"):
            return f"{what} cannot be built: {reason}"
        return (
            f"weights of {what} cannot be fetched or loaded: {reason}; on a machine without "
            "network give a downloaded file as backbone.pretrained, or a folder as backbone.model "
            "local-dir:FOLDER"
        )


class Timm(Backbone):
    """A timm model as a frozen image encoder.

    Attributes:
        model: the timm model without its classifier, weights cast to `precision`.
    """

    def __init__(
        self,
        model: Any,
        identity: BackboneIdentity,
        pixels: PixelSpec,
        device: str,
        precision: Precision,
    ) -> None:
        """Moves the model to its device and arithmetic.

        Args:
            model: timm model in evaluation mode, without a classifier.
            identity: what goes into a cache's fingerprint.
            pixels: what it was trained on.
            device: where it runs.
            precision: arithmetic of weights and activations.
        """
        self._tower = _tower(model, pixels.size)
        self.spec = BackboneSpec(
            identity=identity,
            pixels=pixels,
            projected_dim=0,
            pooled_dim=self._tower.pooled_dim,
            token_grid=self._tower.token_grid,
            token_dim=self._tower.token_dim,
            num_layers=self._tower.num_layers,
            logit_scale=1.0,
            has_text=False,
            num_prefix_tokens=self._tower.num_prefix_tokens,
            can_finish=self._tower.can_finish,
        )
        self.model = model
        self.move(device, precision)

    def move(self, device: str | torch.device, precision: Precision) -> None:
        """Puts the model elsewhere; see `Backbone.move`."""
        self.device, self.precision = torch.device(device), precision
        self.model = cast(self.model.to(self.device), DTYPES[precision])
        self._prepare = PixelInput(self.spec.pixels, self.device, precision)

    def save(self, folder: Path) -> None:
        """Writes timm's `local-dir`, without a classifier; see `Backbone.save`."""
        from timm.models import save_for_hf

        pixels = self.spec.pixels
        data = {
            "input_size": (3, *pixels.size),
            "mean": pixels.mean,
            "std": pixels.std,
            "interpolation": pixels.interpolation,
            "crop_pct": pixels.crop_pct,
            "crop_mode": self.model.pretrained_cfg.get("crop_mode") or "center",
        }
        save_for_hf(self.model, str(folder), safe_serialization=True, data_config=data)
        readable_by_all(folder / "model.safetensors")

    def encode_image(
        self, pixels: Tensor, request: FeatureRequest, texts: Sequence[str] | None = None
    ) -> dict[str, Tensor]:
        """Image features of a batch from one pass; see `Backbone.encode_image`.

        Raises:
            BackboneError: if the model does not offer a requested feature.
        """
        self.spec.require(request)
        return run_tower(self._tower, self._prepare, pixels, request)

    def trainable(self) -> TrainableTowers:
        """The model opened for gradients; see `Backbone.trainable`."""
        return _TrainableTimm(self, self._tower)

    def tail(self, num_blocks: int) -> nn.Module:
        """Last blocks as a module that returns pooled features; see `Backbone.tail`."""
        self.spec.require_tail(num_blocks)
        return self._tower.tail(num_blocks)

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Refuses: there is no text tower.

        Raises:
            BackboneError: always.
        """
        raise _no_text(self.spec.identity.name)

    def reference_transform(self) -> Callable[[Any], Tensor]:
        """Timm's own evaluation transform, behind the conversion to RGB that its readers do."""
        import timm

        config = timm.data.resolve_model_data_config(self.model)
        size = self.spec.pixels.size
        transform = timm.data.create_transform(**{**config, "input_size": (3, *size)})

        def apply(image: Any) -> Tensor:
            pixels: Tensor = transform(image.convert("RGB"))
            return pixels

        return apply


class _Tower(TimmTrunk):
    """Pooled features before the classifier; a convolutional model's tokens are its last cells."""

    def __init__(self, model: Any, size: tuple[int, int]) -> None:
        super().__init__(model, model)
        blank = torch.zeros(1, 3, *size)
        with torch.inference_mode():
            last = model.forward_features(blank)
            self.pooled_dim = int(model.forward_head(last, pre_logits=True).shape[-1])
            self._cells = not self.num_layers and self._last_cells(blank)

    def _last_cells(self, blank: Tensor) -> bool:
        """Whether the last stage gives (B, W, rows, columns) cells; takes their sizes."""
        if not hasattr(self.trunk, "forward_intermediates"):
            return False
        try:
            cells = self._run_cells(blank)[1]
        except LOAD_ERRORS:  # a model without a grid says so in its own way
            return False
        self.token_grid = (int(cells.shape[2]), int(cells.shape[3]))
        self.token_dim, self.num_layers = int(cells.shape[1]), 1
        return True

    def _run_cells(self, x: Tensor) -> tuple[Tensor, Tensor]:
        last, cells = self.trunk.forward_intermediates(x, indices=1, output_fmt="NCHW")
        return last, cells[0]

    def tail(self, num_blocks: int) -> nn.Module:
        return TimmTail(self.trunk, num_blocks)

    def run(self, x: Tensor, request: FeatureRequest) -> dict[str, Tensor]:
        features: dict[str, Tensor] = {}
        if not request.tokens:
            last = self.trunk.forward_features(x)
        elif self._cells:
            last, cells = self._run_cells(x)
            features["tokens"] = cells.flatten(2).transpose(1, 2)
        else:
            layer = layer_index(request, self.num_layers)
            last, tokens = self.trunk.forward_intermediates(x, indices=[layer], output_fmt="NLC")
            features["tokens"] = tokens[0]
        features["pooled"] = self.trunk.forward_head(last, pre_logits=True)
        return features


class _TrainableTimm(TrainableTowers):
    """A timm model with gradients: pooled features, no text."""

    def __init__(self, backbone: Timm, tower: _Tower) -> None:
        super().__init__()
        self.model = backbone.model
        self.name = backbone.spec.identity.name
        self.feature_dim = backbone.spec.pooled_dim
        self._tower, self._backbone = tower, backbone
        self.blocks = {"image": timm_blocks(self.model), "text": []}
        if tower.can_finish:
            set_timm_entry(self, tower.trunk, "")

    def encode_image(self, pixels: Tensor) -> Tensor:
        """(B, D) pooled features; see `TrainableTowers.encode_image`."""
        request = FeatureRequest(projected=False, pooled=True)
        return self._tower(self._backbone._prepare(pixels), request)["pooled"]

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Refuses: there is no text tower; see `TrainableTowers.tokenize`."""
        raise _no_text(self.name)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Refuses: there is no text tower; see `TrainableTowers.encode_text`."""
        raise _no_text(self.name)

    def tower_of(self, name: str) -> TowerName:
        """Always the image tower: there is no other."""
        return "image"

    def tail(self, num_blocks: int) -> nn.Module:
        """Last blocks, sharing weights; see `Backbone.tail`."""
        return self._backbone.tail(num_blocks)


def _no_text(name: str) -> BackboneError:
    return BackboneError(
        f"{name} is a timm model and reads no text; choose a head that needs no class names "
        "(linear), or a backbone with a text tower (open_clip)"
    )


def _tower(model: Any, size: tuple[int, int]) -> _Tower:
    """The tower around a model.

    Raises:
        BackboneError: if the model does not take plain images of that size.
    """
    try:
        return _Tower(model, size)
    except LOAD_ERRORS as error:
        raise BackboneError(
            f"{model.pretrained_cfg['architecture']} does not turn {size[0]}x{size[1]} images into "
            f"one vector each: {short_reason(error)}"
        ) from None


def _headless(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """A state dict without the classifier's tensors."""
    import timm

    config = timm.get_pretrained_cfg(name)
    classifier = () if config is None else config.classifier or ()
    names = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    dropped = {f"{layer}.{part}" for layer in names for part in ("weight", "bias")}
    return {key: tensor for key, tensor in state.items() if key not in dropped}


def _pixel_spec(model: Any, image_size: int | None) -> PixelSpec:
    """What the model was trained on, from timm's data configuration."""
    import timm

    values = timm.data.resolve_model_data_config(model)
    name = model.pretrained_cfg["architecture"]
    channels, height, width = values["input_size"]
    modes = {"center": "shortest", "squash": "squash"}
    if channels != 3 or values["crop_mode"] not in modes:
        raise BackboneError(
            f"{name} wants {channels} channels cropped by {values['crop_mode']!r}; supported are 3 "
            f"channels and {' or '.join(modes)}"
        )
    if values["interpolation"] not in ("bicubic", "bilinear"):
        raise BackboneError(
            f"{name} wants its images resized by {values['interpolation']!r}; supported are "
            "bicubic and bilinear"
        )
    return PixelSpec(
        size=(height, width) if image_size is None else (image_size, image_size),
        mean=tuple(float(value) for value in values["mean"]),
        std=tuple(float(value) for value in values["std"]),
        interpolation=values["interpolation"],
        resize_mode=modes[values["crop_mode"]],
        crop_pct=float(values["crop_pct"]),
        convert_first=True,
    )
