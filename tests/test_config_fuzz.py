"""Whatever numbers a file holds, it is read or refused: no other error escapes."""

from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from miniphi.config import ModelConfig
from miniphi.errors import MiniphiError
from tests.config_files import longrope, read_gguf, small_gguf, small_hf

GGUF_KEYS = (
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "block_count",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "attention.sliding_window",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.attn_factor",
    "rope.scaling.original_context_length",
    "rope.scaling.type",
    "vocab_size",
)
HF_KEYS = ("head_dim", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings", "tie_word_embeddings")

WRONG_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 200),
    st.integers(),
    st.sampled_from([2**31, 2**63, 2**64, 10**400, -(10**400)]),
    st.floats(),
    st.sampled_from([1e300, -1e300, 3.402823466e38, 5e-324, 1e-45]),
    st.text(max_size=3),
    st.lists(st.integers(-1, 4), max_size=3),
)


def assert_reads_or_refuses(read: Callable[[], ModelConfig]) -> None:
    try:
        config = read()
    except MiniphiError:
        return
    assert ModelConfig.from_hf(config.to_hf()) == config


@settings(max_examples=500, deadline=None)
@given(
    arch=st.sampled_from(["phi3", "llama"]),
    changes=st.dictionaries(st.sampled_from(GGUF_KEYS), WRONG_VALUES, min_size=1, max_size=4),
    special=st.dictionaries(
        st.sampled_from([f"tokenizer.ggml.{name}" for name in ("tokens", "bos_token_id", "padding_token_id")]),
        WRONG_VALUES,
        max_size=1,
    ),
    factors=st.none() | st.lists(st.floats(width=32), min_size=8, max_size=8),
)
def test_gguf_metadata_is_read_or_refused(
    arch: str, changes: dict[str, Any], special: dict[str, Any], factors: list[float] | None
) -> None:
    metadata = small_gguf(arch, **changes) | special
    assert_reads_or_refuses(lambda: read_gguf(metadata, long_factor=factors, short_factor=factors, source="here.gguf"))


@settings(max_examples=500, deadline=None)
@given(
    changes=st.dictionaries(st.sampled_from([*small_hf(), *HF_KEYS]), WRONG_VALUES, min_size=1, max_size=4),
    scaling=st.dictionaries(st.sampled_from([*longrope(), "factor", "attention_factor"]), WRONG_VALUES, max_size=3),
)
def test_config_json_is_read_or_refused(changes: dict[str, Any], scaling: dict[str, Any]) -> None:
    config = small_hf(rope_scaling=longrope(**scaling), original_max_position_embeddings=512) | changes
    assert_reads_or_refuses(lambda: ModelConfig.from_hf(config, source="here.json"))


@settings(max_examples=500, deadline=None)
@given(st.floats(min_value=1e-37, max_value=3.4028234e38))
def test_gguf_numbers_keep_their_float32(value: float) -> None:
    config = read_gguf(small_gguf(**{"rope.freq_base": value}))

    assert np.float32(config.rope_theta) == np.float32(value)
    assert len(repr(config.rope_theta)) <= len(repr(float(np.float32(value))))
