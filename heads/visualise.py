"""Job: what each sub-prompt of a class stands for, as a grid of the images that it claims most.

python -m heads.visualise --run runs/garden-mop-1a2b3c --class_name "ember moss"

Images are ranked by γ, the share of a prompt in an image. The temperature that training ends with
makes γ one-hot; the one here is for looking.
"""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, Self, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from featcache.config import Config, run_job
from featcache.errors import ConfigError
from featcache.precision import resolve_device
from featcache.reader import Cache
from featcache.reporting.thumbnails import Thumbnails
from featcache.storage import CachePath
from heads.data import FeatureTables, open_arrays
from heads.evaluate import choose_split, open_known
from heads.parts import labelled_part
from heads.reporting import prompt_grid
from heads.reporting.prompt_grid import Claim
from heads.run_folder import LoadedRun, RunError, load_run, write_atomic

_SHOWN_SCORES = 3


@runtime_checkable
class HasPrompts(Protocol):
    """A head that shares the images of a class among K prompts."""

    def assignments(self, features: Tensor, class_index: int, temperature: float) -> Tensor:
        """(n, K) shares γ, summing to 1 over prompts."""


class VisualiseConfig(Config):
    """Draws the images that each sub-prompt of a class claims most."""

    run: Path
    """Run folder of a head with sub-prompts (mop)."""
    class_name: str | None = None
    """Class to draw, by name."""
    class_index: NonNegativeInt | None = None
    """Class to draw, by number, 0..C-1; or give class_name."""
    cache: CachePath | None = None
    """Cache with the images; unset = the one it was trained on."""
    split: str | None = None
    """Split whose images are ranked; unset = test if it has labels, otherwise val."""
    top_n: PositiveInt = 16
    """Images a prompt, most claimed first, 1 or more."""
    temperature: PositiveFloat = 5.0
    """Temperature (τ) of the shares, > 0: 5 shows grades, the trained end value is one-hot."""
    per_prompt: bool = False
    """Write a file for each prompt as well."""
    tile: int = Field(default=104, ge=32, le=512)
    """Pixels of a tile's side, 32..512."""
    root: str | None = None
    """Folder of the images; unset = the one recorded at extraction."""
    out_dir: Path | None = None
    """Folder of the pictures; unset = `prompts` in the run folder."""
    device: str = "auto"
    """auto (the GPU if there is one), cpu or cuda:N."""

    @model_validator(mode="after")
    def _one_class(self) -> Self:
        if (self.class_name is None) == (self.class_index is None):
            raise ValueError("give either class_name or class_index")
        return self


@dataclass(frozen=True)
class PromptClaims:
    """Images of one class and how its prompts share them.

    Attributes:
        class_index: the class. name: its name.
        rows: (n,) rows of the cache.
        shares: (n, K) γ.
    """

    class_index: int
    name: str
    rows: npt.NDArray[np.int64]
    shares: npt.NDArray[np.float32]

    @property
    def usage(self) -> npt.NDArray[np.float32]:
        """(K,) mean γ of each prompt."""
        means: npt.NDArray[np.float32] = self.shares.mean(0)
        return means

    def strongest(self, num: int) -> list[list[Claim]]:
        """For each prompt the images that it claims most."""
        return prompt_grid.strongest(self.shares, self.rows, num)


def run(config: VisualiseConfig) -> list[Path]:
    """Draws the grid, prints the highest shares, and returns the files written.

    Raises:
        RunError: if the head has no sub-prompts, or no row of the split has the class.
        ConfigError: if there is no such class.
    """
    loaded = load_run(config.run)
    number = class_number(loaded.class_names, config.class_name, config.class_index)
    cache = open_known(loaded, config.cache, ())
    split = config.split or choose_split(cache)
    claims = prompt_claims(
        loaded, cache, split, number, config.temperature, resolve_device(config.device)
    )
    thumbnails = Thumbnails(cache, config.root, config.tile)
    folder = config.out_dir or config.run / "prompts"
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"class{number}_{_file_name(claims.name)}"
    strongest, num_prompts = claims.strongest(config.top_n), claims.shares.shape[1]
    chosen = [(folder / f"{stem}_all_k.png", list(range(num_prompts)))]
    if config.per_prompt:
        chosen += [(folder / f"{stem}_k{k}.png", [k]) for k in range(num_prompts)]
    title = f"{claims.name} (class {number}): {len(claims.rows):,} {split} images, τ = "
    for file, prompts in chosen:
        sheet = prompt_grid.draw(
            [strongest[k] for k in prompts],
            prompts,
            claims.usage,
            config.top_n,
            thumbnails,
            config.tile,
            f"{title}{config.temperature:g}",
        )
        write_atomic(file, encoded(sheet, "PNG"))
    print(f"{title}{config.temperature:g}")
    for k, own in enumerate(strongest):
        best = ", ".join(f"{cache.ids[row]} {share:.3f}" for row, share in own[:_SHOWN_SCORES])
        print(f"  prompt {k:>3}  mean share {claims.usage[k]:.3f}  highest: {best}")
    if thumbnails.num_missing:
        print(f"{thumbnails.num_missing:,} images cannot be read now and are grey; see --root")
    files = [file for file, _ in chosen]
    print(f"{files[0]}" + (f" and {len(files) - 1} more" if len(files) > 1 else ""))
    return files


@torch.inference_mode()
def prompt_claims(
    run: LoadedRun,
    cache: Cache,
    split: str,
    class_index: int,
    temperature: float,
    device: torch.device,
) -> PromptClaims:
    """How the prompts of one class share its images of a split.

    Raises:
        RunError: if the head has no sub-prompts, or no row of the split has the class.
        CacheMismatchError: if the cache does not fit the head.
    """
    run.require_fits(cache)
    head = run.head.to(device)
    if not isinstance(head, HasPrompts):
        raise RunError(
            f"{run.path}: head {run.config.kind} has no sub-prompts to show; choose a run of head "
            "mop"
        )
    arrays = open_arrays(cache, run.config)
    part = labelled_part(cache, split, arrays.readable)
    targets = part.targets
    own = targets == class_index if targets.ndim == 1 else targets[:, class_index] > 0
    name = run.class_names[class_index].replace("_", " ")
    if not own.any():
        raise RunError(f"{cache.path}: no readable {split} row has class {class_index} ({name})")
    table = FeatureTables(arrays, part.rows[own], device)
    shares = head.assignments(table.slice(0, len(table))[0], class_index, temperature)
    return PromptClaims(class_index, name, part.rows[own], shares.float().cpu().numpy())


def class_number(names: Sequence[str], name: str | None, index: int | None) -> int:
    """Number of a class given by name (blanks or underscores) or by number.

    Raises:
        ConfigError: if there is none, or several have the name.
    """
    if index is not None:
        if index >= len(names):
            raise ConfigError(f"class_index is {index}; classes are 0..{len(names) - 1}")
        return index
    assert name is not None, "neither name nor number"
    wanted = name.replace("_", " ").casefold()
    found = [i for i, one in enumerate(names) if one.replace("_", " ").casefold() == wanted]
    if len(found) == 1:
        return found[0]
    if found:
        numbers = ", ".join(map(str, found))
        raise ConfigError(f"class_name {name!r} is that of classes {numbers}; give class_index")
    raise ConfigError(f"class_name: no class {name!r}; there are {', '.join(names[:8])}, …")


def encoded(sheet: Image.Image, kind: Literal["PNG", "JPEG"]) -> bytes:
    """A picture as a file's bytes; JPEG is a quarter as large, and good enough for a page."""
    buffer = io.BytesIO()
    sheet.save(buffer, kind, **({"quality": 88} if kind == "JPEG" else {}))
    return buffer.getvalue()


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name)


if __name__ == "__main__":
    run_job(VisualiseConfig, run)
