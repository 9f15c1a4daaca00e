"""A small cache written through the store, without a backbone, and what it was written from."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
import torch

from featcache.identity import BackboneIdentity
from featcache.manifest import Manifest
from featcache.storage import StoreUrl, locate, place
from featcache.store import ArrayPlan, CachePlan, Shard, Store, create

from ..conftest import sample_identity

BACKBONE = BackboneIdentity(kind="open_clip", name="tiny", weights="w" * 32, architecture="a" * 32)


@dataclass
class Written:
    """What a cache was written from."""

    path: Path | StoreUrl
    plan: CachePlan
    arrays: dict[str, npt.NDArray[Any]] = field(default_factory=dict)

    def write(self, store: Store, shard: Shard) -> None:
        """Writes a shard's chunks without marking it done."""
        for plan in self.plan.row_arrays:
            if plan.path.startswith("text/") == (shard.kind == "text"):
                rows = self.arrays[plan.path][shard.start : shard.stop]
                store.write_chunks(plan.path, shard.start, rows)


def ranges(kind: Any, num_rows: int, shard_rows: int) -> list[Shard]:
    starts = range(0, num_rows, shard_rows)
    return [Shard(kind, i, s, min(num_rows, s + shard_rows)) for i, s in enumerate(starts)]


def plan_cache(
    path: Path | StoreUrl,
    num_rows: int = 20,
    dim: int = 6,
    chunk_rows: int = 4,
    shard_rows: int = 8,
    views: int = 1,
    task: Any = "single_label",
    dtype: Any = "float16",
    captions: int = 0,
) -> Written:
    random = np.random.default_rng(num_rows)
    num_train = max(1, num_rows * 3 // 4)
    if task == "multi_label":
        labels = [[c for c in range(3) if (row >> c) & 1] for row in range(num_rows)]
    elif task == "single_label":
        labels = [[row % 3] if row != 1 else [] for row in range(num_rows)]
    else:
        labels = [[] for _ in range(num_rows)]
    manifest = Manifest.build(
        kind="folder",
        root="/images",
        ids=[f"id{row}" for row in range(num_rows)],
        paths=[f"é/{row}.jpg" for row in range(num_rows)],
        splits=["train"] * num_train + ["val"] * (num_rows - num_train),
        labels=labels,
        classes=pd.DataFrame({"name": ["oak", "elm", "日本"], "genus": ["Quercus", "", "x"]}),
        task=task,
        captions=[[f"caption {row}-{i}" for i in range(captions)] for row in range(num_rows)],
    )
    identity = sample_identity(
        manifest.identity,
        BACKBONE,
        text=captions > 0,
        storage_dtype=dtype,
        num_views=views,
    )
    num_captions = num_rows * captions
    shape = (num_rows, dim) if views == 1 else (num_rows, views, dim)
    plans = [ArrayPlan("image/projected", shape, dtype, chunk_rows)]
    shards = ranges("image", num_rows, shard_rows)
    arrays: dict[str, npt.NDArray[Any]] = {
        "image/projected": random.standard_normal(shape).astype(dtype),
        "rows/valid": np.arange(num_rows) % 7 != 5,
        "rows/content": random.integers(0, 2**63, num_rows).astype(np.uint64),
        "rows/stamp": np.arange(1, num_rows + 1, dtype=np.uint64),
    }
    arrays["image/projected"][~arrays["rows/valid"]] = np.nan
    if captions:
        plans.append(ArrayPlan("text/projected", (num_captions, dim), dtype, chunk_rows))
        arrays["text/projected"] = random.standard_normal((num_captions, dim)).astype(dtype)
        shards += ranges("text", num_captions, shard_rows)
    attributes = {"shard_rows": shard_rows, "logit_scale": 100.0, "backbone": {"kind": "none"}}
    plan = CachePlan(identity, manifest, tuple(plans), tuple(shards), attributes)
    return Written(path, plan, arrays)


def write_cache(path: Path | StoreUrl, **options: Any) -> Written:
    written = plan_cache(path, **options)
    store = create(path, written.plan)
    for shard in store.pending():
        written.write(store, shard)
        invalid = [
            {"row": row, "path": f"é/{row}.jpg", "reason": "truncated"}
            for row in range(shard.start, shard.stop)
            if shard.kind == "image" and not written.arrays["rows/valid"][row]
        ]
        store.mark_done(shard, {"invalid": invalid})
    store.finish({"num_invalid": 1})
    return written


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests survive no power cut, so they need not wait for one."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def planned(tmp_path: Path) -> Callable[..., Written]:
    """Plans a cache at `tmp_path/cache` without writing anything."""
    return lambda **options: plan_cache(tmp_path / "cache", **options)


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., Written]:
    """Writes a whole cache at `tmp_path/cache`."""
    return lambda **options: write_cache(tmp_path / "cache", **options)


WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] a b c d e f g h i o t . , picture of cat dog the photo mat"


@pytest.fixture(scope="session")
def tiny_blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a two-layer BLIP retrieval model of 32-pixel images, fixed random weights."""
    from transformers import BlipConfig, BlipForImageTextRetrieval

    folder = tmp_path_factory.mktemp("backbones") / "tiny_blip"
    processor, tokenizer = blip_parts(folder)
    sizes = blip_sizes(len(tokenizer), tokenizer.sep_token_id)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(21)
        model = BlipForImageTextRetrieval(BlipConfig(image_text_hidden_size=24, **sizes))
        for name, parameter in model.named_parameters():
            # The library starts with weights so small that a tower hardly sees its input.
            scale = 0.1 if "norm" in name.lower() or parameter.ndim == 1 else 0.2
            parameter.data += scale * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def blip_parts(folder: Path) -> tuple[Any, Any]:
    """Image processor and tokenizer of a tiny BLIP, over a made-up vocabulary."""
    from transformers import BertTokenizer, BlipImageProcessor

    folder.mkdir()
    words = WORDS.split() + [f"##{letter}" for letter in "abcdefghiot"]
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(words)})
    return BlipImageProcessor(size={"height": 32, "width": 32}), tokenizer


def blip_sizes(num_words: int, end: int) -> dict[str, dict[str, Any]]:
    """Configurations of tiny towers; [DEC] and [ENC] follow the vocabulary, as in BLIP."""
    text = {
        "vocab_size": num_words + 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "bos_token_id": num_words,
        "pad_token_id": 0,
        "sep_token_id": end,
        "eos_token_id": end,
    }
    vision = {
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 8,
    }
    return {"text_config": text, "vision_config": vision}


@pytest.fixture(scope="session")
def tiny_captioner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a two-layer BLIP captioner of 32-pixel images, fixed random weights."""
    from transformers import BlipConfig, BlipForConditionalGeneration

    folder = tmp_path_factory.mktemp("backbones") / "tiny_captioner"
    processor, tokenizer = blip_parts(folder)
    sizes = blip_sizes(len(tokenizer), tokenizer.sep_token_id)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(22)
        model = BlipForConditionalGeneration(BlipConfig(**sizes))
        for parameter in model.parameters():
            parameter.data += 0.2 * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def url(bucket: str) -> StoreUrl:
    found = place(f"{bucket}/some/birds")
    assert isinstance(found, StoreUrl)
    return found


def objects(url: StoreUrl) -> dict[str, bytes]:
    folder = locate(url)
    return {entry.key: folder.read(entry.key) for entry in folder.list()}


def files(path: Path) -> dict[str, bytes]:
    return {
        file.relative_to(path).as_posix(): file.read_bytes()
        for file in path.rglob("*")
        if file.is_file()
    }
