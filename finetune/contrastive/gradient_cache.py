"""One optimizer step's gradients of a loss over a whole batch, whatever fits into memory at once.

A loss over pairs needs the features of the whole batch, a tower's backward needs its activations,
and only the latter are large. So: features of all chunks first, without activations; the loss and
its gradient by the features; then each chunk once more with activations, and that gradient through
it. The result is the gradient of the whole batch, all negatives included, for one more forward
pass.

Reference: Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup"
(2021), section 3.2 (gradient caching). Departure: the first chunk keeps its activations from the
first encoding, so n chunks are encoded 2n − 1 times and one chunk once, the ordinary way.

Dropout and every other draw from torch's generators is the same in both encodings of a chunk.
Batch normalisation has no whole batch to normalise by: it takes the statistics of a chunk, as it
does of a process's rows under DDP. The gradient is exact for that model, and its running statistics
see each chunk once; but chunks of other sizes are another model (`batch_norms` tells).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from finetune.parallel import Spread

Chunk = TypeVar("Chunk")
Features = tuple[Tensor, Tensor]


def contrastive_step(
    towers: Spread,
    encode: Callable[[Chunk], Features],
    chunks: Sequence[Chunk],
    loss: Callable[[Tensor, Tensor], Tensor],
    scaled: Callable[[Tensor], Tensor] = lambda value: value,
) -> Tensor:
    """() the loss of the whole batch, after adding its gradients to all parameters' `grad`.

    With several processes each gives its own rows and gets the same loss; the gradients are those
    of the whole batch, added up over the processes.

    Args:
        towers: what `encode` calls; see `finetune.parallel.spread`.
        encode: from a chunk to its (b, P) image and text features, both L2-normalised; draws only
            from torch's generators, so that it can be repeated. Enters autocast itself, if at all.
        chunks: this process's rows of the batch in pieces; as many for every process.
        loss: from the (b, P) features of all this process's rows to the batch's loss, as
            `PairLossConfig.loss` does; its own parameters get their gradients here.
        scaled: what is done to the loss before backward (a gradient scaler's `scale`).

    Raises:
        ValueError: if there is no chunk.
    """
    if not chunks:
        raise ValueError("no chunk to encode; a batch has one or more")
    alone = len(chunks) == 1
    device = towers.group.device
    with towers.chunk(last=alone):
        first = encode(chunks[0])
    parts: list[Features] = [first]
    states: list[_RandomState] = []
    with torch.no_grad(), _statistics_untouched(towers.module):
        for chunk in chunks[1:]:
            states.append(_RandomState(device))
            parts.append(encode(chunk))
    # Older torch finds casts made without gradients again, under an autocast around both passes.
    torch.clear_autocast_cache()
    images, texts = (
        torch.cat([side.detach() for side in sides]).requires_grad_()
        for sides in zip(*parts, strict=True)
    )
    value = loss(images, texts)
    scaled(value).backward()  # type: ignore[no-untyped-call]
    assert images.grad is not None
    assert texts.grad is not None
    sizes = [len(part[0]) for part in parts]
    slopes = list(zip(torch.split(images.grad, sizes), torch.split(texts.grad, sizes), strict=True))
    del parts
    with towers.chunk(last=alone):
        torch.autograd.backward(first, slopes[0])
    del first  # its activations go before others come
    for place, (chunk, state) in enumerate(zip(chunks[1:], states, strict=True), 1):
        state.restore()
        with towers.chunk(last=place == len(chunks) - 1):
            torch.autograd.backward(encode(chunk), slopes[place])
    towers.add_up()
    return value.detach()


def batch_norms(module: nn.Module) -> list[str]:
    """Names of the modules that normalise by the rows they see together, in training mode."""
    return [
        name
        for name, part in module.named_modules()
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.training
    ]


class _RandomState:
    """torch's generators as they are now, on the CPU and the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore(self) -> None:
        """Puts them back there."""
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda, self._device)


@contextmanager
def _statistics_untouched(module: nn.Module) -> Iterator[None]:
    """Normalises by the rows at hand as ever, without counting them: they will come again."""
    norms = [
        part
        for part in module.modules()
        if isinstance(part, nn.modules.batchnorm._BatchNorm)
        and part.training
        and part.track_running_stats
    ]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
