import gguf
import numpy as np
import pytest
from gguf.quants import dequantize as gguf_dequantize
from gguf.quants import quantize as gguf_quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from miniphi.checkpoint import Format, dequantize, quantize_rows
from miniphi.checkpoint.codebook import _PEAK_LEVELS, Codebook
from miniphi.checkpoint.formats import LEVELS
from miniphi.errors import CheckpointError

FORMATS = [Format.Q8_0, Format.Q4_0, Format.Q4_1, Format.IQ4_NL, Format.NL4]
TABLES = [Format.Q4_0, Format.IQ4_NL, Format.NL4]


def relative(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.linalg.norm((x - y).astype(np.float64)) / np.linalg.norm(x.astype(np.float64)))


def weights(kind: str) -> np.ndarray:
    rng = np.random.default_rng(3)
    if kind == "normal":
        return rng.standard_normal((64, 512)).astype(np.float32)
    return rng.standard_t(3, (64, 512)).astype(np.float32)


@pytest.mark.parametrize("kind", ["normal", "heavy tails"])
@pytest.mark.parametrize("fmt", [Format.Q8_0, Format.Q4_0, Format.Q4_1])
def test_error_is_reported_and_less_than_that_of_the_plain_method(fmt: Format, kind: str) -> None:
    x = weights(kind)
    raw, error = quantize_rows(x, fmt)
    ours = dequantize(raw, fmt)
    np.testing.assert_array_equal(ours, gguf_dequantize(raw, gguf.GGMLQuantizationType(fmt.ggml_type)))
    assert error.relative == pytest.approx(relative(x, ours), rel=1e-5)
    assert error.max_absolute == pytest.approx(float(np.abs(x - ours).max()), rel=1e-6)
    kind_id = gguf.GGMLQuantizationType(fmt.ggml_type)
    plain = relative(x, gguf_dequantize(gguf_quantize(x, kind_id), kind_id))
    assert error.relative < 0.98 * plain


def scalar_block(x: list[float], weight: list[float], levels: tuple[int, ...], tries: tuple[float, ...]) -> np.ndarray:
    """The search for a scale and the rounding of one block, one number at a time in float64."""

    def nearest(ratio: float) -> int:
        return max(range(16), key=lambda code: (-abs(ratio - levels[code]), code))

    peak = max(x, key=lambda value: (abs(value), -value))
    gains = []
    for level in tries:
        v = [levels[nearest(value * level / peak)] for value in x]
        xv = sum(w * a * b for w, a, b in zip(weight, x, v, strict=True))
        vv = sum(w * b * b for w, b in zip(weight, v, strict=True))
        gains.append((xv * xv / vv, xv / vv))
    scale = float(np.float16(max(gains)[1]))
    return np.array([scale * levels[nearest(value / scale)] for value in x], np.float32)


@pytest.mark.parametrize("fmt", TABLES)
def test_tables_agree_with_a_scalar_search(fmt: Format) -> None:
    rng = np.random.default_rng(8)
    x = rng.standard_t(4, (3, 2 * fmt.block_size)).astype(np.float32)
    importance = rng.uniform(0.1, 3, x.shape[1]).astype(np.float32)
    values = dequantize(quantize_rows(x, fmt, importance=importance)[0], fmt).reshape(-1, fmt.block_size)
    weight = np.tile(importance, 3).reshape(-1, fmt.block_size)
    for found, block, weights_of_block in zip(values, x.reshape(values.shape), weight, strict=True):
        expected = scalar_block(block.tolist(), weights_of_block.tolist(), LEVELS[fmt], _PEAK_LEVELS[fmt])
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("fmt", TABLES)
def test_every_ratio_gets_its_nearest_level(fmt: Format) -> None:
    book = Codebook(fmt)
    ratio = np.arange(-300, 300, 1 / 64, dtype=np.float32)
    distance = np.abs(ratio[:, None] - book.levels)
    np.testing.assert_array_equal(np.abs(ratio - book.nearest_levels(ratio)), distance.min(axis=1))
    np.testing.assert_array_equal(book.levels[book.nearest_codes(ratio)], book.nearest_levels(ratio))


@pytest.mark.parametrize("kind", ["normal", "heavy tails"])
def test_formats_rank_as_documented(kind: str) -> None:
    error = {fmt: quantize_rows(weights(kind), fmt)[1].relative for fmt in TABLES}
    assert error[Format.IQ4_NL] < 0.93 * error[Format.Q4_0]
    assert error[Format.NL4] < 1.02 * error[Format.Q4_0]  # at 4.25 bits instead of 4.5


@pytest.mark.parametrize("fmt", FORMATS)
def test_what_is_on_the_grid_stays_there(fmt: Format) -> None:
    rng = np.random.default_rng(0)
    levels = np.array({Format.Q8_0: range(-127, 128), Format.Q4_1: range(16), **LEVELS}[fmt], np.float32)
    q = rng.choice(levels, (8, 64))
    q[:, ::32] = levels[0]  # both ends are used, so that the grid is the only one that fits
    q[:, 1::32] = levels[-1]
    x = q * np.float32(0.125)
    raw, error = quantize_rows(x, fmt)
    np.testing.assert_array_equal(dequantize(raw, fmt), x)
    assert error.relative == 0


@pytest.mark.parametrize("fmt", FORMATS)
def test_zeros_and_constants(fmt: Format) -> None:
    x = np.zeros((2, 64), dtype=np.float32)
    x[1] = 0.5
    raw, error = quantize_rows(x, fmt)
    values = dequantize(raw, fmt)
    assert not values[0].any()
    np.testing.assert_allclose(values[1], 0.5, rtol=2e-3)
    assert error.relative < 2e-3


@pytest.mark.parametrize("fmt", [Format.Q8_0, *TABLES])
def test_importance_moves_the_error_to_columns_that_matter_less(fmt: Format) -> None:
    x = weights("normal")
    importance = np.ones(512, dtype=np.float32)
    importance[::4] = 100
    plain = dequantize(quantize_rows(x, fmt)[0], fmt)
    weighted = dequantize(quantize_rows(x, fmt, importance=importance)[0], fmt)
    matters = importance > 1
    assert relative(x[:, matters], weighted[:, matters]) < 0.98 * relative(x[:, matters], plain[:, matters])
    assert relative(x[:, ~matters], weighted[:, ~matters]) > relative(x[:, ~matters], plain[:, ~matters])


def test_q8_0_never_uses_minus_128() -> None:
    raw, _ = quantize_rows(weights("heavy tails"), Format.Q8_0)
    assert raw.reshape(-1, 34)[:, 2:].view(np.int8).min() == -127


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e6])
@pytest.mark.parametrize("fmt", FORMATS)
def test_values_that_cannot_be_held_are_refused(fmt: Format, bad: float) -> None:
    x = np.ones((1, 64), dtype=np.float32)
    x[0, 40] = bad
    with pytest.raises(CheckpointError, match="holds finite values below 65504"):
        quantize_rows(x, fmt)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 32 columns, found 33"):
        quantize_rows(np.ones((1, 33), dtype=np.float32), Format.Q4_0)
    with pytest.raises(ValueError, match="found Q6_K"):
        quantize_rows(np.ones((1, 256), dtype=np.float32), Format.Q6_K)
    with pytest.raises(CheckpointError, match="expected 32 positive numbers"):
        quantize_rows(np.ones((1, 32), np.float32), Format.Q4_0, importance=np.zeros(32, np.float32))


@settings(max_examples=60, deadline=None)
@given(
    x=hnp.arrays(np.float32, (2, 64), elements=st.floats(-60000, 60000, width=32)),
    fmt=st.sampled_from(FORMATS),
)
def test_error_is_bounded_by_half_a_step_of_the_plain_scale(x: np.ndarray, fmt: Format) -> None:
    raw, error = quantize_rows(x, fmt)
    values = dequantize(raw, fmt)
    assert np.isfinite(values).all()
    # Peak over half the widest distance of two levels, where the peak is put on the outermost one.
    steps = {Format.Q8_0: 127, Format.Q4_0: 8, Format.Q4_1: 7.5, Format.IQ4_NL: 127 / 12, Format.NL4: 127 / 15}[fmt]
    peak = np.abs(x).max(axis=1, keepdims=True)
    # Half a step for each of the 64 values, doubled for the clipped end of Q4_0, and the rounding of the float16
    # scale, which matters for values near its least number only.
    bound = 64**0.5 * (peak / steps + peak * 2**-10 + 128 * 2.0**-24)
    assert (np.linalg.norm(values - x, axis=1, keepdims=True) <= bound).all()
    assert error.max_absolute == pytest.approx(float(np.abs(values - x).max()), rel=1e-5, abs=1e-7)
