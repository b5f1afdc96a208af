from pathlib import Path

import pytest

from benchmarks.limits import Demand, Limits, decode_demand, gguf_weight_bytes, prefill_demand
from miniphi.checkpoint import open_checkpoint, write_synthetic_gguf
from miniphi.models import find_entry
from tests.checkpoint.tiny_models import tiny_config

PHI3 = find_entry("phi-3-mini-128k-instruct").model_config()
MACHINE = Limits(int8_ops_per_s=900e9, read_bytes_per_s=30e9)


def test_the_slower_of_reading_and_computing_sets_the_time() -> None:
    reads = Demand(num_tokens=8, num_bytes=60e9, num_ops=9e9)
    computes = Demand(num_tokens=8, num_bytes=3e9, num_ops=3600e9)
    assert reads.seconds(MACHINE) == pytest.approx(2.0)
    assert computes.seconds(MACHINE) == pytest.approx(4.0)
    assert reads.tokens_per_s(MACHINE) == pytest.approx(4.0)
    assert reads.ops_per_s(4.0) == pytest.approx(4.5e9)
    assert reads.intensity == pytest.approx(0.15)


def test_decode_reads_the_weights_once_and_every_cache() -> None:
    config = tiny_config("llama")  # 2 layers of 64 x 96, 4 heads and 2 kv heads of 16, 300 words or so
    one = decode_demand(config, weight_bytes=1000, kv_value_bytes=2, depth=10)
    eight = decode_demand(config, weight_bytes=1000, kv_value_bytes=2, depth=10, streams=8)
    cache = 2 * 2 * (2 * 16) * 10 * 2
    assert one.num_bytes == 1000 + cache
    assert eight.num_bytes == 1000 + 8 * cache
    layer = 64 * (64 + 2 * 32) + 64 * 64 + 3 * 64 * 96
    products = 2 * (2 * layer + config.vocab_size * 64)
    assert one.num_ops == products + 2 * (2 * 2) * 64 * 10
    assert eight.num_ops == 8 * one.num_ops
    assert (one.num_tokens, eight.num_tokens) == (1, 8)


def test_a_prompt_attends_to_half_of_itself_and_needs_one_row_of_logits() -> None:
    config = tiny_config("llama")
    short = prefill_demand(config, weight_bytes=1000, num_tokens=100)
    long = prefill_demand(config, weight_bytes=1000, num_tokens=200)
    head = 2 * config.vocab_size * 64
    layers = 2 * 2 * (64 * (64 + 2 * 32) + 64 * 64 + 3 * 64 * 96)
    assert short.num_bytes == long.num_bytes == 1000
    assert short.num_ops == head + 100 * (layers + 4 * 2 * 64 * 50)
    assert long.num_ops == head + 200 * (layers + 4 * 2 * 64 * 100)


def test_the_38b_shape_has_the_known_limits() -> None:
    """Known: 7.25 Gop a token in the layers, 196,608 cached values, 6.1 tokens/s at 16,384 in int8 and 33 GB/s."""
    prompt = prefill_demand(PHI3, weight_bytes=2.2e9, num_tokens=1)
    assert prompt.num_ops == pytest.approx(7.25e9 + 2 * 32064 * 3072, rel=1e-3)
    deep = decode_demand(PHI3, weight_bytes=2.14e9, kv_value_bytes=1 + 4 / 96, depth=16384)
    slow = Limits(int8_ops_per_s=935e9, read_bytes_per_s=33e9)
    assert deep.tokens_per_s(slow) == pytest.approx(6.1, rel=0.03)


@pytest.mark.parametrize("tied", [False, True])
def test_an_embedding_table_of_its_own_is_not_read(tied: bool, tmp_path: Path) -> None:
    config = tiny_config("llama", tie_word_embeddings=tied)
    path = tmp_path / "model.gguf"
    write_synthetic_gguf(path, config, scheme="q4")
    with open_checkpoint(path) as checkpoint:
        table = checkpoint.tensors["model.embed_tokens.weight"].num_bytes
        assert table == config.vocab_size * 64 * 34 // 32
        assert gguf_weight_bytes(checkpoint) == checkpoint.num_bytes - (0 if tied else table)
