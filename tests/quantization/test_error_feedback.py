import numpy as np
import pytest

from miniphi.checkpoint import Format, dequantize, quantize_rows
from miniphi.checkpoint.codebook import Codebook
from miniphi.errors import CheckpointError
from miniphi.quantization import Feedback, quantize_with_feedback

COLUMNS = 192


def activations(seed: int = 0, tokens: int = 3000) -> np.ndarray:
    """Correlated activations in which some columns are much larger than others; any seed, the same distribution."""
    mixing = np.random.default_rng(99).standard_normal((COLUMNS, COLUMNS)) / COLUMNS**0.5
    spread = np.exp(np.random.default_rng(98).normal(0, 1, COLUMNS))
    x = np.random.default_rng(seed).standard_normal((tokens, COLUMNS))
    return ((x + 2 * x @ mixing) * spread).astype(np.float32)


def weights(rows: int = 40) -> np.ndarray:
    return np.random.default_rng(5).standard_t(5, (rows, COLUMNS)).astype(np.float32)


def moment(x: np.ndarray) -> np.ndarray:
    return x.T @ x / np.float32(len(x))


def output_error(x: np.ndarray, w: np.ndarray, stored: np.ndarray) -> float:
    return float(np.linalg.norm(x @ (w - stored).T) / np.linalg.norm(x @ w.T))


def gptq(w: np.ndarray, h: np.ndarray, scales: np.ndarray, book: Codebook, order: np.ndarray) -> np.ndarray:
    """GPTQ as its paper has it: the inverse of H, and later columns corrected as soon as one is rounded; float64."""
    inverse = np.linalg.cholesky(np.linalg.inv(h[np.ix_(order, order)])).T
    left = w[:, order].astype(np.float64)
    stored = np.zeros_like(left)
    for k in range(len(order)):
        scale = scales[:, order[k] // book.format.block_size]
        codes = np.abs((left[:, k] / scale)[:, None] - book.levels).argmin(axis=1)
        stored[:, k] = book.levels[codes] * scale
        left[:, k:] -= np.outer((left[:, k] - stored[:, k]) / inverse[k, k], inverse[k, k:])
    result = np.empty_like(stored)
    result[:, order] = stored
    return result


@pytest.mark.parametrize("fmt", [Format.Q4_0, Format.IQ4_NL, Format.NL4])
def test_feedback_is_gptq(fmt: Format) -> None:
    w, h = weights(), moment(activations())
    feedback = Feedback(h, fmt, shrinkage=0.1)
    raw, stored = quantize_with_feedback(w, feedback)
    np.testing.assert_array_equal(dequantize(raw, fmt), stored)
    shrunk = 0.9 * h.astype(np.float64)
    shrunk[np.diag_indices(COLUMNS)] = h.diagonal()
    scales = raw.reshape(len(w), -1, fmt.block_bytes)[..., :2].copy().view("<f2")[..., 0].astype(np.float64)
    expected = gptq(w, shrunk, scales, Codebook(fmt), feedback.columns)
    # Where a value lies half way between two levels, float32 and float64 may part, and what follows in the row with
    # them.
    same = np.isclose(stored, expected, rtol=1e-5, atol=1e-6).all(axis=1)
    assert same.mean() > 0.85


@pytest.mark.parametrize("fmt", [Format.Q4_0, Format.IQ4_NL, Format.NL4])
def test_products_are_closer_on_other_text_too(fmt: Format) -> None:
    w, x = weights(), activations()
    _, stored = quantize_with_feedback(w, Feedback(moment(x), fmt))
    plain = dequantize(quantize_rows(w, fmt)[0], fmt)
    weighted = dequantize(quantize_rows(w, fmt, importance=moment(x).diagonal())[0], fmt)
    other = activations(seed=1)
    assert output_error(other, w, stored) < 0.85 * output_error(other, w, weighted)
    assert output_error(other, w, weighted) < output_error(other, w, plain)


def test_rows_and_threads_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    w = weights(50)
    feedback = Feedback(moment(activations()), Format.NL4)
    raw, _ = quantize_with_feedback(w, feedback)
    threaded, _ = quantize_with_feedback(w, feedback, num_threads=3)
    np.testing.assert_array_equal(raw, threaded)


def test_columns_that_nothing_uses_are_no_obstacle() -> None:
    x = activations()
    x[:, 64:128] = 0
    w = weights()
    _, stored = quantize_with_feedback(w, Feedback(moment(x), Format.NL4))
    assert np.isfinite(stored).all()
    assert output_error(x, w, stored) < 0.1
    _, stored = quantize_with_feedback(w, Feedback(np.zeros((COLUMNS, COLUMNS), np.float32), Format.NL4))
    assert np.linalg.norm(stored - w) < 0.12 * np.linalg.norm(w)


def test_what_is_not_finite_is_refused() -> None:
    h = moment(activations())
    w = weights()
    w[3, 4] = np.nan
    with pytest.raises(CheckpointError, match="holds values that are not finite"):
        quantize_with_feedback(w, Feedback(h, Format.NL4))
    h[0, 0] = np.inf
    with pytest.raises(CheckpointError, match="activations of the calibration text are not finite"):
        Feedback(h, Format.NL4)
