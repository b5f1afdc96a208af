import struct

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize as gguf_dequantize

from miniphi.checkpoint import Format, dequantize
from miniphi.checkpoint.formats import LEVELS, format_from_ggml_type
from miniphi.checkpoint.stored import encode_floats

# Byte offsets of the float16 fields of a block.
SCALE_FIELDS = {
    Format.Q8_0: (0,),
    Format.Q4_0: (0,),
    Format.Q4_1: (0, 2),
    Format.Q5_0: (0,),
    Format.Q5_1: (0, 2),
    Format.Q4_K: (0, 2),
    Format.Q5_K: (0, 2),
    Format.Q6_K: (208,),
    Format.IQ4_NL: (0,),
    Format.NL4: (0,),
}
GGML_FORMATS = [fmt for fmt in Format if fmt.ggml_type is not None]


def random_raw(fmt: Format, num_rows: int, num_blocks: int, seed: int) -> np.ndarray:
    """Random bytes, with finite scales of both signs (and a subnormal one) where the format has scales."""
    rng = np.random.default_rng(seed)
    if fmt in (Format.F32, Format.F16, Format.BF16):
        return encode_floats(rng.standard_normal((num_rows, num_blocks)).astype(np.float32), fmt)
    raw = rng.integers(0, 256, (num_rows * num_blocks, fmt.block_bytes), dtype=np.uint8)
    for offset in SCALE_FIELDS[fmt]:
        scales = rng.normal(0, 0.02, num_rows * num_blocks).astype("<f2")
        scales[0] = 1e-7
        raw[:, offset : offset + 2] = scales.view(np.uint8).reshape(-1, 2)
    return raw.reshape(num_rows, -1)


@pytest.mark.parametrize("fmt", GGML_FORMATS)
def test_layout_is_that_of_ggml(fmt: Format) -> None:
    kind = gguf.GGMLQuantizationType(fmt.ggml_type)
    assert kind.name == fmt.name
    assert gguf.GGML_QUANT_SIZES[kind] == (fmt.block_size, fmt.block_bytes)
    assert fmt.bits_per_weight == 8 * fmt.block_bytes / fmt.block_size
    assert format_from_ggml_type(fmt.ggml_type) is fmt


@pytest.mark.parametrize("fmt", GGML_FORMATS)
@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (70, 33)])
def test_dequantize_is_bit_exact_with_gguf(fmt: Format, shape: tuple[int, int]) -> None:
    raw = random_raw(fmt, *shape, seed=fmt.ggml_type)
    values = dequantize(raw, fmt)
    expected = gguf_dequantize(raw, gguf.GGMLQuantizationType(fmt.ggml_type)).astype(np.float32)
    assert values.dtype == np.float32
    assert values.shape == (shape[0], shape[1] * fmt.block_size)
    np.testing.assert_array_equal(values.view(np.uint32), expected.reshape(values.shape).view(np.uint32))


def test_nl4_is_a_scale_and_two_halves_of_nibbles() -> None:
    assert (Format.NL4.block_size, Format.NL4.block_bytes, Format.NL4.bits_per_weight) == (64, 34, 4.25)
    raw = random_raw(Format.NL4, 3, 2, seed=5)
    expected = []
    for block in raw.reshape(-1, 34).tolist():
        (scale,) = struct.unpack("<e", bytes(block[:2]))
        codes = [byte & 15 for byte in block[2:]] + [byte >> 4 for byte in block[2:]]
        expected += [np.float32(scale) * np.float32(LEVELS[Format.NL4][code]) for code in codes]
    values = dequantize(raw, Format.NL4)
    np.testing.assert_array_equal(values, np.array(expected, np.float32).reshape(3, 128))


@pytest.mark.parametrize("fmt", list(LEVELS))
def test_levels_fit_int8_and_rise(fmt: Format) -> None:
    assert len(LEVELS[fmt]) == 16
    assert list(LEVELS[fmt]) == sorted(set(LEVELS[fmt]))
    assert -128 < min(LEVELS[fmt]) < 0 < max(LEVELS[fmt]) < 128


@pytest.mark.parametrize("fmt", [Format.F16, Format.Q4_0, Format.Q6_K, Format.NL4])
def test_chunks_and_row_order_do_not_change_values(fmt: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = random_raw(fmt, 37, 4, seed=1)
    order = np.random.default_rng(2).permutation(37).astype(np.int32)
    whole = dequantize(raw, fmt)
    monkeypatch.setattr("miniphi.checkpoint.formats._CHUNK_VALUES", 5 * whole.shape[1])
    np.testing.assert_array_equal(dequantize(raw, fmt), whole)
    np.testing.assert_array_equal(dequantize(raw, fmt, row_order=order), whole[order])


def test_infinite_scales_give_values_and_no_warning() -> None:
    raw = np.zeros((1, 34), dtype=np.uint8)
    raw[0, :2] = np.array([np.inf], dtype="<f2").view(np.uint8)
    raw[0, 2] = 1
    values = dequantize(raw, Format.Q8_0)
    assert values[0, 0] == np.inf
    assert np.isnan(values[0, 1])


def test_row_bytes_wants_whole_blocks() -> None:
    assert Format.Q4_K.row_bytes(512) == 288
    with pytest.raises(ValueError, match="Q4_K needs a multiple of 256 columns, found 300"):
        Format.Q4_K.row_bytes(300)


def test_bf16_rounds_as_torch_does() -> None:
    torch = pytest.importorskip("torch")
    bits = np.random.default_rng(0).integers(0, 1 << 32, 100_000, dtype=np.uint32)
    special = np.array([np.inf, -np.inf, np.nan, 0, -0.0, 3.4e38, 1 + 2**-8], dtype=np.float32)
    values = np.concatenate([bits, special.view(np.uint32)]).view(np.float32)
    ours = encode_floats(values.reshape(1, -1), Format.BF16).view("<u2")[0]
    theirs = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    number = ~np.isnan(values)
    np.testing.assert_array_equal(ours[number], theirs[number])
    assert np.isnan(dequantize(ours.view(np.uint8).reshape(1, -1), Format.BF16)[0][~number]).all()


def test_dequantize_does_not_need_much_more_than_its_result() -> None:
    import tracemalloc

    raw = np.zeros((4096, 1024 // 32 * 18), dtype=np.uint8)
    tracemalloc.start()
    values = dequantize(raw, Format.Q4_0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < values.nbytes + (8 << 20)
