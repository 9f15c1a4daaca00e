"""Multi-label soft margin loss: sigmoid cross-entropy averaged over the classes of a row.

With z logits and y in 0..1, for each row:

    −1/C Σ_c [ y log σ(z) + (1 − y) log σ(−z) ]

Reference: torch.nn.MultiLabelSoftMarginLoss; its mean over rows is that of sigmoid cross-entropy.
"""

from typing import Literal

from torch import Tensor

from heads.losses.base import ClassStatistics, LossConfig
from heads.losses.binary_cross_entropy import BinaryCrossEntropy


class MultiLabelSoftMarginConfig(LossConfig):
    """Sigmoid cross-entropy by its other name, one term a row."""

    kind: Literal["mls"] = "mls"
    """Loss kind."""

    def build(self, statistics: ClassStatistics) -> "MultiLabelSoftMargin":
        """The loss; needs no counts."""
        return MultiLabelSoftMargin()


class MultiLabelSoftMargin(BinaryCrossEntropy):
    """Mean over classes of sigmoid cross-entropy."""

    def terms(self, logits: Tensor, targets: Tensor) -> Tensor:
        """(B,) float32; see `Loss.terms`."""
        return super().terms(logits, targets).mean(1)
