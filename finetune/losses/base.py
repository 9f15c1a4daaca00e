"""What a loss on image-text pairs must offer: one number of a batch over all processes.

Adding a loss is one new file in this folder: subclass `PairLossConfig`.

With several processes each holds some rows of the batch, all equally many. The value is that of the
whole batch, the same for every process; the gradients *added up* over the processes are those of
the whole batch. So a process's gradient by its own features is already exact, with every other
process's rows as negatives, and towers need nothing but a sum (`finetune.parallel`).

Letters: b rows of this process, B rows of all, P feature width.
"""

from abc import abstractmethod
from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor

from featcache.config import Config
from heads.distributed import Group

MATRIX_BYTES = 2**27
"""Rows of the similarity matrix that are held at once take no more than this (128 MiB)."""


class PairLossConfig(Config):
    """Options that every loss on pairs shares."""

    initial_scale: ClassVar[float]
    """Natural logarithm of the scale that training from scratch starts from."""
    initial_bias: ClassVar[float | None] = None
    """What the bias starts from; None = the loss has no bias."""

    kind: str
    """Loss kind."""

    @abstractmethod
    def loss(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        group: Group | None = None,
    ) -> Tensor:
        """The loss of the whole batch; see this file's head for what each process gets.

        Args:
            image_features: (b, P) float, L2-normalised; row i belongs to row i of the texts.
            text_features: (b, P) float, L2-normalised.
            logit_scale: () or (1,) float, natural logarithm of the scale.
            logit_bias: () or (1,) float, for a loss with `initial_bias`.
            group: the processes that share the batch; None = this one alone.

        Returns:
            () float32 (float64 for float64 features), in nats.

        Raises:
            ValueError: if the two feature matrices differ in shape, or a bias is missing or idle.
        """

    @abstractmethod
    def of_chance(self, batch_size: int) -> float:
        """The lowest loss of a model that knows nothing, in nats.

        Args:
            batch_size: B.
        """

    def clamp(self, logit_scale: Tensor) -> None:
        """Puts the log scale back into its range, in place; belongs after every step."""
        return


def checked(image_features: Tensor, text_features: Tensor) -> tuple[Tensor, Tensor]:
    """Both matrices in at least float32.

    Raises:
        ValueError: if they differ in shape.
    """
    if image_features.shape != text_features.shape or image_features.ndim != 2:
        raise ValueError(
            f"image features {tuple(image_features.shape)} and text features "
            f"{tuple(text_features.shape)} must have one shape: one row a pair"
        )
    dtype = torch.promote_types(
        torch.promote_types(image_features.dtype, text_features.dtype), torch.float32
    )
    return image_features.to(dtype), text_features.to(dtype)


def row_chunks(num_rows: int, num_columns: int, rows_at_once: int | None) -> Iterator[slice]:
    """Slices that cover the rows of a matrix, so that one slice stays below `MATRIX_BYTES`.

    Args:
        num_rows: b.
        num_columns: B.
        rows_at_once: rows of a slice; None = as many as fit.
    """
    step = rows_at_once or max(1, MATRIX_BYTES // (4 * num_columns))
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))
