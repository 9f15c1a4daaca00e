"""Towers spread over processes: whole copies (DDP) or shards (FSDP2), gradients added up.

Everything here sums where torch averages: a process's loss already is its share of the whole
batch's (`finetune.losses.base`), so the sum of the gradients is the gradient, whatever the number
of processes. A process alone gets its module back as it is.

    towers = spread(PairTowers(model), group, apart=[model.logit_scale])
    optimizer = ...                                  # built after `spread`, which may swap weights
    with towers.chunk(last=True):
        features = towers(pixels, tokens)
        ...backward()
    towers.add_up()
"""

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, Literal, TypeGuard, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from heads.distributed import Group

if TYPE_CHECKING:  # half a second, for those who shard
    from torch.distributed.tensor import DTensor

Strategy = Literal["ddp", "fsdp"]
"""ddp: each process holds all weights; fsdp: a share of them, gathered block by block when used."""


class PairTowers(nn.Module):
    """Both towers behind one `forward`, which is what DDP and FSDP watch over."""

    def __init__(
        self, model: nn.Module, encode_text: Callable[[nn.Module, Tensor], Tensor] | None = None
    ) -> None:
        """Takes the towers.

        Args:
            model: has `encode_image` and `encode_text`.
            encode_text: called with the model and tokens in place of the model's own.
        """
        super().__init__()
        self.model = model
        self._encode_text = encode_text

    def forward(self, pixels: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(b, P) image and (n, P) text features, as the towers give them: not normalised."""
        model = cast(Any, self.model)
        images = model.encode_image(pixels)
        if self._encode_text is None:
            return images, model.encode_text(tokens)
        return images, self._encode_text(self.model, tokens)


class Spread:
    """A module as the processes of a group train it together; call it as the module itself.

    Attributes:
        module: what was given: its weights are what is saved, see `whole`.
        group: the processes.
    """

    def __init__(
        self, module: nn.Module, wrapped: nn.Module, group: Group, apart: list[nn.Parameter]
    ) -> None:
        self.module, self.group = module, group
        self._wrapped, self._apart = wrapped, apart

    def __call__(self, *inputs: Any) -> Any:
        """The module's `forward`."""
        return self._wrapped(*inputs)

    def chunk(self, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of one of several chunks of a batch.

        Whole copies exchange their gradients once, in the backward of the last chunk, while it
        runs. Shards do so in each: holding all gradients whole is what they are there to avoid.
        """
        return self._chunk(last)

    @contextmanager
    def _chunk(self, last: bool) -> Iterator[None]:
        if isinstance(self._wrapped, DistributedDataParallel) and not last:
            with self._wrapped.no_sync():
                yield
        else:
            yield

    def add_up(self) -> None:
        """Adds up the gradients of the parameters kept `apart`; after the last backward."""
        if self.group.size > 1:
            for parameter in self._apart:
                if parameter.grad is not None:
                    dist.all_reduce(parameter.grad)


def spread(
    module: nn.Module,
    group: Group,
    *,
    strategy: Strategy = "ddp",
    apart: Iterable[nn.Parameter] = (),
) -> Spread:
    """The module made ready for several processes; all of them get the first one's weights.

    On GPUs, batch normalisation takes its statistics over all processes (SyncBatchNorm); torch has
    no such thing for CPUs: there each process normalises by its own rows.

    Args:
        module: on the group's device; its `forward` is what will be called.
        group: the processes; with one, nothing changes.
        strategy: see `Strategy`.
        apart: parameters that `forward` does not use but the loss does (logit scale and bias):
            `Spread.add_up` sums their gradients. They are never sharded.
    """
    kept = list(apart)
    if group.size == 1:
        return Spread(module, module, group, kept)
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            dist.broadcast(tensor.data, src=0)
    if group.device.type == "cuda":
        module = cast(Any, nn.SyncBatchNorm).convert_sync_batchnorm(module)
    wrapped = _sharded(module, group, kept) if strategy == "fsdp" else _copied(module, group, kept)
    return Spread(module, wrapped, group, kept)


def _copied(module: nn.Module, group: Group, apart: list[nn.Parameter]) -> nn.Module:
    """DDP that sums."""
    ids = {id(parameter) for parameter in apart}
    names = [name for name, parameter in module.named_parameters() if id(parameter) in ids]
    cast(Any, DistributedDataParallel)._set_params_and_buffers_to_ignore_for_model(module, names)
    # Statistics stay each process's own. The option has another name in newer versions of torch.
    known = inspect.signature(DistributedDataParallel).parameters
    own_buffers = next(n for n in ("forward_sync_buffers", "broadcast_buffers") if n in known)
    options: dict[str, Any] = {own_buffers: False, "gradient_as_bucket_view": True}
    if group.device.type == "cuda":
        options["device_ids"] = [group.device.index]
    wrapped = DistributedDataParallel(module, **options)
    wrapped.register_comm_hook(None, _summed)
    return wrapped


def _summed(
    _: Any,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[Tensor]:
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda done: done.value()[0])


def _sharded(module: nn.Module, group: Group, apart: list[nn.Parameter]) -> nn.Module:
    """FSDP2 that sums: one unit a block, and one for what is left."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    for parameter in module.parameters():  # kernels in channels_last cannot be sharded
        parameter.data = parameter.data.contiguous()
    mesh = init_device_mesh(group.device.type, (group.size,))
    for unit in [*_blocks(module), module]:
        shard: FSDPModule = fully_shard(unit, mesh=mesh, ignored_params=set(apart))
        shard.set_gradient_divide_factor(1.0)
        shard.set_force_sum_reduction_for_comms(True)
    return module


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Members of the outermost lists of modules: the blocks of transformers and residual nets."""
    for child in module.children():
        if isinstance(child, nn.ModuleList | nn.Sequential):
            yield from (
                block for block in child.children() if next(block.parameters(), None) is not None
            )
        else:
            yield from _blocks(child)


def all_rows(values: Tensor, group: Group) -> Tensor:
    """(B, …) the rows of all processes, in the order of their ranks; carries no gradient.

    Args:
        values: (b, …) this process's rows; b must be the same for all.
        group: the processes.
    """
    if group.size == 1:
        return values.detach()
    gathered = values.new_empty((group.size * len(values), *values.shape[1:]))
    dist.all_gather_into_tensor(gathered, values.detach().contiguous())
    return gathered


def no_autocast(device: torch.device) -> torch.autocast:
    """A region in which arithmetic has the dtype of its inputs."""
    return torch.autocast(device.type, enabled=False)


def clip_norm(parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
    """() norm of the gradient before it is scaled down, in place, to at most `limit`.

    Args:
        parameters: plain, sharded or some of each; every process calls with the same.
        limit: largest norm, > 0; infinity only measures.
    """
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    if not any(is_sharded(parameter) for parameter in parameters):
        return nn.utils.clip_grad_norm_(parameters, limit)
    plain: list[Tensor] = []
    shards: list[Tensor] = []
    for parameter in parameters:
        grad = parameter.grad
        assert grad is not None
        if is_sharded(grad):
            shards.append(grad.to_local())
        else:
            plain.append(grad)
    square = _square(shards)
    dist.all_reduce(square)
    norm = (square + _square(plain)).sqrt() if plain else square.sqrt()
    if math.isfinite(limit):
        torch._foreach_mul_([*plain, *shards], (limit / (norm + 1e-6)).clamp(max=1.0))
    return norm


def _square(values: Sequence[Tensor]) -> Tensor:
    return torch.stack(torch._foreach_norm(list(values))).square().sum()


def alike_groups(groups: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """An optimizer's parameter groups, each split into plain and sharded parameters.

    Optimizers work through the parameters of a group at once, which a mixture does not allow.
    """
    split: list[dict[str, Any]] = []
    for group in groups:
        parameters = list(group["params"])
        shards = [parameter for parameter in parameters if is_sharded(parameter)]
        plain = [parameter for parameter in parameters if not is_sharded(parameter)]
        parts = [part for part in (plain, shards) if part] or [[]]
        split += [{**group, "params": part} for part in parts]
    return split


def is_sharded(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Whether each process holds only a share of it."""
    return hasattr(tensor, "placements")


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor (weight, moment of an optimizer) put together; others as they are.

    Every process must call it for the same tensors in the same order.
    """
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def laid_out(value: Tensor, target: Tensor) -> Tensor:
    """A whole tensor held as `target` is: on its device, sharded where it is; dtype kept."""
    value = value.to(target.device)
    if is_sharded(target):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value, target.device_mesh, target.placements)
    return value


@torch.no_grad()
def put(target: Tensor, value: Tensor) -> None:
    """Writes a whole tensor into a plain or sharded one; the other way of `whole`."""
    target.copy_(laid_out(value, target))
