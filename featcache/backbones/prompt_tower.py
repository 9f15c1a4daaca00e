"""A frozen text tower taken apart at its token embeddings, so that prompts can be learned there.

What `Backbone.encode_text` does in one go is three steps here: texts to token ids, ids to token
embeddings (a table), embeddings to features. Gradients pass through the third to the embeddings;
weights get none. A tower that is causal is only run up to the last token that is not padding.

Shapes: n texts, L tokens, W width of a token embedding, P width of a text feature.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from featcache.errors import BackboneError


class TokenIds(NamedTuple):
    """Texts as a text tower takes them.

    Attributes:
        ids: (n, L) int64, from the start token to the end token, then padding.
        lengths: (n,) int64 tokens of each text, start and end included.
    """

    ids: Tensor
    lengths: Tensor

    @property
    def mask(self) -> Tensor:
        """(n, L) bool, False at padding."""
        return torch.arange(self.ids.shape[1], device=self.ids.device) < self.lengths[:, None]


class PromptTower(ABC):
    """The text half of a frozen backbone.

    Attributes:
        device: where it is.
        context_length: most tokens of a text, start and end included.
        width: W.
        num_layers: blocks.
    """

    device: torch.device
    context_length: int
    width: int
    num_layers: int

    @abstractmethod
    def tokenize(self, texts: Sequence[str]) -> TokenIds:
        """Token ids on the CPU; texts that are too long keep their end token."""

    @abstractmethod
    def embed(self, ids: Tensor) -> Tensor:
        """(..., W) float32 embeddings on `device`, without positions, of (...) int64 ids."""

    @abstractmethod
    def encode(self, embeddings: Tensor, lengths: Tensor) -> Tensor:
        """(n, P) float32 text features, not normalised; differentiable in `embeddings`.

        Args:
            embeddings: (n, L, W) token embeddings without positions, from the start token on; L may
                be less than `context_length`; what stands behind a text's end is not read.
            lengths: (n,) int64 tokens of each text, start and end included, on any device.
        """

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Itself: nothing in it ever changes, so copies of a head share it."""
        return self


class ClipPromptTower(PromptTower):
    """Causal text transformers of open_clip that pool at the end token."""

    def __init__(self, model: Any, tokenizer: Any, device: torch.device) -> None:
        """Keeps the text modules of a model, not its image tower.

        Args:
            model: open_clip's CLIP or CustomTextCLIP, frozen.
            tokenizer: its tokenizer.
            device: where the model is.

        Raises:
            BackboneError: if its text tower is of another kind.
        """
        from open_clip.tokenizer import SimpleTokenizer
        from open_clip.transformer import TextTransformer

        text = getattr(model, "text", model)  # CustomTextCLIP has a module, CLIP its parts
        pool = model.text_pool_type if text is model else getattr(text, "pool_type", "")
        plain = text is model or (isinstance(text, TextTransformer) and text.cls_emb is None)
        if not plain or pool not in ("argmax", "eos") or text.attn_mask is None:
            raise BackboneError(
                f"{type(text).__name__} with pooling {pool or 'of its own'}: prompts are learned "
                "in causal text transformers that pool at the end token (CLIP's) only; take head "
                "lmpt"
            )
        if not isinstance(tokenizer, SimpleTokenizer):
            raise BackboneError(
                f"{type(tokenizer).__name__}: prompts are learned with CLIP's own tokens; take "
                "head lmpt"
            )
        self.device = device
        self._tokenizer = tokenizer
        self._table: nn.Embedding = text.token_embedding
        self._positions: Tensor = text.positional_embedding
        self._transformer: nn.Module = text.transformer
        self._norm: nn.Module = text.ln_final
        self._projection: nn.Linear | Tensor | None = text.text_projection
        self._causal: Tensor = text.attn_mask
        self._dtype: torch.dtype = text.transformer.get_cast_dtype()
        self.context_length, self.width = (int(size) for size in self._positions.shape)
        self.num_layers = len(text.transformer.resblocks)

    def tokenize(self, texts: Sequence[str]) -> TokenIds:
        """Token ids; see `PromptTower.tokenize`."""
        ids: Tensor = self._tokenizer(list(texts), context_length=self.context_length)
        # Padding is 0, which also is a token; the end token occurs once and ends the text.
        return TokenIds(ids, (ids == self._tokenizer.eot_token_id).int().argmax(1) + 1)

    def embed(self, ids: Tensor) -> Tensor:
        """Token embeddings; see `PromptTower.embed`."""
        embeddings: Tensor = self._table(ids.to(self.device))
        return embeddings.float()

    def encode(self, embeddings: Tensor, lengths: Tensor) -> Tensor:
        """Text features; see `PromptTower.encode`."""
        lengths = lengths.to(self.device)
        longest = int(lengths.max())
        x: Tensor = embeddings[:, :longest].to(self.device, self._dtype)
        x = x + self._positions[:longest].to(self._dtype)
        x = self._transformer(x, attn_mask=self._causal[:longest, :longest])
        x = self._norm(x[torch.arange(len(x), device=self.device), lengths - 1])
        if isinstance(self._projection, nn.Linear):
            x = self._projection(x)
        elif self._projection is not None:
            x = x @ self._projection
        return x.float()


class BertPromptTower(PromptTower):
    """BLIP's text encoder without image: both directions, padding masked, pooled at the start."""

    def __init__(
        self,
        encoder: Any,
        projection: nn.Module,
        tokenize: Callable[[Sequence[str]], tuple[Tensor, Tensor]],
        device: torch.device,
        context_length: int,
    ) -> None:
        """Keeps the text modules.

        Args:
            encoder: transformers' BlipTextModel, frozen.
            projection: from its states to the space shared with images.
            tokenize: n texts to (n, L) ids and the same of 1 for tokens and 0 for padding.
            device: where they are.
            context_length: L.
        """
        self.device, self.context_length = device, context_length
        self._encoder, self._projection, self._tokenize = encoder, projection, tokenize
        self._table: nn.Embedding = encoder.embeddings.word_embeddings
        self.width = int(self._table.embedding_dim)
        self.num_layers = int(encoder.config.num_hidden_layers)

    def tokenize(self, texts: Sequence[str]) -> TokenIds:
        """Token ids; see `PromptTower.tokenize`."""
        ids, mask = self._tokenize(texts)
        return TokenIds(ids, mask.sum(1))

    def embed(self, ids: Tensor) -> Tensor:
        """Token embeddings; see `PromptTower.embed`."""
        embeddings: Tensor = self._table(ids.to(self.device))
        return embeddings.float()

    def encode(self, embeddings: Tensor, lengths: Tensor) -> Tensor:
        """Text features; see `PromptTower.encode`."""
        lengths = lengths.to(self.device)
        longest = int(lengths.max())
        x = embeddings[:, :longest].to(self.device, self._table.weight.dtype)
        mask = torch.arange(longest, device=self.device) < lengths[:, None]
        # The encoder adds positions in place.
        x = self._encoder.embeddings(inputs_embeds=x.clone())
        states = self._encoder(encoder_embeds=x, attention_mask=mask.to(x.dtype)).last_hidden_state
        features: Tensor = self._projection(states[:, 0])
        return features.float()
