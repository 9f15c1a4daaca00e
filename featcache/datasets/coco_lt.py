"""COCO-LT: a long-tailed, multi-label cut of COCO 2017 (tested on val2017).

Reference: Wu et al., Distribution-Balanced Loss for Multi-Label Classification in Long-Tailed
Datasets, 2020 (1,909 training and 5,000 test images, 80 classes).
"""

from typing import ClassVar, Literal

from featcache.datasets.coco_classes import NAMES
from featcache.datasets.long_tail import LongTailConfig


class CocoLtConfig(LongTailConfig):
    """80 classes from `coco_lt_*.txt` lists; `root` usually holds train2017 and val2017."""

    prefix: ClassVar[str] = "coco"
    names: ClassVar[tuple[str, ...]] = NAMES

    kind: Literal["coco_lt"] = "coco_lt"
    """Dataset kind."""
