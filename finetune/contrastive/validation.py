"""How good a dual encoder is: zero-shot top-1, and retrieval between images and captions."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featcache.backbones.base import PixelSpec
from featcache.manifest import Manifest
from featcache.prompts import format_prompts
from finetune.contrastive.architectures import Tokenizer
from finetune.contrastive.pairs import Pairs, pairs_of
from finetune.contrastive.text import TokenTable, encode_text
from finetune.images.loading import Images, LoadingConfig
from finetune.images.training_images import normalize
from heads.run_folder import RunError

ROWS_AT_A_TIME = 1024
"""Rows whose similarities are held at once."""


@dataclass(frozen=True)
class Validation:
    """A split that is only looked at, ready to be measured as often as wanted.

    Attributes:
        pairs: its rows with captions.
        images: their pixels at the tower's own size.
        texts: the captions' tokens.
        prompts: one prompt a class.
        spec: preprocessing of the tower.
        device: where the model lives.
        batch_size: images or texts encoded at a time.
    """

    pairs: Pairs
    images: Images
    texts: TokenTable
    prompts: TokenTable
    spec: PixelSpec
    device: torch.device
    batch_size: int

    @staticmethod
    def tables(
        manifest: Manifest, split: str, template: str, tokenizer: Tokenizer
    ) -> tuple[TokenTable, TokenTable]:
        """Tokens of the split's captions, and of the class prompts made from `template`."""
        prompts = TokenTable.of(format_prompts(manifest.classes, [template])[0], tokenizer)
        return TokenTable.of(pairs_of(manifest, split).texts, tokenizer), prompts

    @classmethod
    def open(
        cls,
        manifest: Manifest,
        split: str,
        texts: TokenTable,
        prompts: TokenTable,
        spec: PixelSpec,
        options: LoadingConfig,
        device: torch.device,
        batch_size: int = 256,
    ) -> "Validation":
        """The split of a dataset; texts and prompts are those of `tables`."""
        pairs = pairs_of(manifest, split)
        workers = options.workers_for(device)
        images = Images(pairs.root, pairs.paths, spec, None, options, workers)
        return cls(pairs, images, texts, prompts, spec, device, batch_size)

    @torch.inference_mode()
    def measure(self, model: nn.Module) -> dict[str, float]:
        """Metrics of a model in float32, put into evaluation mode and back.

        Returns:
            `zero_shot_top1` and `chance` if the split has classes, and the recalls of
            `retrieval_recall`, all shares in 0..1.

        Raises:
            RunError: if features are NaN or infinite, as weights that have diverged make them.
        """
        was_training = model.training
        model.eval()
        device = self.device
        readable: list[npt.NDArray[np.int64]] = []

        def encode_images() -> Iterator[Tensor]:
            rows = np.arange(len(self.pairs))
            starts = range(0, len(rows), self.batch_size)
            for pixels, kept in self.images.stream(
                rows[start : start + self.batch_size] for start in starts
            ):
                readable.append(kept)
                pixels = normalize(pixels.to(self.device), self.spec.mean, self.spec.std)
                pixels = pixels.contiguous(memory_format=torch.channels_last)
                yield model.encode_image(pixels)  # type: ignore[operator]

        def encode_texts(table: TokenTable, which: npt.NDArray[np.int64]) -> Tensor:
            starts = range(0, len(which), self.batch_size)
            return normalized(
                encode_text(model, table.rows(which[start : start + self.batch_size]).to(device))
                for start in starts
            )

        images = normalized(encode_images())
        rows = np.concatenate(readable)
        offsets, texts = self.pairs.captions_of(rows)
        # Captions of unreadable images have nothing to be found by them.
        known, texts = np.unique(texts, return_inverse=True)
        captions = encode_texts(self.texts, known)
        for what, features in (("image", images), ("text", captions)):
            if not features.isfinite().all():
                raise RunError(
                    f"validation: {what} features are NaN or infinite, the training has diverged; "
                    "lower optim.lr or set optim.clip_norm"
                )
        metrics: dict[str, float] = {}
        labels = self.pairs.labels[rows]
        if (labels >= 0).any():
            prompts = encode_texts(self.prompts, np.arange(len(self.prompts.lengths)))
            metrics["zero_shot_top1"] = zero_shot_top1(images, prompts, labels)
            metrics["chance"] = 1.0 / len(prompts)
        metrics |= retrieval_recall(images, captions, offsets, texts)
        model.train(was_training)
        return metrics


def normalized(features: Iterable[Tensor]) -> Tensor:
    """(N, P) float32 L2-normalised rows of features that come in parts."""
    return torch.cat([F.normalize(part.float(), dim=-1) for part in features])


def zero_shot_top1(
    image_features: Tensor, class_features: Tensor, labels: npt.NDArray[np.int64]
) -> float:
    """Share of labelled images whose nearest class prompt is their own; ties go to the lower index.

    Args:
        image_features: (n, P) normalised.
        class_features: (C, P) normalised.
        labels: (n,) class index, -1 = not counted.
    """
    nearest = (image_features @ class_features.T).argmax(dim=1).cpu().numpy()
    counted = labels >= 0
    return float((nearest[counted] == labels[counted]).mean())


def retrieval_recall(
    image_features: Tensor,
    text_features: Tensor,
    offsets: npt.NDArray[np.int64],
    text_ids: npt.NDArray[np.int64],
    ks: tuple[int, ...] = (1, 5, 10),
) -> dict[str, float]:
    """Recall at k both ways over distinct texts; ties and NaN count against the model.

    Image to text: a hit if any of the image's own texts is among the k most similar.
    Text to image: a hit if any image that owns the text is among the k most similar.

    Args:
        image_features: (n, P) normalised.
        text_features: (U, P) normalised, distinct texts.
        offsets: (n+1,) start of each image's texts in `text_ids`.
        text_ids: (m,) texts as row indices of `text_features`.
        ks: ranks asked for; those that reach all candidates, which says nothing, are left out.

    Returns:
        `image_to_text_recall_at_K` and `text_to_image_recall_at_K`, shares in 0..1.
    """
    images = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    result = {}
    for name, queries, candidates, pairs in (
        ("image_to_text", image_features, text_features, (images, text_ids)),
        ("text_to_image", text_features, image_features, (text_ids, images)),
    ):
        ranks = _ranks(queries, candidates, *pairs)
        for k in (k for k in ks if k < len(candidates)):
            result[f"{name}_recall_at_{k}"] = float((ranks < k).mean())
    return result


def _ranks(
    queries: Tensor,
    candidates: Tensor,
    query_ids: npt.NDArray[np.int64],
    candidate_ids: npt.NDArray[np.int64],
) -> npt.NDArray[np.int64]:
    """Per query the number of foreign candidates at least as similar as its best own one."""
    ranks = np.empty(len(queries), np.int64)
    for start in range(0, len(queries), ROWS_AT_A_TIME):
        stop = min(start + ROWS_AT_A_TIME, len(queries))
        scores = queries[start:stop] @ candidates.T
        inside = (query_ids >= start) & (query_ids < stop)
        rows = torch.from_numpy(query_ids[inside] - start).to(scores.device)
        columns = torch.from_numpy(candidate_ids[inside]).to(scores.device)
        own = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
        own[rows, columns] = True
        best = scores.masked_fill(~own, -torch.inf).amax(dim=1, keepdim=True)
        # Not "at least as similar", which NaN never is.
        ranks[start:stop] = (~(scores < best) & ~own).sum(dim=1).cpu().numpy()
    return ranks
