"""Models, tokenizers and image processors in the file format of Hugging Face's transformers.

A model is a folder, which is read without network, or a repository of the hub, which is asked for
by name. Weights come from safetensors files only: a pickle can run code. Weights that do not fill
the model are refused; transformers alone would fill the rest at random and warn.
"""

import importlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from featcache.backbones.base import PixelSpec
from featcache.backbones.weights import short_reason
from featcache.errors import BackboneError

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_EXPECTED = "expected config.json, model.safetensors, and the tokenizer's and processor's files"
_FILTERS = {2: "bilinear", 3: "bicubic"}


@dataclass(frozen=True)
class Source:
    """Where a model's files are.

    Attributes:
        name: folder, or `ORG/NAME` on the hub.
        local: whether it is a folder.
    """

    name: str
    local: bool


def find_source(option: str, model: str, presets: Mapping[str, str]) -> Source:
    """The files that a model option names.

    Args:
        option: the option's name, for messages.
        model: a preset, a folder (with or without `local-dir:`), or `ORG/NAME`.
        presets: hub repositories by short name.

    Raises:
        BackboneError: if it is none of them.
    """
    if model in presets:
        return Source(presets[model], local=False)
    folder = Path(model.removeprefix("local-dir:"))
    if folder.is_dir():
        return Source(str(folder), local=True)
    if model.startswith("local-dir:") or not _REPOSITORY.fullmatch(model):
        raise BackboneError(
            f"{option} {model!r}: no such folder; expected one with config.json, model.safetensors "
            f"and the tokenizer, ORG/NAME of a hub repository, or {' or '.join(presets)}"
        )
    return Source(model, local=False)


def import_transformers() -> Any:
    """The transformers package, imported at first use: that takes seconds.

    Raises:
        BackboneError: if it is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise BackboneError(
            f"BLIP needs the package transformers ({error}); pip install 'featcache[blip]'"
        ) from None
    return transformers


def load_model(cls: Any, source: Source) -> Any:
    """A model of class `cls` with float32 weights, in evaluation mode, gradients off.

    Raises:
        BackboneError: missing or damaged files, or weights of another model.
    """
    if source.local and not (Path(source.name) / "config.json").is_file():
        raise BackboneError(f"{source.name}: no config.json in it; {_EXPECTED}")
    with _one_line(source), _quiet(), torch.random.fork_rng(devices=[]):
        model, info = cls.from_pretrained(
            source.name,
            local_files_only=source.local,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, in one line
        )
    unfit = sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
    if unfit:
        held = ", ".join(model.config.architectures or ["an unnamed model"])
        raise BackboneError(
            f"weights of {source.name} do not fit: {len(unfit)} tensors of {cls.__name__} are "
            f"missing or of another shape, the first {unfit[0]}; they are those of {held}"
        )
    return model.eval().requires_grad_(False)


def load_part(cls: Any, source: Source) -> Any:
    """A tokenizer or image processor.

    Raises:
        BackboneError: missing or damaged files.
    """
    with _one_line(source), _quiet():
        return cls.from_pretrained(source.name, local_files_only=source.local)


def pixel_spec(processor: Any, image_size: int, source: Source) -> PixelSpec:
    """The pixels that an image processor makes, for towers that take squashed squares.

    Args:
        processor: with `size`, `resample`, `image_mean` and `image_std`.
        image_size: height and width that the tower's position embedding was trained on.
        source: for messages.

    Raises:
        BackboneError: if it does something else than resizing and normalising.
    """
    values = processor.to_dict()
    size = dict(values["size"])
    if (size.get("height"), size.get("width")) != (image_size, image_size):
        raise BackboneError(
            f"{source.name}: its image processor resizes to {size}, the model takes "
            f"{image_size}x{image_size}; put both from one checkpoint into the folder"
        )
    steps = {name: values.get(name, True) for name in ("do_resize", "do_rescale", "do_normalize")}
    off = [name for name, on in steps.items() if not on]
    if off or values.get("do_center_crop") or values.get("resample") not in _FILTERS:
        raise BackboneError(
            f"{source.name}: expected an image processor that resizes (bilinear or bicubic), "
            f"rescales and normalises, found {off or values.get('resample')}; use the checkpoint's "
            "own preprocessor_config.json"
        )
    return PixelSpec(
        size=(image_size, image_size),
        mean=tuple(float(value) for value in values["image_mean"]),
        std=tuple(float(value) for value in values["image_std"]),
        interpolation=_FILTERS[values["resample"]],
        resize_mode="squash",
        convert_first=True,
        on_white=True,
    )


class FusedAttention(nn.Module):
    """BLIP's vision attention in one kernel, on the same weights.

    The library writes its (B, heads, 577, 577) scores out, which costs a good part of the tower's
    time (benchmarks/blip.py); outputs stay within 3e-6 of its own.
    """

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.qkv, self.projection = attention.qkv, attention.projection
        self.num_heads: int = attention.num_heads

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        """(B, L, W) from (B, L, W), and no attention weights."""
        batch, length, width = hidden_states.shape
        parts = self.qkv(hidden_states).reshape(batch, length, 3, self.num_heads, -1)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(query, key, value)
        return self.projection(mixed.transpose(1, 2).reshape(batch, length, width)), None


def fuse_attention(vision_model: Any) -> None:
    """Puts `FusedAttention` into every block of a BLIP vision tower."""
    for layer in vision_model.encoder.layers:
        layer.self_attn = FusedAttention(layer.self_attn)


@contextmanager
def _one_line(source: Source) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # tokenizers raises just that for a broken file
        offline = "on a machine without network name a folder with the downloaded files"
        advice = _EXPECTED if source.local else offline
        raise BackboneError(
            f"{source.name} cannot be loaded: {short_reason(error)}; {advice}"
        ) from None


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar over the weights, and no warnings about what is checked here."""
    logging: Any = importlib.import_module("transformers.utils.logging")
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
