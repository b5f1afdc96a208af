import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize as gguf_dequantize

from miniphi.checkpoint import Format, TensorSource, expected_shapes, open_checkpoint, write_gguf, write_synthetic_gguf
from miniphi.checkpoint.names import gguf_names, gguf_row_order
from miniphi.config import ModelConfig
from miniphi.errors import CheckpointError, UnsupportedModelError
from tests.checkpoint import gguf_files as g
from tests.checkpoint.test_formats import random_raw
from tests.checkpoint.tiny_models import longrope_config, random_tensors, tiny_config
from tests.shared_data import smollm2_gguf


def converter_permute(weights: np.ndarray, num_heads: int) -> np.ndarray:
    """Reorder rows as llama.cpp's converter does for q and k of llama models."""
    rows = weights.reshape(num_heads, 2, weights.shape[0] // num_heads // 2, *weights.shape[1:])
    return rows.swapaxes(1, 2).reshape(weights.shape)


def raw_gguf(path: Path, config: ModelConfig, tensors: dict[str, np.ndarray], **changes: Any) -> Path:
    """Write a F32 GGUF with the reference writer, from tensors by GGUF name in GGUF row order."""
    arch = config.model_type
    writer = gguf.GGUFWriter(path, arch)
    writer.add_uint32(f"{arch}.vocab_size", config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(changes.get("block_count", config.num_hidden_layers))
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.rotary_dim)
    for key, value in changes.get("fields", {}).items():
        writer.add_key_value(key, *value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_tensors(config: ModelConfig) -> dict[str, np.ndarray]:
    names = gguf_names(config)
    return {names[name]: tensor for name, tensor in random_tensors(config).items()}


@pytest.mark.parametrize(("num_heads", "head_dim"), [(1, 2), (4, 16), (3, 96)])
def test_row_order_undoes_the_converters_permutation(num_heads: int, head_dim: int) -> None:
    original = np.random.default_rng(0).standard_normal((num_heads * head_dim, 5))
    stored = converter_permute(original, num_heads)
    order = gguf_row_order(num_heads * head_dim, head_dim)
    assert order.dtype == np.int32
    np.testing.assert_array_equal(stored[order], original)
    assert head_dim == 2 or not np.array_equal(stored, original)


def test_llama_is_presented_in_hugging_face_order(tmp_path: Path) -> None:
    config = tiny_config()
    original = random_tensors(config)
    names = gguf_names(config)
    stored = {}
    for name, tensor in original.items():
        if "q_proj" in name:
            stored[names[name]] = converter_permute(tensor, 4)
        elif "k_proj" in name:
            stored[names[name]] = converter_permute(tensor, 2)
        else:
            stored[names[name]] = tensor
    with open_checkpoint(raw_gguf(tmp_path / "x.gguf", config, stored)) as checkpoint:
        assert list(checkpoint.tensors) == list(expected_shapes(config))
        for name, tensor in original.items():
            np.testing.assert_array_equal(checkpoint.tensors[name].to_float32(), tensor)
            rows = checkpoint.tensors[name].read_rows(3, 7) if tensor.ndim == 2 else None
            assert rows is None or np.array_equal(rows.view("<f4"), tensor[3:7])


@pytest.mark.parametrize("config", [tiny_config(tie_word_embeddings=True), tiny_config("phi3"), longrope_config()])
def test_our_files_give_everything_back(tmp_path: Path, config: ModelConfig) -> None:
    tensors = random_tensors(config)
    size = write_gguf(tmp_path / "x.gguf", config, tensors, num_threads=3)
    assert (tmp_path / "x.gguf").stat().st_size == size
    with open_checkpoint(tmp_path / "x.gguf") as checkpoint:
        assert expected_shapes(checkpoint.config) == expected_shapes(config)
        assert checkpoint.config.tie_word_embeddings == config.tie_word_embeddings
        assert checkpoint.config.max_position_embeddings == config.max_position_embeddings
        assert checkpoint.config.rms_norm_eps == pytest.approx(config.rms_norm_eps)
        assert checkpoint.config.rope_scaling == config.rope_scaling
        assert checkpoint.tokenizer_source is None
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(checkpoint.tensors[name].to_float32(), tensor)


def test_sliding_window_survives(tmp_path: Path) -> None:
    config = tiny_config("phi3", sliding_window=100)
    write_gguf(tmp_path / "x.gguf", config, random_tensors(config))
    with open_checkpoint(tmp_path / "x.gguf") as checkpoint:
        assert checkpoint.config.sliding_window == 100


@pytest.mark.parametrize("fmt", [fmt for fmt in Format if fmt.ggml_type is not None])
def test_every_format_reads_the_same_in_the_reference(tmp_path: Path, fmt: Format) -> None:
    config = tiny_config(hidden_size=256, intermediate_size=256, head_dim=64, num_hidden_layers=1)
    sources = {}
    for seed, (name, shape) in enumerate(expected_shapes(config).items()):
        if len(shape) == 1:
            sources[name] = TensorSource.from_floats(np.ones(shape, np.float32))
        else:
            raw = random_raw(fmt, shape[0], shape[1] // fmt.block_size, seed)
            sources[name] = TensorSource.from_bytes(raw, fmt, shape)
    write_gguf(tmp_path / "x.gguf", config, sources, num_threads=2)
    reference = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    with open_checkpoint(tmp_path / "x.gguf") as checkpoint:
        for name, gguf_name in gguf_names(config).items():
            tensor = reference[gguf_name]
            values = gguf_dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
            if heads := {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2]):
                values = values.reshape(heads, -1, 2, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
            ours = checkpoint.tensors[name].to_float32()
            np.testing.assert_array_equal(ours.reshape(values.shape), values)
            expected = sources[name].read_rows(0, sources[name].num_rows)
            np.testing.assert_array_equal(checkpoint.tensors[name].read_rows(0, len(expected)), expected)


def test_missing_surplus_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    config = tiny_config(num_hidden_layers=1)
    path = tmp_path / "x.gguf"
    tensors = gguf_tensors(config)

    def fails(
        match: str, changed: dict[str, np.ndarray], error: type[Exception] = CheckpointError, **more: Any
    ) -> None:
        raw_gguf(path, config, changed, **more)
        with pytest.raises(error, match=match):
            open_checkpoint(path)

    fails("1 layers need 12 tensors, found 11", {k: v for k, v in tensors.items() if "ffn_up" not in k})
    renamed = {k.replace("blk.0.ffn_up", "blk.0.ffn_upp"): v for k, v in tensors.items()}
    fails(r"'blk\.0\.ffn_up\.weight' is missing", renamed)
    fails(r"'blk\.7\.ffn_up\.weight' is not part", {**tensors, "blk.7.ffn_up.weight": np.zeros((2, 2), np.float32)})
    misshapen = {**tensors, "output_norm.weight": np.zeros(65, np.float32)}
    fails(r"'output_norm\.weight' has shape \[65\], the configuration says \[64\]", misshapen)
    freqs = {**tensors, "rope_freqs.weight": np.ones(8, np.float32)}
    fails("Llama 3 rope scaling is not supported", freqs, UnsupportedModelError)
    fails("1000 layers need 9003 tensors", tensors, block_count=1000)
    split = {"split.count": (3, gguf.GGUFValueType.UINT16)}
    fails("join the parts", tensors, UnsupportedModelError, fields=split)
    adapter = {"general.type": ("adapter", gguf.GGUFValueType.STRING)}
    fails("general.type is 'adapter'", tensors, UnsupportedModelError, fields=adapter)
    factors = {**tensors, "rope_factors_long.weight": np.ones((8, 2), np.float32)}
    fails("rope_factors_long", factors)


def test_llama_with_part_of_a_head_rotated_is_refused(tmp_path: Path) -> None:
    config = tiny_config(partial_rotary_factor=0.5)
    raw_gguf(tmp_path / "x.gguf", config, gguf_tensors(config))
    with pytest.raises(UnsupportedModelError, match="rotates 8 of 16"):
        open_checkpoint(tmp_path / "x.gguf")
    with pytest.raises(UnsupportedModelError, match="rotates 8 of 16"):
        write_gguf(tmp_path / "y.gguf", config, random_tensors(config))


def test_absurd_sizes_in_the_configuration_cost_nothing(tmp_path: Path) -> None:
    fields = [
        g.field("general.architecture", g.STRING, "llama"),
        *(
            g.field(f"llama.{key}", g.UINT32, 2000)
            for key in ("block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size")
        ),
        g.field("llama.attention.head_count", g.UINT32, 2),
        g.field("llama.attention.layer_norm_rms_epsilon", g.FLOAT32, 1e-5),
    ]
    path = g.write_gguf_bytes(tmp_path / "x.gguf", fields)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="2000 layers need 18002 tensors, found 0"):
        open_checkpoint(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_pages_can_be_released_and_read_again(tmp_path: Path) -> None:
    config = tiny_config()
    tensors = random_tensors(config)
    write_gguf(tmp_path / "x.gguf", config, tensors)
    checkpoint = open_checkpoint(tmp_path / "x.gguf")
    for name, tensor in checkpoint.tensors.items():
        tensor.release_pages()
        np.testing.assert_array_equal(tensor.to_float32(), tensors[name])
        assert not tensor.raw.flags.writeable
    kept = checkpoint.tensors["lm_head.weight"].raw
    checkpoint.close()
    np.testing.assert_array_equal(kept.view("<f4"), tensors["lm_head.weight"])


def resident_kb() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssFile")).split()[1])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_released_pages_leave_memory(tmp_path: Path) -> None:
    config = tiny_config(vocab_size=100_000, num_hidden_layers=1)
    write_synthetic_gguf(tmp_path / "x.gguf", config, scheme="q8")
    with open_checkpoint(tmp_path / "x.gguf") as checkpoint:
        tensor = checkpoint.tensors["lm_head.weight"]
        before = resident_kb()
        assert int(tensor.raw.sum(dtype=np.int64)) > 0
        assert resident_kb() > before + 0.8 * tensor.num_bytes / 1024
        tensor.release_pages()
        assert resident_kb() < before + 0.1 * tensor.num_bytes / 1024


def test_writing_needs_little_memory(tmp_path: Path) -> None:
    config = tiny_config(vocab_size=60_000, hidden_size=256, head_dim=64)
    tracemalloc.start()
    size = write_synthetic_gguf(tmp_path / "x.gguf", config, scheme="q8")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size > 30_000_000
    assert peak < 4_000_000


def test_synthetic_models_are_reproducible_and_sane(tmp_path: Path) -> None:
    config = longrope_config(hidden_size=128, head_dim=16, intermediate_size=128)
    write_synthetic_gguf(tmp_path / "a.gguf", config, scheme="q4", seed=1, name="same")
    write_synthetic_gguf(tmp_path / "b.gguf", config, scheme="q4", seed=1, name="same")
    write_synthetic_gguf(tmp_path / "c.gguf", config, scheme="q4", seed=2, name="same")
    content = {name: (tmp_path / f"{name}.gguf").read_bytes() for name in "abc"}
    assert content["a"] == content["b"] != content["c"]
    with open_checkpoint(tmp_path / "a.gguf") as checkpoint:
        down = checkpoint.tensors["model.layers.0.mlp.down_proj.weight"]
        assert down.format is Format.Q4_0
        assert checkpoint.tensors["lm_head.weight"].format is Format.Q8_0
        assert down.to_float32().std() == pytest.approx(128**-0.5, rel=0.05)
        head = checkpoint.tensors["lm_head.weight"]
        assert head.raw.reshape(-1, 34)[:, 2:].view(np.int8).min() == -127


def test_smollm2_is_dequantised_as_the_reference_does_it() -> None:
    path = smollm2_gguf()
    reference = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    with open_checkpoint(path) as checkpoint:
        names = gguf_names(checkpoint.config)
        assert len(checkpoint.tensors) == 272
        for name, stored in checkpoint.tensors.items():
            if ".layers." in name and int(name.split(".")[2]) not in (0, 29):
                continue
            tensor = reference[names[name]]
            values = gguf_dequantize(tensor.data, tensor.tensor_type)
            if heads := {"q_proj": 9, "k_proj": 3}.get(name.split(".")[-2]):
                values = values.reshape(heads, 32, 2, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
            np.testing.assert_array_equal(stored.to_float32().view(np.uint32), values.view(np.uint32))
