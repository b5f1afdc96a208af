"""Every kernel on every instruction set that this machine runs, against NumPy.

The bound is relative to a naive computation in the same precision: `naive` has an error against float64, and a kernel
may have twice that (plus one rounding of the result).
"""

import numpy as np
import pytest
from numpy.typing import NDArray

from miniphi.checkpoint.formats import Format
from miniphi.errors import InvalidRequestError
from miniphi.kernels import (
    CacheType,
    Kind,
    Meter,
    Packer,
    _native,
    available_isas,
    cache_block_bytes,
    default_num_threads,
    matmul,
    reference,
    selected_isa,
)
from tests.kernels.stored_weights import random_rows

ISAS = available_isas()
EPSILON = np.finfo(np.float32).eps


def check(result: NDArray[np.float32], naive: NDArray[np.float32], exact: NDArray[np.float64]) -> None:
    scale = np.abs(exact).max()
    error, allowed = np.abs(result - exact).max() / scale, np.abs(naive - exact).max() / scale
    assert error <= 2 * allowed + EPSILON


def naive_matmul(x: NDArray[np.float32], weight: NDArray[np.float32]) -> NDArray[np.float32]:
    """One float32 sum after the other, as a plain loop would."""
    total = np.zeros((len(x), len(weight)), np.float32)
    for k in range(x.shape[1]):
        total += x[:, k : k + 1] * weight[:, k]
    return total


@pytest.mark.parametrize("fmt", Format, ids=lambda fmt: fmt.name)
def test_packing_loses_nothing(fmt: Format) -> None:
    for rows, depth in ((1, 256), (32, 512), (75, 768)):
        raw, values = random_rows(fmt, rows, depth, seed=rows)
        np.testing.assert_array_equal(Packer(2).pack(Kind[fmt.name], raw, depth).unpack(), values)


def test_packing_follows_the_row_order() -> None:
    raw, values = random_rows(Format.Q4_1, 70, 64)
    order = np.random.default_rng(0).permutation(70).astype(np.int32)
    np.testing.assert_array_equal(Packer().pack(Kind.Q4_1, raw, 64, order).unpack(), values[order])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("fmt", Format, ids=lambda fmt: fmt.name)
def test_matmul(fmt: Format, isa: str) -> None:
    kind, depth = Kind[fmt.name], 768
    raw, values = random_rows(fmt, 75, depth)  # the last block is not full
    matrix = Packer(2).pack(kind, raw, depth)
    rng = np.random.default_rng(1)
    for rows in (1, 2, 3, 4, 5, 6, 7, 8, 9, 17, 50):
        x = rng.standard_normal((rows, depth)).astype(np.float32)
        inputs = x.astype(np.float64)
        if kind.is_quantized:  # the rounding of activations is part of the format; see the next test for its size
            codes, scale = reference.quantize_rows(x, kind.activation_group)
            inputs = codes * np.repeat(scale.astype(np.float64), kind.activation_group, axis=-1)
        exact = inputs @ values.T.astype(np.float64)
        result = matmul([matrix], x, isa=isa)
        check(result, naive_matmul(inputs.astype(np.float32), values), exact)
        np.testing.assert_allclose(reference.packed_matmul(x, matrix), exact, atol=1e-5 * np.abs(exact).max())


@pytest.mark.parametrize("isa", ISAS)
def test_int8_activations_cost_half_a_percent(isa: str) -> None:
    raw, values = random_rows(Format.Q8_0, 64, 1024)
    x = np.random.default_rng(2).standard_normal((40, 1024)).astype(np.float32)
    exact = x @ values.T
    error = matmul([Packer().pack(Kind.Q8_0, raw, 1024)], x, isa=isa) - exact
    assert 0.001 < np.linalg.norm(error) / np.linalg.norm(exact) < 0.006


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("fmt", Format, ids=lambda fmt: fmt.name)
def test_fine_activations_are_nearly_exact(fmt: Format, isa: str) -> None:
    raw, values = random_rows(fmt, 75, 768)
    matrix = Packer().pack(Kind[fmt.name], raw, 768)
    x = np.random.default_rng(2).standard_normal((11, 768)).astype(np.float32)
    exact = x.astype(np.float64) @ values.T.astype(np.float64)
    result = matmul([matrix], x, fine=True, isa=isa)
    assert np.linalg.norm(result - exact) < 4e-5 * np.linalg.norm(exact)
    np.testing.assert_allclose(reference.packed_matmul(x, matrix, fine=True), result, atol=1e-5 * np.abs(exact).max())
    np.testing.assert_array_equal(matmul([matrix], x[4:6], fine=True, isa=isa), result[4:6])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("fmt", Format, ids=lambda fmt: fmt.name)
def test_matmul_rows_and_threads_do_not_matter(fmt: Format, isa: str) -> None:
    raw, _ = random_rows(fmt, 100, 512)
    matrix = Packer().pack(Kind[fmt.name], raw, 512)
    x = np.random.default_rng(3).standard_normal((23, 512)).astype(np.float32)
    whole = matmul([matrix, matrix], x, isa=isa, num_threads=1)
    np.testing.assert_array_equal(matmul([matrix, matrix], x, isa=isa, num_threads=3), whole)
    for start, stop in ((0, 1), (5, 7), (3, 11), (22, 23)):
        np.testing.assert_array_equal(matmul([matrix, matrix], x[start:stop], isa=isa), whole[start:stop])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("fmt", [Format.Q4_0, Format.NL4], ids=lambda fmt: fmt.name)
def test_extreme_activations(fmt: Format, isa: str) -> None:
    raw, values = random_rows(fmt, 32, 64)
    x = np.zeros((3, 64), np.float32)
    x[1, 5], x[2] = 3e30, 1e-20
    result = matmul([Packer().pack(Kind[fmt.name], raw, 64)], x, isa=isa)
    np.testing.assert_array_equal(result[0], 0)
    np.testing.assert_allclose(result[1], x[1, 5] * values[:, 5], rtol=1e-5)
    np.testing.assert_allclose(result[2], x[2] @ values.T, rtol=1e-4)


@pytest.mark.parametrize("isa", ISAS)
def test_a_wide_group_far_below_its_row(isa: str) -> None:
    """Its scale is the row's times a power of two, so that it keeps its precision; weights of zero stay next to it."""
    raw, values = random_rows(Format.NL4, 40, 192)
    raw[3] = 0
    values[3] = 0
    x = np.random.default_rng(4).standard_normal((9, 192)).astype(np.float32)
    x[:, :64], x[:, 64:128] = 1e6 * x[:, :64], 0
    whole = matmul([Packer().pack(Kind.NL4, raw, 192)], x, isa=isa)
    x[:, :64] = 0
    result = matmul([Packer().pack(Kind.NL4, raw, 192)], x, isa=isa)
    exact = x @ values.T
    assert np.linalg.norm(result - exact) < 0.01 * np.linalg.norm(exact)
    assert np.abs(np.stack([whole, result])[..., 3]).max() < 1e-20


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("width", [16, 36, 192, 576, 3072])
def test_rms_norm(isa: str, width: int) -> None:
    rng = np.random.default_rng(width)
    x, weight = rng.standard_normal((5, width)).astype(np.float32), rng.standard_normal(width).astype(np.float32)
    wide = x.astype(np.float64)
    exact = wide / np.sqrt((wide**2).mean(axis=-1, keepdims=True) + 1e-5) * weight
    check(_native.rms_norm(isa, x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5), exact)


@pytest.mark.parametrize("isa", ISAS)
def test_silu_mul(isa: str) -> None:
    gate = np.concatenate([np.linspace(-100, 100, 1001), [0, -88, -1e4, 1e4, 1e-30]]).astype(np.float32)
    x = np.concatenate([gate, np.linspace(-2, 2, len(gate))]).astype(np.float32)[None]
    wide = gate.astype(np.float64)
    exact = x[:, len(gate) :] * wide / (1 + np.exp(-np.clip(wide, -700, None)))
    result = _native.silu_mul(isa, x)
    assert np.isfinite(result).all()
    np.testing.assert_allclose(result, exact, rtol=1e-6, atol=1e-30)


HEADS = {
    "3-mini": {"num_heads": 2, "num_kv_heads": 2, "head_dim": 96, "rotary_dim": 96, "window": 0},
    "4-mini": {"num_heads": 6, "num_kv_heads": 2, "head_dim": 128, "rotary_dim": 96, "window": 0},
    "SmolLM2": {"num_heads": 9, "num_kv_heads": 3, "head_dim": 64, "rotary_dim": 64, "window": 0},
    "odd, windowed": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 80, "rotary_dim": 32, "window": 70},
    "many to one": {"num_heads": 64, "num_kv_heads": 1, "head_dim": 16, "rotary_dim": 16, "window": 300},
}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("cache_type", CacheType, ids=lambda t: t.name)
@pytest.mark.parametrize("shape", HEADS)
def test_attention(shape: str, cache_type: CacheType, isa: str) -> None:
    heads = HEADS[shape] | {"num_layers": 1}
    tokens, dim, half = 330, heads["head_dim"], heads["rotary_dim"] // 2
    rng = np.random.default_rng(4)
    qkv = rng.standard_normal((tokens, (heads["num_heads"] + 2 * heads["num_kv_heads"]) * dim)).astype(np.float32)
    angles = rng.uniform(0, 6, (tokens, half)).astype(np.float32)
    cos, sin = np.cos(angles), np.sin(angles)
    split = qkv.reshape(tokens, -1, dim)
    num_heads, end = heads["num_heads"], heads["num_heads"] + heads["num_kv_heads"]
    query, key = reference.rotate(split[:, :num_heads], cos, sin), reference.rotate(split[:, num_heads:end], cos, sin)
    arguments = (
        reference.round_queries(query, cache_type),
        reference.round_keys(key, cache_type),
        reference.round_values(split[:, end:], cache_type),
    )
    positions, window = np.arange(tokens, dtype=np.int32), heads["window"] or None
    naive = reference.attention(*arguments, positions, window).reshape(tokens, -1)
    exact = reference.attention(*(a.astype(np.float64) for a in arguments), positions, window).reshape(tokens, -1)
    whole = _native.attention(isa, 2, heads, int(cache_type), qkv, cos, sin, 256)
    if cache_type is CacheType.F32:
        check(whole, naive, exact)
    else:  # a rotation that differs in its last bit may round a key to the neighbouring code
        assert np.abs(whole - exact).max() < 0.02 * np.abs(exact).max()
        assert np.linalg.norm(whole - exact) < 1e-3 * np.linalg.norm(exact)
    for chunk in (1, 100, 330):
        np.testing.assert_array_equal(_native.attention(isa, 3, heads, int(cache_type), qkv, cos, sin, chunk), whole)


def test_values_beyond_half_precision_saturate() -> None:
    heads = {"num_layers": 1, "num_heads": 1, "num_kv_heads": 1, "head_dim": 16, "rotary_dim": 16, "window": 0}
    qkv = np.full((2, 48), 1e6, np.float32)
    flat = np.zeros((2, 8), np.float32)
    for isa in ISAS:
        result = _native.attention(isa, 1, heads, int(CacheType.F16), qkv, flat + 1, flat, 2)
        np.testing.assert_array_equal(result, 65504)


def test_isa_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    for isa in ISAS:
        monkeypatch.setenv("MINIPHI_ISA", isa)
        assert selected_isa() == isa
    monkeypatch.setenv("MINIPHI_ISA", "z80")
    with pytest.raises(InvalidRequestError, match=r"'z80' is not available here.*portable"):
        selected_isa()
    monkeypatch.delenv("MINIPHI_ISA")
    assert selected_isa() == ISAS[0]


def test_machine_limits_are_measured() -> None:
    meter = Meter(num_threads=1, bytes_per_thread=1 << 24)
    for limits in (meter.measure(), meter.measure()):
        assert (limits.isa, limits.num_threads) == (ISAS[0], 1)
        assert 1e9 < limits.int8_ops_per_s < 1e14
        assert 1e8 < limits.read_bytes_per_s < 1e13
    assert default_num_threads() >= 1


def test_cache_block_bytes() -> None:
    per_block = 32 * 32 * 2 * 32 * 96  # tokens x layers x (k, v) x heads x dim of Phi-3-mini
    assert cache_block_bytes(32, 32, 96, CacheType.F16) == 2 * per_block
    assert cache_block_bytes(32, 32, 96, CacheType.F32) == 4 * per_block
    assert cache_block_bytes(32, 32, 96, CacheType.Q8) == per_block + 4 * per_block // 96


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((int(Kind.Q4_0), np.zeros((4, 17), np.uint8), 32, None), "have 17 bytes, expected 18"),
        ((int(Kind.Q4_K), np.zeros((4, 144), np.uint8), 128, None), "not whole blocks of 256"),
        ((99, np.zeros((4, 4), np.uint8), 1, None), "format 99 is unknown"),
        ((int(Kind.F32), np.zeros((2, 4), np.uint8), 1, np.array([0, 2], np.int32)), "out of range"),
    ],
)
def test_the_door_checks_shapes(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _native.Packer(1).pack(*arguments)
