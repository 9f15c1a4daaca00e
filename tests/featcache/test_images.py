import io

import numpy as np
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from featcache.backbones.base import PixelSpec
from featcache.images import Views, crop_box, load_pixels, resized_size

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)


def spec_of(size=(64, 64), **options):
    return PixelSpec(size, MEAN, STD, **options)


def open_clip_transform(spec):
    return image_transform_v2(
        PreprocessCfg(
            size=spec.size,
            mean=spec.mean,
            std=spec.std,
            interpolation=spec.interpolation,
            resize_mode=spec.resize_mode,
            fill_color=spec.fill_color,
        ),
        is_train=False,
    )


def expected(data, spec):
    """open_clip's own pixels, back in steps of 0..255."""
    normalised = open_clip_transform(spec)(Image.open(io.BytesIO(data)))
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    return (normalised * std + mean) * 255


def encoded(image, kind="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def worst(data, spec, mode="fast"):
    pixels = load_pixels(data, spec, mode)
    assert pixels.shape == (1, 3, *spec.size)
    assert pixels.dtype == torch.uint8
    return float((pixels[0].float() - expected(data, spec)).abs().max())


@pytest.mark.parametrize("height_width", [(150, 200), (200, 150), (64, 64), (40, 30), (97, 301)])
@pytest.mark.parametrize("resize_mode", ["shortest", "squash", "longest"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_fast_is_within_one_step_of_open_clip(make_jpeg, height_width, resize_mode, interpolation):
    data = make_jpeg(*height_width, 3)
    spec = spec_of(resize_mode=resize_mode, interpolation=interpolation, fill_color=7)
    assert worst(data, spec) <= 1.001


@pytest.mark.parametrize("size", [(48, 64), (64, 48)])
@pytest.mark.parametrize("resize_mode", ["shortest", "squash", "longest"])
def test_targets_that_are_not_square(make_jpeg, size, resize_mode):
    spec = spec_of(size, resize_mode=resize_mode, interpolation="bilinear")
    assert worst(make_jpeg(150, 210, 4), spec) <= 1.001


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        ("RGB", "PNG"),
        ("L", "PNG"),
        ("P", "PNG"),
        ("1", "PNG"),
        ("LA", "PNG"),
        ("RGBA", "PNG"),
        ("I;16", "PNG"),
        ("RGB", "WEBP"),
        ("RGB", "BMP"),
        ("P", "GIF"),
        ("L", "JPEG"),
        ("CMYK", "JPEG"),
    ],
)
def test_every_kind_of_image_is_read_like_open_clip_reads_it(make_photo, mode, kind):
    photo = make_photo(120, 150, 5)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(photo.convert("L")).astype(np.uint16) * 256)
    elif mode == "RGBA":
        image = photo.copy()
        image.putalpha(make_photo(120, 150, 6).convert("L"))
    else:
        image = photo.convert(mode)
    options = {"lossless": True} if kind == "WEBP" else {}
    assert worst(encoded(image, kind, **options), spec_of()) <= 1.001


def test_reference_is_bit_faithful_to_open_clip(make_jpeg):
    data, spec = make_jpeg(150, 200, 7), spec_of()
    transform = open_clip_transform(spec)
    pixels = load_pixels(data, spec, "reference", transform=transform)
    assert torch.equal(pixels[0], transform(Image.open(io.BytesIO(data))))


def test_scaled_reads_big_photographs_at_a_fraction_and_small_ones_whole(make_jpeg, monkeypatch):
    sizes = []

    def spy(image, *args, **options):
        sizes.append(tuple(image.shape[-2:]))
        return torch.nn.functional.interpolate(image, *args, **options)

    monkeypatch.setattr("featcache.images.interpolate", spy)
    small, big, spec = make_jpeg(120, 130, 8), make_jpeg(520, 700, 8), spec_of()
    assert torch.equal(load_pixels(small, spec, "scaled"), load_pixels(small, spec, "fast"))
    sizes.clear()
    scaled, full = load_pixels(big, spec, "scaled"), load_pixels(big, spec, "fast")
    assert sizes == [(130, 175), (520, 700)]  # 130 >= 2 x 64, 65 would not be
    assert 0 < (scaled.float() - full.float()).abs().max() < 12


@pytest.mark.parametrize("mode", ["fast", "scaled", "reference"])
@pytest.mark.parametrize("kept", [0.3, 0.9])
def test_a_truncated_jpeg_is_unreadable_and_never_filled_with_grey(make_jpeg, mode, kept):
    data = make_jpeg(150, 200, 9)
    with pytest.raises(ValueError, match="truncated"):
        load_pixels(
            data[: int(len(data) * kept)],
            spec_of(),
            mode,
            transform=open_clip_transform(spec_of()),
        )


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"this is a text\n" * 40, "not an image"),
        (b"\xff\xd8\xff\xe0" + bytes(50), "."),
        (b"\x89PNG\r\n\x1a\n" + bytes(50), "."),
        (b"<html><body>404</body></html>", "not an image"),
    ],
)
@pytest.mark.parametrize("mode", ["fast", "reference"])
def test_what_is_no_image_is_a_reason_not_a_crash(data, reason, mode):
    with pytest.raises(ValueError, match=reason):
        load_pixels(data, spec_of(), mode, transform=open_clip_transform(spec_of()))


def test_a_truncated_png_is_unreadable(make_photo):
    data = encoded(make_photo(120, 150, 5))
    with pytest.raises(ValueError, match=r"."):
        load_pixels(data[: len(data) // 2], spec_of())


def test_decompression_bombs_are_refused_before_decoding(make_jpeg, make_photo, monkeypatch):
    monkeypatch.setattr("featcache.images.MAX_PIXELS", 10_000)
    for data in (make_jpeg(150, 200, 1), encoded(make_photo(150, 200, 1))):
        with pytest.raises(ValueError, match="200x150 pixels are more than the 10000 allowed"):
            load_pixels(data, spec_of())
    # A sliver: few pixels in the file, but its short side would be blown up to the target's.
    with pytest.raises(ValueError, match="more than the 10000 allowed"):
        load_pixels(make_jpeg(2, 1000, 1), spec_of())


def test_resized_size_follows_the_source_librarys_rounding():
    assert resized_size(375, 500, spec_of((224, 224))) == (224, 298)
    assert resized_size(500, 375, spec_of((224, 224))) == (298, 224)
    assert resized_size(100, 300, spec_of((224, 224), resize_mode="longest")) == (75, 224)
    assert resized_size(100, 300, spec_of((20, 30), resize_mode="squash")) == (20, 30)


@pytest.mark.parametrize("mode", ["fast", "scaled", "reference"])
def test_augmented_views_depend_on_row_and_seed_only(make_jpeg, mode):
    data, spec = make_jpeg(300, 400, 2), spec_of()
    transform = open_clip_transform(spec)

    def load(count, seed, row):
        views = Views(count, seed, 0.3)
        return load_pixels(data, spec, mode, views=views, row_id=row, transform=transform)

    four = load(4, 0, "a")
    plain = load_pixels(data, spec, mode, transform=transform)
    assert torch.equal(four[0], plain[0])
    assert torch.equal(load(2, 0, "a"), four[:2])  # more views do not move the earlier ones
    assert torch.equal(load(4, 0, "a"), four)
    for other in (load(4, 1, "a"), load(4, 0, "b")):
        assert torch.equal(other[0], four[0])
        assert not torch.equal(other[1:], four[1:])
    assert len({view.numpy().tobytes() for view in four}) == 4


def test_fast_views_are_what_pillow_would_crop_and_resize(make_jpeg):
    data, spec, views = make_jpeg(200, 260, 2), spec_of(), Views(6, 3, 0.4)
    pixels = load_pixels(data, spec, views=views, row_id="x")
    image = Image.open(io.BytesIO(data))
    flips = 0
    for view in range(1, 6):
        (top, left, height, width), flip = crop_box(200, 260, views, "x", view)
        box = (left, top, left + width, top + height)
        wanted = np.array(image.crop(box).resize((64, 64), Image.Resampling.BICUBIC)).astype(int)
        wanted = wanted[:, ::-1] if flip else wanted
        assert np.abs(pixels[view].permute(1, 2, 0).numpy() - wanted).max() <= 1
        flips += flip
    assert 0 < flips < 5


def test_crops_keep_the_share_of_the_area_that_was_asked_for():
    shares, flips = [], 0
    for row in range(400):
        (top, left, height, width), flip = crop_box(300, 400, Views(2, 0, 0.25), str(row), 1)
        assert 0 <= top <= 300 - height
        assert 0 <= left <= 400 - width
        assert 0.74 < width / height < 1.35 or (height, width) == (300, 400)
        shares.append(height * width / 120_000)
        flips += flip
    assert min(shares) < 0.3
    assert min(shares) > 0.24
    assert max(shares) > 0.9
    assert 150 < flips < 250
