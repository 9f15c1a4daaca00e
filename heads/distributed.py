"""Several processes that train one head: each computes its share of every batch's rows.

`torchrun --nproc-per-node 4 -m -- heads.train …` starts them. Gradients are summed over the
processes, weighted by rows, so that every head whose loss is a mean over rows trains as in one
process. The first process (rank 0) validates and writes; the others follow its decisions.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from featcache.errors import ConfigError
from featcache.precision import resolve_device

T = TypeVar("T")


@dataclass(frozen=True)
class Group:
    """The processes of one training.

    Attributes:
        rank: number of this process, from 0.
        size: how many there are.
        device: what this one computes on.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def leads(self) -> bool:
        """Whether this process validates and writes."""
        return self.rank == 0

    def share(self, index: Tensor) -> tuple[Tensor, int]:
        """This process's rows of a batch, and the number that its sums are divided by.

        Consecutive rows, as equal in number as possible. A batch of fewer rows than processes is
        computed by all of them, each counting for one part, so that none is without a gradient.
        """
        if len(index) < self.size:
            return index, len(index) * self.size
        start, stop = (len(index) * rank // self.size for rank in (self.rank, self.rank + 1))
        return index[start:stop], len(index)

    def sum_gradients(self, head: nn.Module) -> None:
        """Adds the gradients of all processes up, in place."""
        if self.size > 1:
            for parameter in head.parameters():
                if parameter.grad is not None and parameter.grad.is_sparse:
                    parameter.grad = parameter.grad.to_dense()  # nccl sums no rows of unlike number
            grads = [p.grad for p in head.parameters() if p.grad is not None]
            for work in [dist.all_reduce(grad, async_op=True) for grad in grads]:
                work.wait()

    def sum(self, values: Tensor) -> Tensor:
        """The values added up over all processes."""
        if self.size > 1:
            values = values.to(self.device)
            dist.all_reduce(values)
        return values

    def follow(self, value: T) -> T:
        """The first process's value; the others' own is not looked at."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def follow_buffers(self, head: nn.Module) -> None:
        """Takes over the first process's buffers, which a loss may have changed."""
        if self.size > 1:
            for buffer in head.buffers():
                dist.broadcast(buffer, src=0)


@contextmanager
def group_for(device: str) -> Iterator[Group]:
    """The processes that torchrun started, or this one alone.

    Args:
        device: as `featcache.precision.resolve_device` reads it; with several processes, auto is
            one GPU each if there are any.

    Raises:
        ConfigError: if several processes would share one stated GPU, or there are too few GPUs.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or dist.is_initialized():  # a job inside a larger program is one process
        yield Group(0, 1, resolve_device(device))
        return
    local = int(os.environ["LOCAL_RANK"])
    own = resolve_device(device)
    if own.type == "cuda":
        if device != "auto":
            raise ConfigError(
                f"device={device} with {size} processes; leave it out, each takes a GPU of its own"
            )
        if local >= torch.cuda.device_count():
            raise ConfigError(
                f"process {local + 1} on this machine has no GPU: there are "
                f"{torch.cuda.device_count()}; lower --nproc-per-node, or choose --device cpu"
            )
        own = torch.device("cuda", local)
        torch.cuda.set_device(own)
    dist.init_process_group("nccl" if own.type == "cuda" else "gloo")
    try:
        yield Group(dist.get_rank(), size, own)
    finally:
        dist.destroy_process_group()


@contextmanager
def ending_at_once() -> Iterator[None]:
    """Ends one of several processes, with the status of the `SystemExit` inside, without teardown.

    All is written by then. On its normal way out, such a process was seen to abort while threads of
    the libraries it had loaded were torn down, and torchrun would call the training failed. A
    process alone ends normally.
    """
    try:
        yield
    except SystemExit as end:
        if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not isinstance(end.code, int):
            raise
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code)
