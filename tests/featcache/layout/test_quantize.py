"""Int8 tokens: codes, scales, their error, and the array that reads them."""

import numpy as np
import pytest

from featcache.layout.quantize import as_stored, dequantize, measure, quantize, smallest_cosine


def tokens(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def by_hand(values):
    """Code by code, in plain Python."""
    codes = np.empty(values.shape, np.int8)
    scales = np.empty(values.shape[:-1], np.float32)
    for place in np.ndindex(values.shape[:-1]):
        scales[place] = max(abs(float(x)) for x in values[place]) / 127
        for i, x in enumerate(values[place]):
            codes[(*place, i)] = round(float(x) / float(scales[place])) if scales[place] else 0
    return codes, scales


@pytest.mark.parametrize("shape", [(3, 4, 5), (2, 3, 4, 5), (6, 7)])
def test_codes_and_scales_are_those_of_a_slow_loop(shape):
    values = tokens(*shape)
    values[0] *= 1000
    codes, scales = quantize(values)
    expected, expected_scales = by_hand(values)
    assert codes.dtype == np.int8
    assert scales.dtype == np.float32
    np.testing.assert_allclose(scales, expected_scales, rtol=1e-6)
    assert np.abs(codes.astype(int) - expected).max() <= 1  # a tie may fall to either side
    assert (codes != expected).mean() < 0.01
    assert np.abs(codes).max(axis=-1).min() == 127


def test_no_element_is_off_by_more_than_half_a_scale():
    values = tokens(50, 20, 64)
    codes, scales = quantize(values)
    found = dequantize(codes, scales)
    assert (np.abs(found - values) <= 0.5001 * scales[..., None]).all()
    out = np.empty_like(values)
    assert dequantize(codes, scales, out) is out
    np.testing.assert_array_equal(out, found)


def test_rows_do_not_depend_on_their_neighbours(monkeypatch):
    values = tokens(9, 4, 8)
    whole = quantize(values)
    monkeypatch.setattr("featcache.layout.quantize._BLOCK_VALUES", 64)
    for found, expected in zip(quantize(values), whole, strict=True):
        np.testing.assert_array_equal(found, expected)
    alone = quantize(values[4:5])
    np.testing.assert_array_equal(alone[0][0], whole[0][4])
    np.testing.assert_array_equal(dequantize(*whole)[4:5], dequantize(*alone))


def test_zeros_stay_zeros_and_bad_tokens_read_as_nan():
    values = tokens(6, 2, 4)
    values[0, 0] = 0
    values[1, 0] = 1e-42  # 127 / 1e-42 leaves float32
    values[2, 1, 3] = np.nan
    values[3, 0, 0] = np.inf
    values[4, 0] = 3e38
    codes, scales = quantize(values)
    found = dequantize(codes, scales)
    assert (found[0, 0] == 0).all()
    assert (np.abs(found[1, 0]) < 1e-40).all()
    np.testing.assert_allclose(found[4, 0], 3e38, rtol=1e-6)
    bad = np.isnan(scales)
    assert np.argwhere(bad).tolist() == [[2, 1], [3, 0]]
    assert np.isnan(found[bad]).all()
    assert (codes[bad] == 0).all()
    assert np.isfinite(found[~bad]).all()


def test_a_stored_form_stays_as_it_is():
    values = tokens(5, 3, 16)
    for dtype in ("int8", "float16", "float32"):
        once = as_stored(values, dtype)
        assert once.dtype == np.float32
        np.testing.assert_allclose(as_stored(once, dtype), once, rtol=1e-6)
    np.testing.assert_array_equal(as_stored(values, "float32"), values)
    np.testing.assert_array_equal(as_stored(values, "float16"), values.astype(np.float16))


def test_the_measured_error_is_the_error():
    values = tokens(8, 5, 32)
    values[0, 0, 0] = 60  # an outlier channel: the others of this token get few codes
    error = measure(values, "int8", finished_cosine=0.5)
    stored = as_stored(values, "int8").astype(np.float64)
    rms = np.sqrt(((stored - values) ** 2).mean()) / np.sqrt(
        (values.astype(np.float64) ** 2).mean()
    )
    assert error.relative_rms == pytest.approx(rms, rel=1e-5)
    cosines = [
        a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        for a, b in zip(
            stored.reshape(-1, 32), values.reshape(-1, 32).astype(np.float64), strict=True
        )
    ]
    assert error.min_cosine == pytest.approx(min(cosines), abs=1e-7)
    assert error.num_images == 8
    assert error.record()["finished_cosine"] == 0.5
    assert "int8 tokens of the first 8 images: relative RMS error" in str(error)
    assert measure(values, "float16").relative_rms < 0.1 * error.relative_rms
    assert "finished" not in str(measure(values, "float16"))


def test_cosines_of_zero_vectors_count_as_equal():
    assert smallest_cosine(np.zeros((2, 3)), np.zeros((2, 3))) == 1
    assert smallest_cosine(np.eye(3), -np.eye(3)) == -1
