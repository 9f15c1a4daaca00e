"""VOC-LT: a long-tailed, multi-label cut of Pascal VOC (2012 for training, 2007 for testing).

Reference: Wu et al., Distribution-Balanced Loss for Multi-Label Classification in Long-Tailed
Datasets, 2020 (1,142 training and 4,952 test images, 20 classes).
"""

from typing import ClassVar, Literal

import pandas as pd

from featcache.datasets.long_tail import LongTailConfig

NAMES = (
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)
"""VOC's own names, in id order."""

READABLE = {"diningtable": "dining table", "pottedplant": "potted plant", "tvmonitor": "tv monitor"}


class VocLtConfig(LongTailConfig):
    """20 classes from `voc_lt_*.txt` lists; `root` usually holds VOCdevkit."""

    prefix: ClassVar[str] = "voc"
    names: ClassVar[tuple[str, ...]] = NAMES

    kind: Literal["voc_lt"] = "voc_lt"
    """Dataset kind."""
    readable_names: bool = False
    """Call classes `dining table`, `potted plant` and `tv monitor` instead of `diningtable`, ...;
    indices stay. Either way the other form is class metadata: `readable_name` or `list_name`."""

    def class_table(self) -> pd.DataFrame:
        """Class names in id order, in both forms."""
        readable = [READABLE.get(name, name) for name in self.names]
        if self.readable_names:
            return pd.DataFrame({"name": readable, "list_name": self.names})
        return pd.DataFrame({"name": self.names, "readable_name": readable})
