"""Where pretraining starts: random weights, or those of a dual encoder that is already there."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
from torch import Tensor, nn

from featcache import adapter_folder
from featcache.backbones.adapted import AdaptedConfig
from featcache.backbones.base import Backbone, PixelSpec
from featcache.backbones.open_clip import OpenClip, OpenClipConfig
from featcache.errors import BackboneError, ConfigError
from finetune.contrastive.architectures import PRESETS, build, check_dual_encoder, model_config

DEFAULT_ARCHITECTURE = "demo-rn"


@dataclass(frozen=True)
class Start:
    """What training starts from.

    Attributes:
        name: of the architecture, for messages.
        architecture: open_clip model configuration.
        weights: hash of the weights; "" = random ones, drawn when the model is built.
        pixels: preprocessing that the weights were trained with; None = random weights.
        state: the weights by name; None = random ones.
    """

    name: str
    architecture: dict[str, Any]
    weights: str = ""
    pixels: PixelSpec | None = None
    state: dict[str, Tensor] | None = None

    def model(self, architecture: dict[str, Any]) -> nn.Module:
        """A model with these weights, on the CPU; random ones come from torch's generator.

        Args:
            architecture: this one's, with the logit scale and bias that the loss starts from.
        """
        model = build(architecture)
        if self.state is not None:
            own = model.state_dict()
            # A bias that the loss does not have is dropped. One that the weights lack begins where
            # the loss wants it, and the scale with it: of a softmax's scale, every pair would pass
            # for one.
            state = {name: value for name, value in self.state.items() if name in own}
            if "logit_bias" in own.keys() - state.keys():
                state |= {name: own[name] for name in ("logit_bias", "logit_scale")}
            model.load_state_dict(state)
        return model


def start_of(
    init: str, architecture: str | None, image_size: int | None, context_length: int | None
) -> Start:
    """Finds architecture and weights.

    Args:
        init: "" for random weights; a folder (open_clip's local-dir, or an adapted backbone); a
            weights file or open_clip tag of `architecture`.
        architecture: see `finetune.contrastive.architectures`; None = the folder's, or the small
            default.
        image_size: pixels; only for random weights.
        context_length: tokens; only for random weights.

    Raises:
        ConfigError: options that contradict each other, or an unknown architecture.
        BackboneError: weights that are missing, damaged, of another architecture or no dual
            encoder's.
    """
    if not init:
        name = architecture or DEFAULT_ARCHITECTURE
        return Start(name, model_config(name, image_size, context_length))
    for option, value in (("image_size", image_size), ("context_length", context_length)):
        if value is not None:
            raise ConfigError(
                f"{option}: {value} with weights from {init}, which have their own; leave it out"
            )
    folder = Path(init.removeprefix("local-dir:"))
    if not folder.is_dir():
        return _from_tag_or_file(init, architecture)
    if architecture is not None:
        raise ConfigError(
            f"architecture: {architecture} with init {init}, a folder that has its own; leave "
            "architecture out"
        )
    if (folder / adapter_folder.RECORD).is_file():
        return _from_adapted(folder)
    backbone = OpenClipConfig(model=f"local-dir:{folder}").open()
    return _start(str(folder), f"local-dir:{folder}", backbone)


def _from_tag_or_file(init: str, architecture: str | None) -> Start:
    if architecture is None:
        raise ConfigError(
            f"init: {init!r} is no folder; for a weights file or an open_clip tag name its "
            "architecture too (--architecture ViT-B-32)"
        )
    name = architecture
    if architecture in PRESETS:
        raise ConfigError(
            f"init: {init!r} for architecture {architecture}; give the folder that pretraining "
            "wrote, or the checkpoint's folder"
        )
    known_as = Path(name).stem
    if not Path(init).is_file() and not open_clip.is_pretrained_cfg(known_as, init):
        tags = open_clip.list_pretrained_tags_by_model(known_as)
        raise ConfigError(
            f"init: {init!r} is no folder, no file and no tag of {architecture}; its tags: "
            f"{', '.join(tags) or 'none'}"
        )
    backbone = OpenClipConfig(model=name, pretrained=init).open()
    return _start(architecture, known_as, backbone)


def _from_adapted(folder: Path) -> Start:
    held = adapter_folder.read_adapter(folder)
    if held.base["kind"] != "open_clip":
        raise BackboneError(
            f"{folder}: its base is of kind {held.base['kind']}; pretraining goes on from open_clip"
        )
    base = OpenClipConfig.model_validate(held.base)
    backbone = AdaptedConfig(model=str(folder)).open()
    name = base.model if ":" in base.model else Path(base.model.replace("/", "-")).stem
    try:
        return _start(str(folder), name, backbone)
    except RuntimeError:
        raise BackboneError(
            f"{folder}: an adapter of kind {held.adapter.kind} cannot be merged into plain "
            "weights, from which pretraining could go on"
        ) from None


def _start(name: str, known_as: str, backbone: Backbone) -> Start:
    """The weights of an opened backbone; raises RuntimeError if they are not open_clip's own."""
    if not isinstance(backbone, OpenClip):  # heads behind its projections
        raise RuntimeError("no open_clip model alone")
    architecture = dict(open_clip.get_model_config(known_as))
    check_dual_encoder(name, architecture)
    state = {key: value.detach() for key, value in backbone.model.state_dict().items()}
    expected = build(architecture).state_dict().keys() - {"logit_bias"}
    if expected != state.keys() - {"logit_bias"}:
        raise RuntimeError("weights of other names")
    identity = backbone.spec.identity
    return Start(name, architecture, identity.weights, backbone.spec.pixels, state)
