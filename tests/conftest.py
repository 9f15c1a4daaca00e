import functools
import io
import itertools
import json
import logging
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from featcache.identity import (
    BackboneIdentity,
    DatasetIdentity,
    FeatureIdentity,
    Identity,
    PreprocessIdentity,
)

# Tiny tensors gain nothing from a second thread, and lose much when other jobs hold the cores.
torch.set_num_threads(1)

TINY_CLIP = {
    "embed_dim": 32,
    "vision_cfg": {
        "image_size": 32,
        "patch_size": 8,
        "width": 64,
        "layers": 2,
        "head_width": 32,
    },
    "text_cfg": {
        "context_length": 77,
        "vocab_size": 49408,
        "width": 64,
        "heads": 2,
        "layers": 2,
    },
}

TINY_PIXELS = {
    "size": 32,
    "mode": "RGB",
    "mean": [0.5, 0.4, 0.3],
    "std": [0.3, 0.25, 0.2],
    "interpolation": "bicubic",
    "resize_mode": "shortest",
    "fill_color": 0,
}


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder for `local-dir:` with a two-layer CLIP of 32-pixel images and fixed random weights."""
    from open_clip.model import CLIP
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("backbones") / "tiny_clip"
    folder.mkdir()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(20)
        model = CLIP(**TINY_CLIP)
        for name, parameter in model.named_parameters():
            if ".ln_" in name or name.startswith("ln_"):  # random weights alone would leave 1 and 0
                parameter.data += 0.1 * torch.randn(parameter.shape)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    config = {"model_cfg": TINY_CLIP, "preprocess_cfg": TINY_PIXELS}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return folder


def sample_identity(
    dataset: DatasetIdentity, backbone: BackboneIdentity, **features: Any
) -> Identity:
    """A cache's identity: projected float16 features without text, and what `features` changes."""
    usual: dict[str, Any] = {
        "projected": True,
        "pooled": False,
        "tokens": "none",
        "token_layer": -1,
        "text": False,
        "storage_dtype": "float16",
        "num_views": 1,
        "view_seed": 0,
        "view_scale": 1.0,
    }
    return Identity(
        dataset=dataset,
        backbone=backbone,
        preprocess=PreprocessIdentity(
            size=(32, 32),
            mean=(0.5, 0.5, 0.5),
            std=(0.2, 0.2, 0.2),
            interpolation="bicubic",
            resize_mode="shortest",
            fill_color=0,
            mode="fast",
        ),
        precision="fp32",
        features=FeatureIdentity(**{**usual, **features}),
    )


@pytest.fixture(autouse=True)
def _vocabulary_is_read_once() -> None:
    """Tokenizers share what they make of CLIP's merges: each would take a tenth of a second."""
    tokenizers = sys.modules.get("open_clip.tokenizer")
    if tokenizers is None or hasattr(tokenizers.SimpleTokenizer.__init__, "__wrapped__"):
        return
    original, made = tokenizers.SimpleTokenizer.__init__, {}

    @functools.wraps(original)
    def initialise(self: Any, *args: Any, **options: Any) -> None:
        key = repr((args, sorted(options.items())))
        if key not in made:
            original(self, *args, **options)
            made[key] = dict(vars(self))
        vars(self).update(made[key])

    tokenizers.SimpleTokenizer.__init__ = initialise


_OPENED: dict[Any, Any] = {}


@pytest.fixture
def opened_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps opened backbones between tests: opening one is most of what a tiny extraction takes."""
    from featcache.backbones.open_clip import OpenClipConfig

    original = OpenClipConfig.open

    def opened(self: Any, device: str = "cpu", precision: Any = "fp32") -> Any:
        key = self.to_yaml(), device, precision
        if key not in _OPENED:
            _OPENED[key] = original(self, device, precision)
        return _OPENED[key]

    monkeypatch.setattr(OpenClipConfig, "open", opened)


def photo(height: int, width: int, seed: int) -> Image.Image:
    """Smooth noise over several octaves: compresses and resizes like a photograph."""
    generator = np.random.default_rng(seed)
    total = np.zeros((height, width, 3), np.float32)
    for side in (2, 5, 17):
        grid = generator.normal(size=(side, side, 3)).astype(np.float32)
        for channel in range(3):
            layer = Image.fromarray(grid[:, :, channel])
            total[:, :, channel] += np.asarray(
                layer.resize((width, height), Image.Resampling.BICUBIC)
            )
    total += 0.05 * generator.normal(size=total.shape)
    return Image.fromarray(np.clip(128 + 50 * total, 0, 255).astype(np.uint8))


@pytest.fixture(scope="session")
def make_photo() -> Callable[[int, int, int], Image.Image]:
    """`make_photo(height, width, seed)`: an RGB image with a photograph's statistics."""
    return photo


@pytest.fixture(scope="session")
def make_jpeg() -> Callable[[int, int, int], bytes]:
    """`make_jpeg(height, width, seed)`: a JPEG file's bytes."""

    def make(height: int, width: int, seed: int) -> bytes:
        stream = io.BytesIO()
        photo(height, width, seed).save(stream, "JPEG", quality=90)
        return stream.getvalue()

    return make


@pytest.fixture
def image_folder(tmp_path: Path, make_jpeg: Callable[[int, int, int], bytes]) -> Path:
    """Folder dataset: train (10) and val (4) JPEGs of two classes, `split/class/name.jpg`."""
    root = tmp_path / "images"
    for number in range(14):
        split = "train" if number < 10 else "val"
        file = root / split / ("cat", "dog")[number % 2] / f"{number:02d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(make_jpeg(40 + number, 60 - number, number))
    return root


_BUCKETS = itertools.count()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """Address of an S3 server on loopback."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer(
        ip_address="127.0.0.1", port=0, verbose=False
    )
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """`s3://...` of an empty bucket on loopback; the environment leads there, mirrors apart."""
    name = f"bucket-{next(_BUCKETS)}"
    request = urllib.request.Request(f"{s3_server}/{name}", method="PUT")
    urllib.request.urlopen(request).close()
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-to-be-shown")
    monkeypatch.setenv("FEATCACHE_MIRROR", str(tmp_path / "mirror"))
    return f"s3://{name}"
