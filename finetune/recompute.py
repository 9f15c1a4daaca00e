"""Gradient checkpointing: activations inside a block are thrown away and made again in backward.

Memory for activations falls to the input of each block, for one more forward pass.

Reference: Chen et al., "Training Deep Nets with Sublinear Memory Cost" (2016).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from open_clip.modified_resnet import Bottleneck
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from featcache.backbones.trainable import TrainableTowers
from featcache.errors import ConfigError


def recompute_blocks(model: nn.Module) -> int:
    """Lets every block of both towers recompute; gives back how many.

    open_clip does so for transformers and timm's towers; its ResNet, where it does nothing, is done
    here, with the running statistics of batch normalisation counted once.

    Args:
        model: open_clip dual encoder.

    Raises:
        ConfigError: if a tower has no blocks that can.
    """
    set_checkpointing: Any = model.set_grad_checkpointing
    set_checkpointing(True)
    bottlenecks = [part for part in model.modules() if isinstance(part, Bottleneck)]
    for block in bottlenecks:
        block.forward = _recomputed(block, block.forward)
    enabled = [
        part for part in model.modules() if getattr(part, "grad_checkpointing", False) is True
    ]
    if not bottlenecks and not enabled:
        raise ConfigError(
            "gradient_checkpointing: none of the towers' blocks can recompute; leave it out"
        )
    return len(bottlenecks) + len(enabled)


def recompute_tower_blocks(towers: TrainableTowers) -> None:
    """Lets every transformer block keep its input only, and compute again in the backward pass.

    Raises:
        ConfigError: if the towers have no blocks.
    """
    blocks = [block for tower in towers.blocks.values() for block in tower if block.name]
    names = {block.name for block in towers.blocks.get("image", ()) if block.name}
    if not names and hasattr(towers.model, "set_grad_checkpointing"):
        recompute_blocks(towers.model)  # residual networks
        return
    if not blocks:
        raise ConfigError(
            f"optim.checkpoint_blocks: {towers.name} has no transformer blocks; leave it out"
        )
    for block in blocks:
        _kept_input_only(towers.model.get_submodule(block.name))


def _kept_input_only(module: nn.Module) -> None:
    plain = module.forward

    def forward(*inputs: Any, **options: Any) -> Any:
        if not torch.is_grad_enabled():
            return plain(*inputs, **options)
        return checkpoint(plain, *inputs, use_reentrant=False, **options)

    module.forward = forward


def _recomputed(block: nn.Module, forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Any]:
    def run(x: Tensor) -> Any:
        if not torch.is_grad_enabled():
            return forward(x)
        contexts = lambda: (nullcontext(), _statistics_kept(block))  # noqa: E731
        return checkpoint(forward, x, use_reentrant=False, context_fn=contexts)

    return run


@contextmanager
def _statistics_kept(block: nn.Module) -> Iterator[None]:
    """The second pass normalises by the batch like the first, and counts it no second time."""
    held = [
        (buffer, buffer.clone())
        for part in block.modules()
        if isinstance(part, nn.modules.batchnorm._BatchNorm)
        for buffer in part.buffers(recurse=False)
    ]
    try:
        yield
    finally:
        for buffer, before in held:
            # As data: autograd keeps the buffer for a backward that does not read it.
            buffer.data.copy_(before)
