"""Crops, flips and colours: torchvision's distributions, fixed by (seed, epoch, row)."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import ks_2samp
from torchvision.transforms import v2

from featcache.backbones.base import PixelSpec
from featcache.images import load_pixels, load_view
from finetune.images.augmentation import AugmentationConfig, Variation, crop_squares, square_views

MEAN = (0.5, 0.4, 0.3)


def boxes(config: AugmentationConfig, height: int, width: int, count: int) -> np.ndarray:
    """(count, 5) top, left, height, width, flip."""
    variation = Variation(config, MEAN)
    drawn = [variation.box_and_flip((0, 0, row), height, width) for row in range(count)]
    return np.array([(*box, flip) for box, flip in drawn])


@pytest.mark.parametrize("size", [(300, 400), (50, 400)])
def test_crops_are_distributed_as_torchvisions(size: tuple[int, int]) -> None:
    config = AugmentationConfig(min_area=0.08, max_aspect=4 / 3)
    ours = boxes(config, *size, 1500)
    theirs_of = v2.RandomResizedCrop(8, (0.08, 1.0), (3 / 4, 4 / 3))
    torch.manual_seed(0)
    canvas = torch.zeros(3, *size, dtype=torch.uint8)
    made = [theirs_of.make_params([canvas]) for _ in range(1500)]
    theirs = np.array([(p["top"], p["left"], p["height"], p["width"]) for p in made])
    for name, pick in {
        "top": lambda b: b[:, 0],
        "left": lambda b: b[:, 1],
        "area": lambda b: b[:, 2] * b[:, 3],
        "aspect": lambda b: b[:, 3] / b[:, 2],
    }.items():
        assert ks_2samp(pick(ours[:, :4]), pick(theirs)).pvalue > 1e-3, name
    assert abs(ours[:, 4].mean() - 0.5) < 0.05
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, 0] + ours[:, 2] <= size[0]).all()
    assert (ours[:, 1] + ours[:, 3] <= size[1]).all()


def test_a_crop_that_never_fits_is_the_largest_centred_one() -> None:
    config = AugmentationConfig(min_area=0.99, max_aspect=4 / 3, flip=False)
    assert {tuple(box) for box in boxes(config, 30, 400, 20)} == {(0, 180, 30, 40, 0)}
    assert {tuple(box) for box in boxes(config, 400, 30, 20)} == {(180, 0, 40, 30, 0)}


def test_squares_on_the_device_are_distributed_as_the_boxes() -> None:
    config = AugmentationConfig(min_area=0.5)
    assert config.on_device
    views = square_views(config, (0, 0), np.arange(3000)).astype(np.float64)
    side = views[:, 1, 1]
    centre = views[:, :, 2] / (1 - side)[:, None]
    found = boxes(config, 1000, 1000, 1500)
    edge = found[:, 2]
    place = 2 * found[:, :2] / (1000 - edge[:, None] + 1e-9) - 1
    assert ks_2samp(side, edge / 1000).pvalue > 1e-3
    assert ks_2samp(centre[:, 1], place[:, 0]).pvalue > 1e-3
    assert ks_2samp(centre[:, 0], place[:, 1]).pvalue > 1e-3
    assert abs((views[:, 0, 0] < 0).mean() - 0.5) < 0.03
    assert np.corrcoef(np.stack([side, *centre.T, views[:, 0, 0] < 0]))[
        ~np.eye(4, dtype=bool)
    ] == pytest.approx(0, abs=0.06)
    # Both ways cut the same part out of the same picture.
    ramp = torch.linspace(0, 255, 1000).view(1, 1, 1, -1).expand(2, 3, 8, -1)
    out = crop_squares(ramp, torch.tensor(views[:2], dtype=torch.float32), (4, 500))
    for row in range(2):
        low, high = out[row, 0, 0].min().item() / 255, out[row, 0, 0].max().item() / 255
        assert high - low == pytest.approx(side[row], abs=5e-3)
        assert low + high - 1 == pytest.approx(views[row, 0, 2], abs=5e-3)


def test_draws_depend_on_seed_epoch_and_row_only() -> None:
    config = AugmentationConfig(min_area=0.6)
    rows = np.arange(50)
    first = square_views(config, (1, 2), rows)
    assert np.array_equal(square_views(config, (1, 2), rows[::-1]), first[::-1])
    for other in ((1, 3), (2, 2)):
        assert not np.isclose(square_views(config, other, rows), first).all(axis=(1, 2)).any()
    plain = square_views(AugmentationConfig(min_area=1.0, flip=False), (1, 2), rows)
    assert np.array_equal(plain, np.tile(np.eye(3, dtype=np.float32)[:2], (50, 1, 1)))


def test_a_view_is_torchvisions_crop_of_the_decoded_image() -> None:
    random = np.random.default_rng(0)
    stream = io.BytesIO()
    Image.fromarray(random.integers(0, 256, (90, 120, 3), dtype=np.uint8)).save(stream, "JPEG")
    data, spec = stream.getvalue(), PixelSpec((32, 32), MEAN, MEAN)
    whole = load_pixels(data, PixelSpec((90, 120), MEAN, MEAN))[0]
    box = (7, 11, 60, 45)
    expected = v2.functional.resized_crop(
        whole, *box, [32, 32], v2.InterpolationMode.BICUBIC, antialias=True
    )
    for flip, wanted in ((False, expected), (True, expected.flip(-1))):
        view = load_view(data, spec, "fast", lambda h, w, flip=flip: (box, flip))
        assert torch.equal(view, wanted)
    plain = load_view(data, spec, "fast", lambda h, w: (None, False))
    assert torch.equal(plain, load_pixels(data, spec)[0])
    scaled = load_view(data, PixelSpec((11, 11), MEAN, MEAN), "scaled", lambda h, w: (box, False))
    assert scaled.shape == (3, 11, 11)


def test_colours_are_torchvisions_and_leave_the_generator_alone() -> None:
    config = AugmentationConfig(brightness=0.5, hue=0.1, policy="trivial", erasing=1.0)
    assert config.colours
    assert not config.on_device
    pixels = torch.randint(0, 256, (3, 40, 40), dtype=torch.uint8)
    torch.manual_seed(7)
    expected_next = torch.rand(3)
    torch.manual_seed(7)
    variation = Variation(config, MEAN)
    one, same, other = (variation.vary_colours((0, 0, row), pixels) for row in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected_next)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    grey = torch.tensor([round(255 * m) for m in MEAN], dtype=torch.uint8)[:, None, None]
    assert (one == grey).all(0).sum() >= 0.02 * 1600  # the erased rectangle
    assert not AugmentationConfig().colours
    assert Variation(AugmentationConfig(), MEAN).vary_colours((0, 0, 1), pixels) is pixels


def test_areas_out_of_order_are_one_line() -> None:
    with pytest.raises(ValueError, match=r"min_area is 0\.8, more than max_area 0\.5"):
        AugmentationConfig(min_area=0.8, max_area=0.5)
