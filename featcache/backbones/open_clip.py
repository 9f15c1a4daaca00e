"""CLIP-like encoders through open_clip: ViT, ModifiedResNet, CoCa, and timm towers (SigLIP, …).

Weights come from exactly where the options say: a tag, a file, a folder, or `random`. Nothing here
ever falls back to random weights.
"""

import difflib
import io
import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
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
from featcache.backbones.blocks import clip_blocks, pool_blocks, set_timm_entry, timm_blocks
from featcache.backbones.local_dir import save_local_dir
from featcache.backbones.prompt_tower import ClipPromptTower, PromptTower
from featcache.backbones.towers import TimmTrunk, Tower, open_tower, pair, run_tower
from featcache.backbones.trainable import TowerName, TrainableTowers
from featcache.backbones.weights import (
    LOAD_ERRORS,
    cast,
    random_seed,
    short_reason,
    weights_hash,
)
from featcache.errors import BackboneError
from featcache.identity import BackboneIdentity, Precision, fingerprint

_PIXEL_KEYS = ("mean", "std", "interpolation", "resize_mode", "fill_color")


class OpenClipConfig(BackboneConfig):
    """Encoders of open_clip."""

    kind: Literal["open_clip"] = "open_clip"
    """Backbone kind."""
    model: str = "ViT-B-32"
    """Architecture name (ViT-B-32, RN50, …), `local-dir:FOLDER` with open_clip_config.json and
    weights, `hf-hub:ORG/REPO`, or an architecture's own JSON file."""
    pretrained: str = ""
    """Tag of the weights (laion2b_s34b_b79k, …), a weights file, or `random` / `random:SEED`; empty
    for `local-dir:` and `hf-hub:`. A weights file does not carry its preprocessing: it gets what
    all published weights of the architecture share (SigLIP's mean and std), otherwise open_clip's
    default (CLIP mean and std, bicubic, shortest side); `local-dir:` has its own."""

    def open(self, device: str = "cpu", precision: Precision = "fp32") -> "OpenClip":
        """The encoder with its weights loaded, in evaluation mode, gradients off.

        Raises:
            BackboneError: unknown model or tag, no weights named, weights that cannot be fetched or
                do not fit, or an activation that differs from the one the tag was trained with.
        """
        import open_clip

        name, seed = self._checked()
        source = name if ":" in self.model else self.model
        architecture = open_clip.get_model_config(name)
        from_file = seed is None and ":" not in name and Path(self.pretrained).is_file()
        with _quiet_root_logger(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed or 0)
            try:
                model = open_clip.create_model(
                    name,
                    pretrained=None if seed is not None else self.pretrained or None,
                    load_weights=seed is None,
                    require_pretrained=seed is None,
                    pretrained_image=False,
                    pretrained_text=False,
                    force_preprocess_cfg=_published_pixels(name) if from_file else None,
                )
                tokenizer = open_clip.get_tokenizer(name)
            except LOAD_ERRORS as error:
                raise BackboneError(self._load_failure(error)) from None
        model = model.eval().requires_grad_(False)
        identity = BackboneIdentity(
            kind="open_clip",
            # A folder may be moved or renamed: its weights and architecture are hashed.
            name="local-dir" if name.startswith("local-dir:") else Path(source).stem,
            weights=weights_hash(model),
            architecture=fingerprint(architecture),
        )
        return OpenClip(
            model,
            tokenizer,
            identity,
            architecture,
            torch.device(device),
            precision,
        )

    def _checked(self) -> tuple[str, int | None]:
        """The name open_clip knows, and the seed of random weights or None."""
        import open_clip

        seed = random_seed(self.pretrained)
        if self.model.startswith("local-dir:"):
            self._check_folder(Path(self.model.removeprefix("local-dir:")), seed)
            return self.model, seed
        if self.model.startswith("hf-hub:"):
            if self.pretrained:
                raise BackboneError(
                    f"backbone.pretrained {self.pretrained!r} contradicts {self.model}, which has "
                    "its own weights; leave backbone.pretrained empty"
                )
            return self.model, None
        if self.model.endswith(".json"):
            return self._check_pretrained(_add_architecture(Path(self.model)), seed)
        name = self.model.replace("/", "-")
        known = open_clip.list_models()
        if name not in known:
            close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
            raise BackboneError(
                f"backbone.model {self.model!r} is not known to open_clip; "
                + (f"did you mean {', '.join(close)}?" if close else "see open_clip.list_models()")
            )
        return self._check_pretrained(name, seed)

    def _check_folder(self, folder: Path, seed: int | None) -> None:
        config = folder / "open_clip_config.json"
        if not config.is_file():
            found = "no such folder" if not folder.is_dir() else "no open_clip_config.json in it"
            raise BackboneError(
                f"backbone.model {self.model}: {found}; expected a folder with "
                "open_clip_config.json and open_clip_model.safetensors"
            )
        values = _read_json(config)
        if "model_cfg" not in values:
            raise BackboneError(f"{config}: no `model_cfg` in it; is it from open_clip?")
        if seed is not None:
            return
        if self.pretrained:
            raise BackboneError(
                f"backbone.pretrained {self.pretrained!r} contradicts {self.model}, which has its "
                "own weights; leave backbone.pretrained empty"
            )
        if not any(file.suffix in {".safetensors", ".bin", ".pth"} for file in folder.iterdir()):
            raise BackboneError(
                f"backbone.model {self.model}: no weights in the folder; expected "
                "open_clip_model.safetensors (or set backbone.pretrained random)"
            )

    def _check_pretrained(self, name: str, seed: int | None) -> tuple[str, int | None]:
        import open_clip

        if seed is not None:
            return name, seed
        tags = open_clip.list_pretrained_tags_by_model(name)
        if not self.pretrained:
            raise BackboneError(
                f"backbone.pretrained is empty: {name} needs weights; give one of its tags "
                f"({', '.join(tags) or 'it has none'}), a weights file, or `random`"
            )
        if open_clip.is_pretrained_cfg(name, self.pretrained):
            trained = bool(open_clip.get_pretrained_cfg(name, self.pretrained).get("quick_gelu"))
            built = bool(open_clip.get_model_config(name).get("quick_gelu", False))
            if trained != built:
                other = f"{name}-quickgelu" if trained else name.removesuffix("-quickgelu")
                raise BackboneError(
                    f"the weights {self.pretrained} of {name} were trained with "
                    f"{'QuickGELU' if trained else 'GELU'}, the architecture has the other one; "
                    f"set backbone.model {other}"
                )
        elif not Path(self.pretrained).is_file():
            raise BackboneError(
                f"backbone.pretrained {self.pretrained!r} is neither a file nor a tag of {name}; "
                f"its tags: {', '.join(tags) or 'none'}"
            )
        return name, None

    def _load_failure(self, error: BaseException) -> str:
        reason = short_reason(error)
        what = f"{self.model} {self.pretrained}".strip()
        if Path(self.pretrained).is_file() or self.model.startswith("local-dir:"):
            return f"weights of {what} do not load: {reason}"
        if self.pretrained.startswith("random"):
            return f"{what} cannot be built: {reason}"
        return (
            f"weights of {what} cannot be fetched or loaded: {reason}; on a machine without "
            "network give a downloaded file as backbone.pretrained, or a folder as backbone.model "
            "local-dir:FOLDER"
        )


class OpenClip(Backbone):
    """An open_clip model as a frozen dual encoder.

    Attributes:
        model: the open_clip model, weights cast to `precision`.
        tokenizer: its tokenizer; long texts are cut with the end token kept.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Callable[[list[str]], Tensor],
        identity: BackboneIdentity,
        architecture: dict[str, Any],
        device: torch.device,
        precision: Precision,
    ) -> None:
        self.tokenizer, self._architecture = tokenizer, architecture
        self._tower = open_tower(model.visual)
        pixels = _pixel_spec(model)
        bias = getattr(model, "logit_bias", None)
        self.spec = BackboneSpec(
            identity=identity,
            pixels=pixels,
            projected_dim=int(architecture["embed_dim"]),
            pooled_dim=self._tower.pooled_dim,
            token_grid=self._tower.token_grid,
            token_dim=self._tower.token_dim,
            num_layers=self._tower.num_layers,
            logit_scale=math.exp(float(model.logit_scale.reshape(-1)[0])),
            logit_bias=0.0 if bias is None else float(bias.reshape(-1)[0]),
            has_text=True,
            num_prefix_tokens=self._tower.num_prefix_tokens,
            can_finish=self._tower.can_finish,
        )
        self.model = model
        self.move(device, precision)

    def move(self, device: str | torch.device, precision: Precision) -> None:
        """Puts the towers elsewhere; see `Backbone.move`."""
        self.device, self.precision = torch.device(device), precision
        self.model = cast(self.model.to(self.device), DTYPES[precision])
        self._prepare = PixelInput(self.spec.pixels, self.device, precision)

    def trainable(self) -> TrainableTowers:
        """The towers opened for gradients; see `Backbone.trainable`."""
        return _TrainableClip(self, self._tower)

    def save(self, folder: Path) -> None:
        """Writes open_clip's `local-dir`, with a tokenizer that is not CLIP's own; see `Backbone`.

        Raises:
            BackboneError: if open_clip cannot find the tokenizer of this kind in a folder.
        """
        from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

        if isinstance(self.tokenizer, HFTokenizer):
            self.tokenizer.tokenizer.save_pretrained(folder)
        elif not isinstance(self.tokenizer, SimpleTokenizer):
            raise BackboneError(
                f"{self.spec.identity.name}: open_clip finds its {type(self.tokenizer).__name__} "
                "by the model's name only, which a folder does not have; it cannot be written"
            )
        save_local_dir(folder, self.model.state_dict(), self._architecture, self.spec.pixels)

    def encode_image(
        self, pixels: Tensor, request: FeatureRequest, texts: Sequence[str] | None = None
    ) -> dict[str, Tensor]:
        """Image features of a batch from one pass; see `Backbone.encode_image`.

        Raises:
            BackboneError: if the tower does not offer a requested feature.
        """
        self.spec.require(request)
        return run_tower(self._tower, self._prepare, pixels, request)

    def tail(self, num_blocks: int) -> nn.Module:
        """Last blocks as a module; see `Backbone.tail`."""
        self.spec.require_tail(num_blocks)
        return self._tower.tail(num_blocks)

    def prompt_tower(self) -> PromptTower:
        """The text tower on its own; see `Backbone.prompt_tower`."""
        return ClipPromptTower(self.model, self.tokenizer, self.device)

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """(n, P) float32 text features on `device`; see `Backbone.encode_text`."""
        with torch.inference_mode():
            tokens = self.tokenizer(list(texts)).to(self.device)
            features: Tensor = self.model.encode_text(tokens, normalize=False)
            features = features.to(torch.float32)
        return features.clone()  # outside: an ordinary tensor, which autograd accepts

    def reference_transform(self) -> Callable[[Any], Tensor]:
        """open_clip's own evaluation transform."""
        from open_clip.transform import PreprocessCfg, image_transform_v2

        values = dict(self.model.visual.preprocess_cfg)
        transform: Callable[[Any], Tensor] = image_transform_v2(
            PreprocessCfg(**values), is_train=False
        )
        return transform


class _TrainableClip(TrainableTowers):
    """CLIP's towers with gradients."""

    def __init__(self, backbone: OpenClip, tower: Tower) -> None:
        super().__init__()
        model: Any = backbone.model
        self.model = model
        self.name = backbone.spec.identity.name
        self.feature_dim = backbone.spec.projected_dim
        self._tower, self._tokenizer = tower, backbone.tokenizer
        self._spec = backbone.spec
        self._prepare = backbone._prepare
        self.blocks = {
            "image": clip_blocks(model, "visual.transformer.resblocks")
            or pool_blocks(model, "visual.attnpool")
            or (timm_blocks(model, "visual.trunk") if hasattr(model.visual, "trunk") else []),
            "text": clip_blocks(
                model,
                "transformer.resblocks"
                if hasattr(model, "transformer")
                else "text.transformer.resblocks",
            ),
        }
        if hasattr(model.visual, "ln_pre") and tower.can_finish:  # sequences of (B, L, W)
            self.prompt_entry = "visual.ln_pre"
            self.num_prefix_tokens = tower.num_prefix_tokens
            self.width = int(model.visual.conv1.out_channels)
            self.patch_size = int(model.visual.patch_size[0])
        elif isinstance(tower, TimmTrunk) and tower.can_finish:
            set_timm_entry(self, tower.trunk, "visual.trunk.")

    def encode_image(self, pixels: Tensor) -> Tensor:
        """(B, P) image features; see `TrainableTowers.encode_image`."""
        return self._tower(self._prepare(pixels), FeatureRequest())["projected"]

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Token ids; see `TrainableTowers.tokenize`."""
        return self._tokenizer(list(texts))

    def encode_text(self, tokens: Tensor) -> Tensor:
        """(n, P) text features; see `TrainableTowers.encode_text`."""
        encode: Any = self.model.encode_text
        features: Tensor = encode(tokens, normalize=False)
        return features

    def tower_of(self, name: str) -> TowerName | None:
        """The tower of a weight; the logit scale and bias belong to both."""
        if name.startswith("visual."):
            return "image"
        return None if name in ("logit_scale", "logit_bias") else "text"

    def tail(self, num_blocks: int) -> nn.Module:
        """Last blocks, sharing weights; see `Backbone.tail`."""
        self._spec.require_tail(num_blocks)
        return self._tower.tail(num_blocks)


def _published_pixels(name: str) -> dict[str, Any]:
    """Preprocessing that all published weights of an architecture share; {} if they differ.

    open_clip itself gives every weights file CLIP's, which is wrong for SigLIP and others.
    """
    import open_clip
    from open_clip.transform import PreprocessCfg

    default = {key: getattr(PreprocessCfg, key) for key in _PIXEL_KEYS}
    shared: dict[str, Any] | None = None
    for tag in open_clip.list_pretrained_tags_by_model(name):
        given = open_clip.get_pretrained_cfg(name, tag)
        stated = {key: given[key] for key in _PIXEL_KEYS if given.get(key)}
        found = {k: tuple(v) if isinstance(v, list) else v for k, v in (default | stated).items()}
        if shared is not None and found != shared:
            return {}
        shared = found
    return shared or {}


def _pixel_spec(model: Any) -> PixelSpec:
    values = model.visual.preprocess_cfg
    bilinear = values["interpolation"] == "bilinear"
    return PixelSpec(
        size=pair(values["size"]),
        mean=tuple(float(value) for value in values["mean"]),
        std=tuple(float(value) for value in values["std"]),
        interpolation="bilinear" if bilinear else "bicubic",
        resize_mode=values["resize_mode"],
        fill_color=int(values["fill_color"]),
    )


def _add_architecture(file: Path) -> str:
    """Registers an architecture file under its own name."""
    import open_clip

    if not file.is_file():
        raise BackboneError(f"backbone.model {file}: no such file")
    values = _read_json(file)
    missing = [key for key in ("embed_dim", "vision_cfg", "text_cfg") if key not in values]
    if missing:
        raise BackboneError(f"{file}: no `{missing[0]}` in it; is it an open_clip architecture?")
    if file.stem in open_clip.list_models():
        if open_clip.get_model_config(file.stem) != values:
            raise BackboneError(
                f"{file}: open_clip already has another architecture named {file.stem!r}; rename "
                "the file"
            )
        return file.stem
    open_clip.add_model_config(file)
    return file.stem


def _read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.load(io.StringIO(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise BackboneError(f"{file}: not JSON ({' '.join(str(error).split())})") from None
    if not isinstance(values, dict):
        raise BackboneError(f"{file}: expected a JSON object, found {type(values).__name__}")
    return values


@contextmanager
def _quiet_root_logger() -> Iterator[None]:
    """open_clip logs through the root logger, which would install a handler for everybody."""
    root, handler = logging.getLogger(), logging.NullHandler()

    def foreign(record: logging.LogRecord) -> bool:
        return "open_clip" not in record.pathname

    root.addHandler(handler)
    root.addFilter(foreign)
    try:
        yield
    finally:
        root.removeFilter(foreign)
        root.removeHandler(handler)
