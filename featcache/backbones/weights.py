"""Weights of any backbone: their hash, their arithmetic, and what goes wrong while they load."""

import pickle
import zipfile
from typing import TypeVar

import torch
import xxhash
from safetensors import SafetensorError
from torch import nn

from featcache.errors import BackboneError

Model = TypeVar("Model", bound=nn.Module)

# What damaged, foreign or unreachable weights raise while a library loads them.
LOAD_ERRORS = (
    OSError,
    RuntimeError,
    ValueError,
    LookupError,
    OverflowError,
    TypeError,
    AttributeError,
    EOFError,
    ImportError,
    AssertionError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    SafetensorError,
)


def weights_hash(model: nn.Module) -> str:
    """XXH3-128 over the sorted state dict: names, types, shapes and bytes."""
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(memoryview(raw.numpy()))
    return digest.hexdigest()


def cast(model: Model, dtype: torch.dtype) -> Model:
    """Weights in `dtype`; batch norm's statistics stay float32, which its kernels accept."""
    if dtype == torch.float32:
        return model
    model = model.to(dtype)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.float()
    return model


def random_seed(pretrained: str) -> int | None:
    """The seed of `random` or `random:SEED`; None for anything else.

    Raises:
        BackboneError: if the seed is no number.
    """
    if pretrained == "random":
        return 0
    prefix, _, seed = pretrained.partition(":")
    if prefix != "random":
        return None
    if not seed.isdecimal():
        raise BackboneError(
            f"backbone.pretrained {pretrained!r}: expected `random` or `random:SEED`"
        )
    return int(seed)


def short_reason(error: BaseException) -> str:
    """An error's text in one line of at most 300 characters."""
    reason = " ".join(str(error).split()) or type(error).__name__
    return reason if len(reason) <= 300 else reason[:300] + "…"
