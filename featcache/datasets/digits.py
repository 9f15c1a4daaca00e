"""Handwritten digits: the 1,797 real scans that come with scikit-learn, written out as PNG."""

from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from PIL import Image
from pydantic import Field

from featcache.datasets.png_files import whole_folder
from featcache.datasets.splitting import SplitConfig
from featcache.manifest import Manifest

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CAPTIONS = (
    "a scan of the handwritten digit {name}",
    "a handwritten {numeral}",
    "the number {name} written by hand",
    "a small picture of the numeral {numeral}",
)


class DigitsConfig(SplitConfig):
    """Ten classes of real scans, 1,797 images; needs no download."""

    kind: Literal["digits"] = "digits"
    """Dataset kind."""
    root: Path = Path("data/digits")
    """Folder to write the images to, once, in a directory per size."""
    size: int = Field(default=32, ge=8, le=512)
    """Height and width in pixels, 8..512; the scans have 8 and are enlarged smoothly."""

    def manifest(self) -> Manifest:
        """Ten classes `zero` … `nine` with their numeral; one caption an image."""
        from sklearn.datasets import load_digits  # takes a second, and only this dataset needs it

        scans = load_digits()
        folder = self.root / f"{self.size}px"
        if not folder.is_dir():
            _write(folder, scans.images, self.size)
        targets = np.asarray(scans.target, np.int64)
        ids = [f"{number:04d}" for number in range(len(targets))]
        return Manifest.build(
            kind=self.kind,
            root=self.root,
            ids=ids,
            paths=[f"{folder.name}/{name}.png" for name in ids],  # so that the size counts
            splits=self.split(ids, targets),
            labels=[[int(target)] for target in targets],
            classes=pd.DataFrame({"name": NAMES, "numeral": [str(n) for n in range(10)]}),
            task="single_label",
            captions=[
                [CAPTIONS[number % len(CAPTIONS)].format(name=NAMES[target], numeral=target)]
                for number, target in enumerate(targets)
            ],
        )


def _write(folder: Path, scans: "np.typing.NDArray[np.float64]", size: int) -> None:
    """Writes all scans, dark ink on white, into `folder`; there is no folder until all are."""
    with whole_folder(folder) as partial:
        for number, scan in enumerate(scans):
            ink = np.rint(255 - scan * (255 / 16)).astype(np.uint8)
            image = Image.fromarray(ink).resize((size, size), Image.Resampling.BICUBIC)
            image.convert("RGB").save(partial / f"{number:04d}.png")
