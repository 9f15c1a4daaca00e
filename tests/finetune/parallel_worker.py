"""One of the processes of `test_parallel`: what each finds goes into FOLDER/RANK.safetensors.

Then it pretrains by the given files. Run as a script, so that it imports no test.

    parallel_worker.py FOLDER [CONFIG.yaml PORT]...
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from open_clip.loss import ClipLoss, SigLipLoss
from pairs import (
    LOSSES,
    NUM_PAIRS,
    dual_encoder,
    features,
    learned_besides,
    normalised,
    pairs,
)
from safetensors.torch import save_file
from torch import Tensor

from finetune import pretrain
from finetune.checkpoint import read_state, save_state
from finetune.contrastive.gradient_cache import contrastive_step
from finetune.losses.info_nce import info_nce
from finetune.losses.siglip import siglip
from finetune.optim import param_groups
from finetune.parallel import (
    PairTowers,
    Spread,
    Strategy,
    alike_groups,
    clip_norm,
    is_sharded,
    spread,
    whole,
)
from heads.distributed import Group, ending_at_once, group_for


def own_rows(group: Group, values: Tensor) -> Tensor:
    return values.chunk(group.size)[group.rank].clone()


def loss_alone(group: Group) -> Iterator[tuple[str, Tensor]]:
    """Each loss on features: value, gradients by own rows, scale and bias; open_clip's as well."""
    for kind in LOSSES:
        for form in ("whole", "rows", "open_clip"):
            sides = [own_rows(group, features(NUM_PAIRS, seed)) for seed in (0, 1)]
            images, texts = (side.requires_grad_() for side in sides)
            scale = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
            bias = torch.tensor(-2.0, dtype=torch.float64, requires_grad=True)
            rows = 4 if form == "rows" else None
            own: Tensor
            if form == "open_clip":
                place: dict[str, Any] = {"rank": group.rank, "world_size": group.size}
                if kind == "siglip":  # sums over the rows of a process and divides by their number
                    own = SigLipLoss(**place)(images, texts, scale.exp(), bias) / group.size
                else:
                    clip_loss = ClipLoss(local_loss=True, gather_with_grad=True, **place)
                    own = clip_loss(images, texts, scale.exp()) / group.size
            elif kind == "siglip":
                own = siglip(images, texts, scale, bias, group, rows)
            else:
                own = info_nce(images, texts, scale, group, rows)
            own.backward()
            value = group.sum(own.detach().clone()) if form == "open_clip" else own.detach()
            prefix = f"{kind}.{form}"
            yield f"{prefix}.loss", value
            for name, leaf in (("images", images), ("texts", texts)):
                assert leaf.grad is not None
                yield f"{prefix}.{name}", leaf.grad
            for name, leaf in (("scale", scale), ("bias", bias)):
                if leaf.grad is not None:
                    yield f"{prefix}.{name}", group.sum(leaf.grad)


def one_step(group: Group, kind: str, towers: Spread, model: Any, num_chunks: int) -> Tensor:
    sides = [own_rows(group, side).chunk(num_chunks) for side in pairs()]
    return contrastive_step(
        towers,
        lambda chunk: normalised(towers(*chunk)),
        list(zip(*sides, strict=True)),
        lambda images, texts: LOSSES[kind].loss(
            images, texts, model.logit_scale, model.logit_bias, group
        ),
    )


def spread_model(group: Group, kind: str, strategy: Strategy, seed: int) -> tuple[Any, Spread]:
    model: Any = dual_encoder(kind, seed)
    apart = learned_besides(model)
    return model, spread(PairTowers(model), group, strategy=strategy, apart=apart)


def steps(group: Group) -> Iterator[tuple[str, Tensor]]:
    """Gradients of every parameter, by both strategies, the batch at once and in chunks."""
    strategies: tuple[Strategy, ...] = ("ddp", "fsdp")
    for kind in LOSSES:
        for strategy in strategies:
            # Other processes start elsewhere: the first one's weights must reach them.
            model, towers = spread_model(group, kind, strategy, seed=group.rank)
            for num_chunks in (1, 3):
                model.zero_grad()
                loss = one_step(group, kind, towers, model, num_chunks)
                prefix = f"{kind}.{strategy}.{num_chunks}"
                yield f"{prefix}.loss", loss
                for name, parameter in model.named_parameters():
                    assert parameter.grad is not None, name
                    yield f"{prefix}.{name}", whole(parameter.grad).clone()


def training(group: Group, folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Two optimizer steps on shards, saved and taken up by fresh shards in between."""
    for part in range(2):
        model, towers = spread_model(group, "siglip", "fsdp", seed=part)
        optimizer = torch.optim.AdamW(alike_groups(param_groups(model, 0.1)), lr=1e-2)
        if part:
            saved = read_state(folder / "last.safetensors")
            saved.restore({"model": model.state_dict(keep_vars=True)}, optimizer)
            assert saved.values == {"part": 0}
        model.zero_grad()
        one_step(group, "siglip", towers, model, 2)
        yield f"norm.{part}", clip_norm(model.parameters(), 0.1)
        yield f"clipped.{part}", clip_norm(model.parameters(), float("inf"))
        optimizer.step()
        save_state(
            folder / "last.safetensors",
            tensors={"model": model.state_dict()},
            optimizer=optimizer,
            values={"part": part},
            writes=group.leads,
        )
        group.sum(torch.zeros(1))  # written before it is read
        parameters = list(model.parameters())
        held = [p.to_local() if is_sharded(p) else p for p in parameters]
        share = sum(p.numel() for p in held) / sum(p.numel() for p in parameters)
        yield f"share.{part}", torch.tensor(share)
    yield from ((f"trained.{name}", whole(t)) for name, t in model.state_dict().items())


def main(folder: Path, *jobs: str) -> None:
    with group_for("cpu") as group:
        found = {}
        for pairs_found in (loss_alone(group), steps(group), training(group, folder)):
            found |= dict(pairs_found)
        found = {name: tensor.detach().contiguous() for name, tensor in found.items()}
        save_file(found, folder / f"{group.rank}.safetensors")
    for file, port in zip(jobs[::2], jobs[1::2], strict=True):
        # Of its own: the store behind a group of shards stays open, with all that was said there.
        os.environ["MASTER_PORT"] = port
        pretrain.run(pretrain.PretrainConfig.from_yaml(Path(file)))


if __name__ == "__main__":
    with ending_at_once():
        main(Path(sys.argv[1]), *sys.argv[2:])
        sys.exit(0)
