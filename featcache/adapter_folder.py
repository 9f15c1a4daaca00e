"""An adapted backbone's folder: the base by name and weights, and the tensors that change it.

adapter.json         format, base (options that open it, its identity), adapter (kind, options),
                     pixels, versions
adapter.safetensors  trained tensors only
"""

import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from featcache.adapters import AnyAdapter
from featcache.adapters.base import Adapter, AdapterConfig
from featcache.backbones.base import Backbone, BackboneConfig
from featcache.errors import BackboneError
from featcache.identity import BackboneIdentity, fingerprint

FORMAT = 1
RECORD, TENSORS = "adapter.json", "adapter.safetensors"


@dataclass(frozen=True)
class AdapterFolder:
    """What a folder holds.

    Attributes:
        base: options that open the base, as recorded.
        base_identity: what the base was.
        adapter: options of the adapter.
        tensors: its trained tensors, on the CPU.
        record: all of adapter.json.
    """

    base: dict[str, Any]
    base_identity: BackboneIdentity
    adapter: AdapterConfig
    tensors: dict[str, Tensor]
    record: dict[str, Any]

    def identity(self) -> BackboneIdentity:
        """What the adapted backbone is: it changes with the base, the options and every tensor."""
        base = self.base_identity
        digest = xxhash.xxh3_128(base.weights.encode())
        for name, tensor in sorted(self.tensors.items()):
            digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
            raw = tensor.contiguous().reshape(-1).view(torch.uint8)
            digest.update(raw.numpy().data)
        return BackboneIdentity(
            kind="adapted",
            name=f"{base.name}+{self.adapter.kind}",
            weights=digest.hexdigest(),
            architecture=fingerprint({"base": base.architecture, "adapter": self.adapter.record()}),
            options=base.options,
        )


def write_adapter(
    folder: Path,
    base: BackboneConfig,
    backbone: Backbone,
    config: AdapterConfig,
    state: Mapping[str, Tensor],
) -> None:
    """Writes the two files.

    Args:
        folder: existing folder.
        base: options that `backbone` was opened with.
        backbone: the base; its identity is that of the weights before training.
        config: resolved options of the adapter.
        state: see `Adapter.state`.
    """
    tensors = {name: t.detach().cpu().clone().contiguous() for name, t in state.items()}
    record = {
        "format": FORMAT,
        "base": base.record(),
        "base_identity": backbone.spec.identity.record(),
        "adapter": config.record(),
        "pixels": asdict(backbone.spec.pixels),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "featcache")},
    }
    # Not save_file: it leaves a file that only its owner may read, whatever the umask.
    (folder / TENSORS).write_bytes(save(tensors, metadata={"format": "pt"}))
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def is_adapter(folder: Path) -> bool:
    """Whether a folder says that it holds an adapted backbone."""
    return (folder / RECORD).is_file()


def read_adapter(folder: Path) -> AdapterFolder:
    """What a folder holds.

    Raises:
        BackboneError: no such folder, or files that are missing, damaged or of another format.
    """
    record = read_record(folder)
    try:
        config: AdapterConfig = TypeAdapter(AnyAdapter).validate_python(record["adapter"])
        identity = BackboneIdentity.model_validate(record["base_identity"])
        tensors = load((folder / TENSORS).read_bytes())
        return AdapterFolder(record["base"], identity, config, tensors, record)
    except (OSError, ValueError, KeyError, TypeError, ValidationError, SafetensorError) as error:
        raise _damaged(folder, error) from None


def read_record(folder: Path) -> dict[str, Any]:
    """Content of adapter.json, without the tensors; `base` holds the options of the base.

    Raises:
        BackboneError: see `read_adapter`.
    """
    if not is_adapter(folder):
        found = "no such folder" if not folder.is_dir() else f"no {RECORD} in it"
        raise BackboneError(f"{folder}: {found}; expected a folder that finetune.train wrote")
    try:
        record: dict[str, Any] = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        version = record["format"]
        record["base"] = dict(record["base"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(folder, error) from None
    if version != FORMAT:
        raise BackboneError(f"{folder}: adapter format {version!r}, this version reads {FORMAT}")
    return record


def _damaged(folder: Path, error: Exception) -> BackboneError:
    reason = " ".join(str(error).split())
    return BackboneError(f"{folder}: damaged adapter ({reason[:200]}); write it anew")


def attach(folder: AdapterFolder, backbone: Backbone) -> Adapter:
    """The folder's adapter on its base, tensors loaded, not folded.

    Raises:
        BackboneError: if the backbone is not the recorded base.
    """
    found, expected = backbone.spec.identity, folder.base_identity
    if (found.weights, found.architecture) != (expected.weights, expected.architecture):
        raise BackboneError(
            f"the adapter was trained on {expected.name} with weights {expected.weights[:12]}, "
            f"found {found.name} with weights {found.weights[:12]}; give the same base"
        )
    adapter = folder.adapter.attach(backbone.trainable())
    adapter.load(folder.tensors)
    return adapter
