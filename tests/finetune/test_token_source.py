"""Cached tokens as the input of a training: every row, its views, and gradients of the tail."""

import numpy as np
import pytest
import torch

from featcache.adapters.last_blocks import LastBlocksConfig
from featcache.backbones.open_clip import OpenClipConfig
from featcache.errors import CacheError
from featcache.extract import ExtractConfig, run
from featcache.reader import open_cache
from finetune.tuning.token_source import TokenSource, require_tokens
from heads.parts import Part

CPU = torch.device("cpu")


@pytest.fixture
def make(image_folder, tiny_clip, tmp_path):
    """A cache of the small image folder with the given tokens."""

    def build(tokens, num_views=1):
        config = ExtractConfig.model_validate(
            {
                "dataset": {"root": str(image_folder)},
                "backbone": {"model": f"local-dir:{tiny_clip}"},
                "cache": str(tmp_path / f"cache-{tokens.replace(':', '-')}-{num_views}"),
                "features": {"tokens": tokens, "storage_dtype": "float32"},
                "views": {"num_views": num_views},
                "device": "cpu",
                "precision": "fp32",
            }
        )
        run(config)
        return open_cache(config.cache)

    return build


def part_of(cache, split):
    rows = cache.rows(split)
    return Part(split, rows, cache.labels(rows))


def test_encoded_tokens_are_the_cached_features_and_train_the_tail(make, tiny_clip):
    cache = make("before_last:2", num_views=3)
    backbone = OpenClipConfig(model=f"local-dir:{tiny_clip}").open()
    towers = backbone.trainable()
    adapter = LastBlocksConfig(num_blocks=1).attach(towers)
    source = TokenSource(towers, cache, part_of(cache, "train"), CPU)
    assert (source.num_blocks, source.num_views) == (2, 3)
    projected = cache.array("image/projected").read()
    val = part_of(cache, "val")
    seen = []
    for tokens, which in source.plain(val, 3):
        expected = torch.from_numpy(projected[val.rows[which], 0])
        assert torch.allclose(source.encode(tokens), expected, atol=1e-5)
        assert torch.allclose(source.encode_finished(backbone, tokens), expected, atol=1e-5)
        seen += which.tolist()
    assert seen == list(range(len(val)))

    plan = [np.array([4, 0, 9]), np.array([7, 2])]
    views = set()
    for epoch in range(4):
        batches = list(source.augmented(plan, 0, epoch))
        assert [which.tolist() for _, which in batches] == [[4, 0, 9], [7, 2]]
        for tokens, which in batches:
            features = source.encode(tokens)
            rows = torch.from_numpy(projected[cache.rows("train")[which]])
            distance = (features[:, None] - rows).abs().amax(-1)  # (b, V)
            assert (distance.amin(1) < 1e-5).all()
            views |= set(distance.argmin(1).tolist())
    assert views == {0, 1, 2}
    again = list(source.augmented(plan, 0, 3))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(batches, again, strict=True))

    source.encode(batches[0][0]).sum().backward()
    graded = {n for n, p in backbone.model.named_parameters() if p.grad is not None}
    assert graded == set(adapter.state())  # of the last block, though two are run


def test_caches_that_do_not_fit_are_refused(make):
    with pytest.raises(CacheError, match="extract with --features"):
        require_tokens(make("all"))
    cache = make("before_last:1")
    assert require_tokens(cache, 1) == 1
    with pytest.raises(CacheError, match="enter the last 1 blocks"):
        require_tokens(cache, 2)
