"""LMPT through the text tower: context vectors take the place of a prompt's words.

The prompt of class c is the sequence [start] V_c [name] "." [end] of token embeddings, with M
context vectors V_c of the class's own or shared by all. The frozen tower turns it into t_c; see
`heads.prompt_learning` for logits and losses. With λ = 1 this is CoOp.

The tower runs once a step, over C prompts and no image, so batches should be as large as memory
allows. Many classes go through it in chunks, whose activations are computed again in the backward
pass. What is kept for predicting are the class vectors: a trained head needs no tower.

Reference: Xia et al., LMPT: Prompt Tuning with Class-Specific Embedding Loss for Long-tailed
Multi-Label Visual Recognition, 2023; context vectors: Zhou et al., Learning to Prompt for
Vision-Language Models, 2022, equations 1-3 (CoOp). Departures: classes are scored by sigmoids with
a learned threshold instead of a softmax, and the embedding loss averages over real tokens.
"""

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from featcache.backbones.prompt_tower import PromptTower
from featcache.caption_tokens import CAPTION_TOKENS
from featcache.errors import ConfigError
from featcache.prompts import format_prompts
from heads.base import FeatureSpec, OptimDefaults
from heads.losses.class_specific_embedding import (
    Distances,
    sentence_distances,
    token_distances,
)
from heads.prompt_learning import PromptHead, PromptLearningConfig, PromptLosses
from heads.prompt_sequences import Position, PromptSequences, prompt_sequences

_INIT_STD = 0.02
_SAVED_PER_TOKEN = 16
"""Numbers that a block keeps for its backward pass, in units of a token's width, about."""
_ACTIVATION_BYTES = 2**30
"""What activations of one chunk of prompts may take."""


class LmptTokenConfig(PromptLearningConfig):
    """Context vectors learned through the frozen text tower; CoOp with classification_weight 1."""

    takes_loss: ClassVar[bool] = True
    optim_defaults: ClassVar[OptimDefaults] = OptimDefaults(
        lr=2e-3, weight_decay=0.0, epochs=50, batch_size=4096
    )

    kind: Literal["lmpt_token"] = "lmpt_token"
    """Head kind."""
    n_ctx: PositiveInt | None = None
    """Context vectors of a prompt (M), 1 or more; unset = the tokens of ctx_init, otherwise 16."""
    ctx_init: str = ""
    """Phrase whose token embeddings the context starts from, such as "a photo of a"; empty = random
    numbers of standard deviation 0.02."""
    csc: bool = True
    """Context vectors for each class; otherwise all classes share them."""
    class_token_position: Position = "end"
    """Where the class name stands: end = behind the context, middle = inside it, front = before
    it; names keep all of their tokens together."""
    class_name: str = "{name}"
    """Format string over the class table's columns that makes a class's name."""
    cse_form: Literal["token", "sentence"] = "token"
    """What the embedding loss compares: token = token embeddings of caption and prompt, position by
    position; sentence = caption features and class vectors."""
    m_ctx: NonNegativeInt = 2
    """Prompt positions that lie before a caption's first one in the token form, 0 or more."""
    chunk: PositiveInt | None = None
    """Class prompts that pass the tower at a time; fewer need less memory, and from the second
    chunk on half as much time again; unset = as many as keep activations near 1 GiB."""

    def training_arrays(self) -> tuple[str, ...]:
        """Captions as tokens or as features, unless `classification_weight` is 1."""
        if self.classification_weight == 1:
            return ()
        return (CAPTION_TOKENS if self.cse_form == "token" else "text/projected",)

    def wants_text_tower(self) -> bool:
        """True."""
        return True

    def build(self, spec: FeatureSpec) -> "LmptToken":
        """Fresh context vectors; the class vectors alone where there is no tower to train through.

        Raises:
            BackboneError: if the backbone's text tower takes no token embeddings, or features are
                not those of its space.
            ConfigError: options that contradict each other or do not fit the tower.
        """
        losses = self.losses(spec)
        if spec.text_tower is None:  # a trained head
            vectors = torch.zeros(spec.num_classes, spec.feature_dim)
            threshold = self.first_threshold(spec, vectors)
            return LmptToken(vectors, losses, scale=self.multiplier(spec), threshold=threshold)
        tower = spec.text_tower()
        (names,) = format_prompts(spec.classes, [self.class_name])
        context = self._first_context(tower, spec.num_classes)
        prompts = LearnedPrompts(
            tower,
            prompt_sequences(tower, names, context.shape[-2], self.class_token_position),
            context,
            chunk=self.chunk,
        )
        with torch.no_grad():
            vectors = prompts.vectors().cpu()
        if vectors.shape[1] != spec.feature_dim:
            raise ConfigError(
                f"head lmpt_token: the text tower gives width {vectors.shape[1]}, the cache holds "
                f"image features of width {spec.feature_dim}; extract --features.projected"
            )
        return LmptToken(
            vectors,
            losses,
            scale=self.multiplier(spec),
            threshold=self.first_threshold(spec, vectors),
            prompts=prompts,
            token_form=self.cse_form == "token",
            shift=self.m_ctx,
        )

    def _first_context(self, tower: PromptTower, num_classes: int) -> Tensor:
        """(C, M, W) or, shared, (M, W) float32 on the CPU."""
        if self.ctx_init:
            ids, lengths = tower.tokenize([self.ctx_init])
            one = tower.embed(ids[0, 1 : int(lengths[0]) - 1]).detach().cpu()
            if self.n_ctx not in (None, len(one)):
                raise ConfigError(
                    f"head.n_ctx={self.n_ctx} contradicts head.ctx_init={self.ctx_init!r}, which "
                    f"has {len(one)} tokens; leave n_ctx out"
                )
            return one.expand(num_classes, -1, -1).clone() if self.csc else one.clone()
        shape = (self.n_ctx or 16, tower.width)
        return _INIT_STD * torch.randn((num_classes, *shape) if self.csc else shape)


class LearnedPrompts(nn.Module):
    """Prompts of C classes with trained context vectors, and the frozen tower that reads them."""

    ids: Tensor
    places: Tensor
    lengths: Tensor
    mask: Tensor

    def __init__(
        self,
        tower: PromptTower,
        sequences: PromptSequences,
        context: Tensor,
        *,
        chunk: int | None = None,
    ) -> None:
        """Trains `context`, nothing else.

        Args:
            tower: on the device where the head will be.
            sequences: of C prompts with M holes each.
            context: (C, M, W), or (M, W) for all classes.
            chunk: prompts that pass the tower at a time; None = by memory.
        """
        super().__init__()
        self._tower = (tower,)  # in a tuple, because it is no part of the head's state
        self.context = nn.Parameter(context)
        for name in ("ids", "places", "lengths"):
            self.register_buffer(name, getattr(sequences, name), persistent=False)
        self.register_buffer("mask", sequences.mask, persistent=False)
        one = sequences.ids.shape[1] * tower.width * tower.num_layers * _SAVED_PER_TOKEN * 4
        self.chunk = chunk or max(1, _ACTIVATION_BYTES // one)

    @property
    def tower(self) -> PromptTower:
        """The frozen tower."""
        return self._tower[0]

    def embeddings(self, start: int = 0, stop: int | None = None) -> Tensor:
        """(n, T, W) float32 token embeddings of the prompts of classes start..stop."""
        span = slice(start, stop)
        fixed = self.tower.embed(self.ids[span])
        places = self.places[span, :, None].expand(-1, -1, fixed.shape[-1])
        context = self.context[span] if self.context.ndim == 3 else self.context
        return fixed.scatter(1, places, context.expand_as(places).to(fixed.dtype))

    def vectors(self) -> Tensor:
        """(C, P) float32 unit text features of the prompts."""
        starts = range(0, len(self.ids), self.chunk)
        again = torch.is_grad_enabled() and len(starts) > 1
        parts = [
            checkpoint(self._encode, start, use_reentrant=False) if again else self._encode(start)
            for start in starts
        ]
        return F.normalize(torch.cat(parts), dim=-1)

    def _encode(self, start: int) -> Tensor:
        stop = start + self.chunk
        return self.tower.encode(self.embeddings(start, stop), self.lengths[start:stop])


class LmptToken(PromptHead):
    """Class vectors that a frozen text tower makes of learned prompts.

    Without `prompts` it only holds the class vectors: a trained head as it is loaded.
    """

    vectors: Tensor
    prompts: LearnedPrompts | None

    def __init__(
        self,
        vectors: Tensor,
        losses: PromptLosses,
        *,
        scale: float,
        threshold: Tensor | None = None,
        prompts: LearnedPrompts | None = None,
        token_form: bool = True,
        shift: int = 0,
    ) -> None:
        """The class vectors of the prompts as they are.

        Args:
            vectors: (C, P) unit class vectors.
            losses: what trains it.
            scale: s.
            threshold: 0-d first θ; None = none.
            prompts: what makes class vectors; None = they are fixed.
            token_form: which captions `loss` gets; see `LmptTokenConfig.cse_form`.
            shift: m; see `token_distances`.
        """
        super().__init__(losses, scale, threshold)
        self.prompts, self.token_form, self.shift = prompts, token_form, shift
        self.register_buffer("vectors", vectors)
        self._made_of: Tensor | None = None

    def forward(self, features: Tensor) -> Tensor:
        """(B, C) logits; see `Head.forward`. Out of training the tower runs once, not each time."""
        return self.logits(features, self.class_vectors() if self.training else self._kept())

    def class_vectors(self) -> Tensor:
        """(C, P) t_c."""
        return self.vectors if self.prompts is None else self.prompts.vectors()

    def caption_distances(self, captions: Tensor, vectors: Tensor) -> Distances:
        """Distances of (B, L) caption token ids plus 1, 0 at padding, or of (B, P) features."""
        if not self.token_form:
            return sentence_distances(captions, vectors)
        assert self.prompts is not None, "a head that was loaded is not trained further"
        prompts = self.prompts.embeddings()
        ids = captions[:, : prompts.shape[1]]
        words = self.prompts.tower.embed((ids - 1).clamp(min=0))
        return token_distances(words, ids > 0, prompts, self.prompts.mask, self.shift)

    def trained_state(self, candidate: str = "") -> Mapping[str, Tensor]:
        """Context vectors and threshold, and the class vectors that they make."""
        vectors = self._kept().detach().clone()
        return {**super().trained_state(candidate), "vectors": vectors}

    def load_trained_state(self, state: Mapping[str, Tensor]) -> None:
        """Puts tensors in place; without a tower the context has no use and is left out."""
        if self.prompts is None:
            state = {name: t for name, t in state.items() if not name.startswith("prompts.")}
        super().load_trained_state(state)

    @torch.no_grad()
    def _kept(self) -> Tensor:
        """The class vectors, made anew if the context has changed since.

        Values are compared: fused optimisers change them without counting up a tensor's version.
        """
        if self.prompts is not None:
            context = self.prompts.context
            if self._made_of is None or not torch.equal(self._made_of, context.cpu()):
                self.vectors.copy_(self.prompts.vectors())
                self._made_of = context.detach().cpu().clone()
        return self.vectors
