from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miniphi.cli import options
from miniphi.config import ModelConfig
from miniphi.errors import CapacityError, ContextLengthError, InvalidRequestError
from miniphi.kernels import CacheType, cache_block_bytes
from miniphi.models import KV_TYPES, KVType, find_entry, format_bytes, kv_bytes_per_token, plan_memory

PHI3 = find_entry("phi-3-mini-128k-instruct").model_config()
PHI4 = find_entry("phi-4-mini-instruct").model_config()
SMOL = find_entry("smollm2-135m-instruct").model_config()
GIB = 1 << 30


def test_kv_bytes_per_token() -> None:
    assert kv_bytes_per_token(PHI3, "f32") == 786_432
    assert kv_bytes_per_token(PHI3, "f16") == 393_216
    assert kv_bytes_per_token(PHI3, "q8") == 32 * 32 * (2 * 96 + 3 * 2 + 2)
    assert kv_bytes_per_token(PHI3, "q4") == 32 * 32 * (60 + 48 + 3 * 2 + 2)
    assert kv_bytes_per_token(PHI4, "f16") == 131_072
    with pytest.raises(InvalidRequestError, match=r"kv_type 'q5' is unknown; expected one of f32, f16, q8, q4"):
        kv_bytes_per_token(PHI3, "q5")  # type: ignore[arg-type]


@pytest.mark.parametrize("kv_type", KV_TYPES)
@pytest.mark.parametrize("config", [PHI3, PHI4, SMOL, replace(SMOL, head_dim=80)], ids=["phi3", "phi4", "smol", "80"])
def test_the_plan_counts_what_the_kernels_take(config: ModelConfig, kv_type: KVType) -> None:
    layers, heads, dim = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
    block = cache_block_bytes(layers, heads, dim, CacheType.parse(kv_type))
    assert 32 * kv_bytes_per_token(config, kv_type) == block
    assert options.KV_TYPES == KV_TYPES


def test_a_full_context_of_phi_3_needs_48_gib_of_cache() -> None:
    plan = plan_memory(PHI3, context=131_072, bits_per_weight=16, available_bytes=64 * GIB)
    assert plan.kv_bytes == 48 * GIB
    assert plan.weights_bytes == 2 * 3_821_079_552
    # 512 tokens x (2 x 3072 + 4 x 3072 + 3 x 8192) numbers, and one row of logits, of 4 bytes each.
    assert plan.activation_bytes == 4 * (512 * 43_008 + 32_064)
    assert plan.total_bytes == plan.weights_bytes + plan.kv_bytes + plan.activation_bytes + plan.runtime_bytes
    assert plan.fits
    assert plan.largest_context == 131_072
    plan.require_fit()


def test_a_plan_that_does_not_fit_says_what_does() -> None:
    plan = plan_memory(PHI3, context=131_072, kv_type="f16", bits_per_weight=4.5, available_bytes=8 * GIB)
    assert not plan.fits
    fixed = plan.total_bytes - plan.kv_bytes
    assert plan.largest_context == (8 * GIB - fixed) // 393_216 // 32 * 32
    assert plan_memory(PHI3, context=plan.largest_context, bits_per_weight=4.5, available_bytes=8 * GIB).fits
    assert not plan_memory(PHI3, context=plan.largest_context + 1, bits_per_weight=4.5, available_bytes=8 * GIB).fits
    with pytest.raises(CapacityError) as caught:
        plan.require_fit()
    message = str(caught.value)
    assert "131,072 tokens needs 50.2 GiB and 8.00 GiB is available, 42.2 GiB too little" in message
    assert f"the largest context that fits is {plan.largest_context:,} tokens" in message


def test_weights_that_do_not_fit_leave_no_context() -> None:
    plan = plan_memory(PHI3, context=1, weight_bytes=8 * GIB, available_bytes=4 * GIB)
    assert plan.largest_context == 0
    assert not plan.fits
    assert "not even the shortest context fits" in plan.explain()[-1]


@given(
    context=st.integers(1, 131_072),
    sequences=st.integers(1, 64),
    kv_type=st.sampled_from(["f32", "f16", "q8", "q4"]),
    available=st.integers(0, 200 * GIB),
)
def test_fits_exactly_up_to_the_largest_context(context: int, sequences: int, kv_type: str, available: int) -> None:
    plan = plan_memory(
        PHI4,
        context=context,
        kv_type=kv_type,  # type: ignore[arg-type]
        weight_bytes=2 * GIB,
        sequences=sequences,
        available_bytes=available,
    )
    assert plan.fits == (context <= plan.largest_context)
    assert plan.kv_bytes % (sequences * 32 * plan.kv_bytes_per_token) == 0
    assert plan.kv_bytes >= sequences * context * plan.kv_bytes_per_token
    assert plan.fits == (plan.total_bytes <= available)


def test_explain_and_json_carry_the_numbers() -> None:
    plan = plan_memory(SMOL, context=8192, kv_type="q8", weight_bytes=98_362_432, sequences=4, available_bytes=4 * GIB)
    lines = plan.explain()
    assert lines[0].split() == ["weights", "93.8", "MiB"]
    assert "8,192 tokens x 4 sequences (q8, 11.8 KiB per token)" in lines[1]
    assert lines[-1].startswith("fits: a context of 8,192 tokens leaves ")
    data = plan.to_dict()
    assert data["kv_bytes"] == 4 * 8192 * 12_060
    assert data["fits"] is True
    assert set(data) >= {"weights_bytes", "activation_bytes", "total_bytes", "available_bytes", "largest_context"}


def test_the_machine_is_measured_when_nothing_is_said() -> None:
    plan = plan_memory(SMOL, context=1, weight_bytes=1)
    assert plan.available_bytes > 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"context": 131_073}, ContextLengthError, "131,073 tokens and the model attends over at most 131,072"),
        ({"context": 0}, InvalidRequestError, "context is 0"),
        ({"sequences": 0}, InvalidRequestError, "sequences is 0"),
        ({"kv_type": "q2"}, InvalidRequestError, "kv_type 'q2'"),
        ({"weight_bytes": 0}, InvalidRequestError, "weight_bytes is 0"),
        ({"bits_per_weight": 4}, InvalidRequestError, "either weight_bytes or bits_per_weight"),
        ({"weight_bytes": None}, InvalidRequestError, "either weight_bytes or bits_per_weight"),
        ({"weight_bytes": None, "bits_per_weight": -1.0}, InvalidRequestError, "bits_per_weight is -1.0"),
        ({"weight_bytes": None, "bits_per_weight": float("nan")}, InvalidRequestError, "bits_per_weight is nan"),
        ({"weight_bytes": None, "bits_per_weight": 65}, InvalidRequestError, "bits_per_weight is 65"),
    ],
)
def test_bad_values_name_their_field(options: dict[str, object], error: type[Exception], message: str) -> None:
    arguments = {"context": 4096, "weight_bytes": GIB, "available_bytes": GIB, **options}
    with pytest.raises(error, match=message):
        plan_memory(PHI3, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (393_216, "384 KiB"),
        (1_023_999, "1000 KiB"),
        (1_024_000, "0.98 MiB"),
        (3 * GIB // 2, "1.50 GiB"),
        (48 * GIB, "48.0 GiB"),
        (5000 << 40, "5000 TiB"),
    ],
)
def test_format_bytes(count: int, expected: str) -> None:
    assert format_bytes(count) == expected
