"""What the storage type of a cache's tokens costs, measured on the first images before writing."""

from collections.abc import Iterator

import numpy as np
import torch

from featcache.backbones.base import Backbone, FeatureRequest
from featcache.identity import FeatureIdentity
from featcache.layout.quantize import TokenError, as_stored, measure, smallest_cosine
from featcache.precision import Sample


def token_error(
    backbone: Backbone,
    features: FeatureIdentity,
    samples: Iterator[Sample],
) -> TokenError | None:
    """The error of stored tokens against the encoder's own.

    Args:
        backbone: the encoder.
        features: what the cache will hold.
        samples: batches of images; the first one is used.

    Returns:
        None where there is nothing to say: float16 or float32 patch tokens, no readable image, or
        tokens that do not fit the type at all, which the extraction will stop at.
    """
    dtype, last = features.token_dtype, features.before_last
    if dtype is None or dtype == "float32" or (dtype == "float16" and not last):
        return None
    sample = next(samples, None)
    if sample is None:
        return None
    pixels, positions = sample.pixels, sample.positions
    spec = backbone.spec
    request = FeatureRequest(
        projected=spec.projected_dim > 0,
        pooled=spec.projected_dim == 0,
        tokens=True,
        token_pool=features.token_pool,
        token_layer=features.token_layer,
        before_last=last,
    )
    encoded = {name: t[positions] for name, t in backbone.encode_image(pixels, request).items()}
    tokens = encoded["tokens"].cpu().numpy()
    limit = np.finfo(np.float32 if dtype == "int8" else dtype).max
    if not np.abs(tokens).max() <= limit:
        return None
    if not last:
        return measure(tokens, dtype)
    finished = backbone.finish_from(torch.from_numpy(as_stored(tokens, dtype)), last)
    direct = encoded["projected" if request.projected else "pooled"]
    return measure(tokens, dtype, smallest_cosine(finished.cpu().numpy(), direct.cpu().numpy()))
