import json
import math
from typing import Any

import pytest

from miniphi.config import ModelConfig, RopeScaling
from miniphi.errors import CheckpointError, UnsupportedModelError
from tests.config_files import FACTORS, longrope, read_gguf, small_gguf, small_hf
from tests.shared_data import shared_path


class TestPublicModels:
    @pytest.fixture
    def configs(self) -> dict[str, dict[str, Any]]:
        path = shared_path(".").parent / "reference" / "phi_configs.json"
        if not path.exists():
            pytest.skip("phi_configs.json is not in the shared folder")
        loaded: dict[str, dict[str, Any]] = json.loads(path.read_text())
        return loaded

    @pytest.mark.parametrize(
        ("name", "numbers"),
        [
            ("phi-3-mini-128k-instruct", (3_821_079_552, 196_608, None, True)),
            ("phi-3-mini-128k-instruct@april-2024", (3_821_079_552, 196_608, None, True)),
            ("phi-3-mini-4k-instruct", (3_821_079_552, 196_608, 2047, False)),
            ("phi-3.5-mini-instruct", (3_821_079_552, 196_608, None, True)),
            ("phi-4-mini-instruct", (3_836_021_760, 65_536, None, True)),
        ],
    )
    def test_numbers(self, configs: dict[str, Any], name: str, numbers: tuple[object, ...]) -> None:
        config = ModelConfig.from_hf(configs[name])
        scaling = config.rope_scaling

        assert (
            config.num_parameters,
            config.kv_values_per_token,
            config.sliding_window,
            scaling is not None,
        ) == numbers
        assert config.rotary_dim == 96
        if scaling:
            assert scaling.attention_factor == pytest.approx(1.1902380714238083, rel=1e-15)
            assert list(scaling.long_factor) == configs[name]["rope_scaling"]["long_factor"]
        assert ModelConfig.from_hf(config.to_hf()) == config

    @pytest.mark.filterwarnings("default")
    def test_what_transformers_writes_is_the_same_model(self, configs: dict[str, Any]) -> None:
        transformers = pytest.importorskip("transformers")
        for name, published in configs.items():
            config = ModelConfig.from_hf(published)
            theirs = transformers.Phi3Config(**config.to_hf())
            assert ModelConfig.from_hf(theirs.to_dict()) == config, name
            assert ModelConfig.from_hf(theirs.to_diff_dict()) == config, name


def test_llama_round_trip_through_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    config = ModelConfig.from_hf(small_hf(model_type="llama", sliding_window="absent", head_dim=32, rope_theta=5e5))

    theirs = transformers.LlamaConfig(**config.to_hf())

    assert (theirs.head_dim, theirs.num_key_value_heads, theirs.rope_parameters["rope_theta"]) == (32, 2, 5e5)
    assert ModelConfig.from_hf(theirs.to_dict()) == config


def test_defaults_of_absent_keys() -> None:
    config = ModelConfig.from_hf(small_hf(num_key_value_heads="absent", bos_token_id=None, eos_token_id=7))

    assert (config.num_key_value_heads, config.head_dim, config.rope_theta) == (4, 16, 10000.0)
    assert (config.bos_token_id, config.eos_token_ids, config.tie_word_embeddings) == (None, (7,), False)


def test_parameters_of_a_tied_model_count_the_embedding_once() -> None:
    untied, tied = (ModelConfig.from_hf(small_hf(tie_word_embeddings=is_tied)) for is_tied in (False, True))

    assert untied.num_parameters - tied.num_parameters == 100 * 64
    assert tied.num_parameters == 100 * 64 + 2 * (64 * 96 * 3 + 64 * (64 + 32 + 32 + 64) + 2 * 64) + 64


@pytest.mark.parametrize(
    "type_key", [{"type": "longrope"}, {"rope_type": "longrope", "type": "absent"}, {"type": "su"}]
)
@pytest.mark.parametrize("is_inside", [True, False])
def test_every_spelling_of_longrope(type_key: dict[str, str], is_inside: bool) -> None:
    scaling = longrope(**type_key) | ({"original_max_position_embeddings": 512} if is_inside else {})
    outer = {} if is_inside else {"original_max_position_embeddings": 512}

    config = ModelConfig.from_hf(small_hf(rope_scaling=scaling, **outer))

    assert config.rope_scaling == RopeScaling(
        long_factor=FACTORS,
        short_factor=(1.0,) * 8,
        original_max_position_embeddings=512,
        attention_factor=math.sqrt(1 + math.log(8) / math.log(512)),
    )


def test_rope_parameters_of_new_transformers() -> None:
    inside = {"rope_theta": 2e4, "partial_rotary_factor": 0.5, "original_max_position_embeddings": 512}
    block = longrope(long_factor=[2.0] * 4, short_factor=[1.0] * 4, rope_type="longrope") | inside

    config = ModelConfig.from_hf(small_hf(rope_parameters=block))

    assert (config.rope_theta, config.rotary_dim) == (2e4, 8)
    assert config.rope_scaling is not None
    assert config.rope_scaling.long_factor == (2.0,) * 4


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"attention_factor": 1.5}, 1.5),
        ({"factor": 4.0}, math.sqrt(1 + math.log(4) / math.log(512))),
        ({"factor": 1.0}, 1.0),
    ],
)
def test_attention_factor_may_be_given(changes: dict[str, float], expected: float) -> None:
    scaling = longrope(original_max_position_embeddings=512, **changes)

    config = ModelConfig.from_hf(small_hf(rope_scaling=scaling))

    assert config.rope_scaling is not None
    assert config.rope_scaling.attention_factor == pytest.approx(expected, rel=1e-15)
    assert ModelConfig.from_hf(config.to_hf()) == config


@pytest.mark.parametrize(("window", "stored"), [(2047, 2047), (4095, 4095), (4096, None), (262144, None), (None, None)])
def test_a_window_that_cannot_act_is_none(window: int | None, stored: int | None) -> None:
    assert ModelConfig.from_hf(small_hf(sliding_window=window)).sliding_window == stored


@pytest.mark.filterwarnings("default")
def test_sliding_window_sees_as_many_keys_as_its_number() -> None:
    torch = pytest.importorskip("torch")
    masking = pytest.importorskip("transformers.masking_utils")
    see = masking.sliding_window_causal_mask_function(3)

    visible = [key for key in range(10) if bool(see(0, 0, torch.tensor(7), torch.tensor(key)))]

    assert visible == [5, 6, 7]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "gemma"}, "'gemma'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"residual_multiplier": 0.2}, "residual_multiplier"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
        ({"rope_scaling": longrope(short_mscale=1.2), "original_max_position_embeddings": 512}, "short_mscale"),
        ({"model_type": "llama", "sliding_window": 100}, "sliding_window"),
        ({"model_type": "llama", "sliding_window": "absent", "rope_scaling": longrope(type="yarn")}, "yarn"),
    ],
)
def test_what_is_not_supported_is_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"^here\.json: .*{named}"):
        ModelConfig.from_hf(small_hf(**changes), source="here.json")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_size": "absent"}, "hidden_size is missing"),
        ({"hidden_size": 66}, "not a multiple"),
        ({"hidden_size": 64.0}, "hidden_size is 64.0"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_attention_heads": 0}, "0 attention heads"),
        ({"vocab_size": 1 << 40}, "vocab_size"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
        ({"partial_rotary_factor": 0.2}, "partial_rotary_factor 0.2"),
        ({"partial_rotary_factor": math.nan}, "partial_rotary_factor is nan"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor 1.5"),
        ({"max_position_embeddings": 10**400}, "max_position_embeddings is 1000"),
        ({"rope_theta": 10**400}, "rope_theta is 1000"),
        ({"original_max_position_embeddings": 4096.5}, "original_max_position_embeddings is 4096.5"),
        ({"rms_norm_eps": math.inf}, "rms_norm_eps"),
        ({"rope_theta": -1.0}, "rope_theta"),
        ({"sliding_window": 0}, "sliding_window"),
        ({"eos_token_id": 100}, "eos_token_id is 100"),
        ({"eos_token_id": ["a"]}, "eos_token_id"),
        ({"rope_scaling": []}, "rope_scaling is"),
        ({"rope_scaling": longrope()}, "original_max_position_embeddings is missing"),
        (
            {"rope_scaling": longrope(long_factor="absent", original_max_position_embeddings=9)},
            "long_factor is missing",
        ),
        (
            {"rope_scaling": longrope(long_factor=[1.0], original_max_position_embeddings=9)},
            "long_factor has 1 numbers",
        ),
        ({"rope_scaling": longrope(short_factor=["1"] * 8, original_max_position_embeddings=9)}, "short_factor"),
        ({"rope_scaling": longrope(short_factor=[0.0] * 8, original_max_position_embeddings=9)}, r"short_factor\[0\]"),
        (
            {"rope_scaling": longrope(long_factor=[math.nan] * 8, original_max_position_embeddings=9)},
            r"long_factor\[0\]",
        ),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 2e4}}, "rope_theta is 10000.0 at the top level"),
        ({"rope_scaling": {"type": "default"}, "rope_parameters": {"rope_theta": 2e4}}, "disagree"),
    ],
)
def test_damaged_files_are_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=rf"^here\.json: .*{named}"):
        ModelConfig.from_hf(small_hf(**changes), source="here.json")


def test_padding_of_the_first_llamas() -> None:
    config = ModelConfig.from_hf(small_hf(model_type="llama", sliding_window="absent", pad_token_id=-1))

    assert config.pad_token_id is None


@pytest.mark.parametrize("arch", ["phi3", "llama"])
def test_gguf_is_the_same_model_as_its_config_json(arch: str) -> None:
    published = small_hf(model_type=arch, sliding_window="absent", pad_token_id="absent")

    assert read_gguf(small_gguf(arch)) == ModelConfig.from_hf(published)


def test_gguf_longrope_keeps_the_exact_attention_factor() -> None:
    factors = {"long_factor": FACTORS, "short_factor": [1.0] * 8}
    keys = {"rope.scaling.original_context_length": 512, "attention.sliding_window": 300}

    exact = math.sqrt(1 + math.log(8) / math.log(512))
    rounded = read_gguf(small_gguf(**keys, **{"rope.scaling.attn_factor": 1.1547005176544189}), **factors)
    absent = read_gguf(small_gguf(**keys), **factors)
    other = read_gguf(small_gguf(**keys, **{"rope.scaling.attn_factor": 1.25}), **factors)

    assert rounded == absent
    assert [config.rope_scaling and config.rope_scaling.attention_factor for config in (rounded, other)] == [
        exact,
        1.25,
    ]
    assert rounded.sliding_window == 300


def test_gguf_of_phi_3_4k_says_that_its_context_is_the_original_one() -> None:
    config = read_gguf(small_gguf(**{"rope.scaling.original_context_length": 4096}))

    assert config.rope_scaling is None


def test_gguf_partial_rotation_and_head_size() -> None:
    config = read_gguf(
        small_gguf(**{"rope.dimension_count": 24, "attention.key_length": 32, "attention.value_length": 32}), tied=True
    )

    assert (config.head_dim, config.rotary_dim, config.partial_rotary_factor) == (32, 24, 0.75)
    assert config.tie_word_embeddings


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rope.scaling.original_context_length": 512}, "no rope_factors tensors"),
        ({"attention.value_length": 8}, "phi3.attention.value_length"),
        ({"expert_count": 8}, "phi3.expert_count"),
        ({"rope.scaling.type": "linear"}, "phi3.rope.scaling.type"),
        ({"attention.clamp_kqv": 8.0}, "phi3.attention.clamp_kqv"),
        ({"arch": "llama", "attention.sliding_window": 100}, "llama.attention.sliding_window"),
    ],
)
def test_gguf_what_is_not_supported_is_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"^m\.gguf: .*{named}"):
        read_gguf(small_gguf(**changes))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"block_count": "absent"}, "phi3.block_count is missing"),
        ({"attention.head_count_kv": [2, 1]}, "phi3.attention.head_count_kv is"),
        ({"rope.scaling.original_context_length": 0}, "phi3.rope.scaling.original_context_length is 0"),
        ({"embedding_length": 0}, "phi3.embedding_length is 0"),
        ({"attention.head_count": -4}, "phi3.attention.head_count is -4"),
        ({"attention.head_count": [4, 4]}, r"phi3.attention.head_count is \[4, 4\]"),
        ({"attention.head_count_kv": True}, "phi3.attention.head_count_kv is True"),
        ({"attention.key_length": 0, "rope.dimension_count": 0}, "phi3.attention.key_length is 0"),
        ({"rope.dimension_count": 0}, "phi3.rope.dimension_count is 0"),
        ({"context_length": 10**400}, "phi3.context_length is 1000.*64 bits"),
        ({"attention.layer_norm_rms_epsilon": 1e300}, r"phi3.attention.layer_norm_rms_epsilon is 1e\+300"),
        ({"attention.layer_norm_rms_epsilon": 0.0}, "rms_norm_eps is 0.0"),
        ({"rope.freq_base": 1e300}, r"phi3.rope.freq_base is 1e\+300"),
        ({"rope.freq_base": 10**400}, "phi3.rope.freq_base is 1000"),
        ({"rope.freq_base": math.nan}, "phi3.rope.freq_base is nan"),
        ({"rope.scaling.attn_factor": -1e300}, r"phi3.rope.scaling.attn_factor is -1e\+300"),
        ({"rope.scaling.attn_factor": math.inf}, "phi3.rope.scaling.attn_factor is inf"),
    ],
)
def test_gguf_damage_is_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=rf"^m\.gguf: .*{named}"):
        read_gguf(small_gguf(**changes), long_factor=FACTORS, short_factor=FACTORS)


def test_gguf_of_another_architecture_is_named() -> None:
    with pytest.raises(UnsupportedModelError, match=r"general.architecture is 'qwen3'; supported are llama, phi3"):
        read_gguf(small_gguf("qwen3"))


def test_gguf_without_a_vocabulary_size() -> None:
    metadata = small_gguf()
    del metadata["tokenizer.ggml.tokens"]

    with pytest.raises(CheckpointError, match="vocab_size"):
        read_gguf(metadata)
    assert read_gguf(metadata | {"phi3.vocab_size": 50}).vocab_size == 50
