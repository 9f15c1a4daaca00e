"""Class chunks of normalised prompts in reused buffers, and sparse products of some of them.

Shared parts of `heads.losses.mixture_of_prompts`. Shapes: B rows, C classes, c classes of a chunk,
K prompts a class, D width.
"""

import functools
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor


class Chunk:
    """Normalised prompts of classes start..stop, in buffers that the next chunk overwrites."""

    def __init__(self, owner: "Chunks", start: int, stop: int) -> None:
        self.start, self.stop = start, stop
        self._owner = owner
        self.offsets = owner.offsets[start:stop]
        self.prompts = owner.prompts[: stop - start]  # (c, K, D) float32
        torch.add(self.offsets, owner.base[start:stop, None], out=self.prompts)
        self.norms = torch.linalg.vector_norm(self.prompts, dim=-1)  # (c, K)
        self.prompts.div_(self.norms.unsqueeze(-1))

    def cosines(self) -> Tensor:
        """(c, K, B) cosines in the buffer's dtype."""
        owner = self._owner
        count, num_prompts, dim = self.prompts.shape
        flat = self.prompts.view(count * num_prompts, dim)
        if owner.low is not None:
            flat = owner.low[: count * num_prompts].copy_(flat)
        out = owner.cosines[: count * num_prompts]
        torch.mm(flat, owner.columns, out=out)
        return out.view(count, num_prompts, -1)


class Chunks:
    """Walks over the classes with buffers allocated once.

    Fresh tensors of this size would cost more in page faults than the arithmetic in them.
    """

    def __init__(
        self, features: Tensor, base: Tensor, offsets: Tensor, screen: bool = False
    ) -> None:
        num_classes, num_prompts, dim = offsets.shape
        self.base, self.offsets = base, offsets.detach()
        size = chunk_classes(features.shape[0], num_prompts, features.device)
        self.size = min(size, num_classes)
        rows = self.size * num_prompts
        dtype = torch.bfloat16 if screen else torch.float32
        self.prompts = offsets.new_empty(self.size, num_prompts, dim)
        self.low = offsets.new_empty(rows, dim, dtype=dtype) if screen else None
        self.columns = features.to(dtype).t()  # (D, B)
        self.cosines = offsets.new_empty(rows, features.shape[0], dtype=dtype)

    def __iter__(self) -> Iterator[Chunk]:
        for start, stop in class_spans(self.base.shape[0], self.size):
            yield Chunk(self, start, stop)


def class_spans(num_classes: int, size: int) -> list[tuple[int, int]]:
    """First and last + 1 class of each chunk of `size` classes, the last one possibly smaller."""
    return [(start, min(start + size, num_classes)) for start in range(0, num_classes, size)]


def chunk_classes(num_rows: int, num_prompts: int, device: torch.device) -> int:
    """Classes a chunk: about 4 M cosines, at most 4096 prompts, on CPU; 16 times that elsewhere."""
    factor = 1 if device.type == "cpu" else 16
    prompts = min(2**22 * factor // num_rows, 4096 * factor)
    return max(1, prompts // num_prompts)


def rows_by_class(targets: Tensor, num_classes: int) -> tuple[Tensor, list[int]]:
    """Rows (B,) in ascending order of class, and where each class starts in them (C + 1)."""
    ordered, order = torch.sort(targets)
    return order, starts_of(ordered, range(num_classes + 1))


def starts_of(ordered: Tensor, values: range | list[int]) -> list[int]:
    """Position of the first entry >= value in an ascending vector, for each value."""
    wanted = torch.tensor(list(values), device=ordered.device, dtype=ordered.dtype)
    found: list[int] = torch.searchsorted(ordered, wanted).tolist()
    return found


def sparse_products(device: torch.device) -> bool:
    """Whether torch multiplies sparse by dense matrices here: on CPU it needs MKL for that."""
    return device.type == "cpu" and torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]


def csr_matrix(rows: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    """CSR matrix of entries that are already sorted by row."""
    starts = torch.zeros(shape[0] + 1, dtype=torch.int32)
    torch.cumsum(torch.bincount(rows, minlength=shape[0]), 0, out=starts[1:])
    _accept_sparse_csr()
    return torch.sparse_csr_tensor(
        starts, columns.to(torch.int32), values, size=shape, check_invariants=False
    )


@functools.cache
def _accept_sparse_csr() -> None:
    """Takes the once-given notice that CSR tensors are in beta before users see it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        index = torch.zeros(2, dtype=torch.int32)
        torch.sparse_csr_tensor(
            index, index[:0], torch.zeros(0), size=(1, 1), check_invariants=False
        )
