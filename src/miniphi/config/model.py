"""`ModelConfig`: every number that defines the model, and the checks that they fit each other."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from miniphi.config.fields import require_model_type
from miniphi.config.gguf import read_gguf
from miniphi.config.hugging_face import read_hf
from miniphi.config.rope import MAX_POSITIONS, RopeScaling, attention_factor, check_positive, check_size
from miniphi.errors import CheckpointError, UnsupportedModelError

# Upper bounds are far above every known model; they stop a corrupt file from asking for the whole machine.
_LIMITS = {
    "vocab_size": 1 << 22,
    "hidden_size": 1 << 17,
    "intermediate_size": 1 << 20,
    "num_hidden_layers": 1 << 11,
    "num_attention_heads": 1 << 11,
    "num_key_value_heads": 1 << 11,
    "head_dim": 1 << 11,
    "max_position_embeddings": MAX_POSITIONS,
}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Every number that defines the model, under Hugging Face's names.

    `sliding_window` w means that the query at position q sees the key at position k iff 0 <= q - k < w, that is w keys
    with itself; it is None when it can never act (w >= max_position_embeddings). Source: transformers 5.23, where eager
    and sdpa mask with `kv_idx > q_idx - sliding_window` (`masking_utils.sliding_window_overlay`) and flash attention
    gets `window_size=(w - 1, w - 1)`. Phi-3's remote code of 2024 gave it (w, w) and so saw one key more.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    partial_rotary_factor: float
    rope_scaling: RopeScaling | None
    sliding_window: int | None
    tie_word_embeddings: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None

    def __post_init__(self) -> None:
        require_model_type("model_type", self.model_type)
        for name, limit in _LIMITS.items():
            check_size(name, getattr(self, name), limit)
        if self.num_attention_heads % self.num_key_value_heads:
            raise CheckpointError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        check_positive("rms_norm_eps", self.rms_norm_eps)
        check_positive("rope_theta", self.rope_theta)
        if not 0 < self.partial_rotary_factor <= 1 or self.rotary_dim % 2 or self.rotary_dim < 2:
            raise CheckpointError(
                f"partial_rotary_factor {self.partial_rotary_factor} of head_dim {self.head_dim}: "
                "expected an even number of rotated values between 2 and head_dim"
            )
        self._check_attention()
        self._check_token_ids()

    def _check_attention(self) -> None:
        if self.sliding_window is not None:
            check_size("sliding_window", self.sliding_window, MAX_POSITIONS)
            if self.sliding_window >= self.max_position_embeddings:
                object.__setattr__(self, "sliding_window", None)
        for name in ("long_factor", "short_factor") if self.rope_scaling else ():
            length = len(getattr(self.rope_scaling, name))
            if length != self.rotary_dim // 2:
                raise CheckpointError(
                    f"rope_scaling.{name} has {length} numbers; expected rotary_dim / 2 = {self.rotary_dim // 2}"
                )

    def _check_token_ids(self) -> None:
        named = [("bos_token_id", self.bos_token_id), ("pad_token_id", self.pad_token_id)]
        for name, token_id in [*named, *(("eos_token_id", token_id) for token_id in self.eos_token_ids)]:
            if token_id is not None and not 0 <= token_id < self.vocab_size:
                raise CheckpointError(f"{name} is {token_id}; expected an id below vocab_size {self.vocab_size}")

    @property
    def rotary_dim(self) -> int:
        """Count the values of each head that RoPE rotates; the rest pass through."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def num_parameters(self) -> int:
        """Count the weights, tied embeddings once."""
        embedding = self.vocab_size * self.hidden_size
        q_rows, kv_rows = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        attention = self.hidden_size * (2 * q_rows + 2 * kv_rows)
        layer = attention + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size
        return embedding * (1 if self.tie_word_embeddings else 2) + self.num_hidden_layers * layer + self.hidden_size

    @property
    def kv_values_per_token(self) -> int:
        """Count the numbers that one token keeps in the KV cache, over all layers."""
        return 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], *, source: str = "config.json") -> "ModelConfig":
        """Read a parsed config.json, of old or new transformers.

        Raises: UnsupportedModelError for a key or value we do not implement; CheckpointError for one that is missing,
        of the wrong type, or contradicts another.
        """
        with _naming(source):
            return cls(**read_hf(config))

    @classmethod
    def from_gguf(
        cls,
        metadata: Mapping[str, object],
        *,
        long_factor: Iterable[float] | None = None,
        short_factor: Iterable[float] | None = None,
        tied: bool,
        source: str,
    ) -> "ModelConfig":
        """Read the metadata of a GGUF file.

        The factors are its `rope_factors_*` tensors; `tied` says that it has no output matrix.

        Raises: UnsupportedModelError for an architecture or key we do not implement; CheckpointError for one that is
        missing or of the wrong type.
        """
        with _naming(source):
            return cls(**read_gguf(metadata, long_factor, short_factor), tie_word_embeddings=tied)

    def to_hf(self) -> dict[str, Any]:
        """Write the config.json that `from_hf` and transformers read back to the same model."""
        config: dict[str, Any] = {
            "architectures": [{"phi3": "Phi3ForCausalLM", "llama": "LlamaForCausalLM"}[self.model_type]],
            "hidden_act": "silu",
        }
        for name in ("model_type", *_LIMITS, "rms_norm_eps", "rope_theta", "tie_word_embeddings"):
            config[name] = getattr(self, name)
        eos = self.eos_token_ids[0] if len(self.eos_token_ids) == 1 else list(self.eos_token_ids) or None
        config |= {"bos_token_id": self.bos_token_id, "eos_token_id": eos, "pad_token_id": self.pad_token_id}
        config["rope_scaling"] = None
        if self.model_type == "phi3":
            config["sliding_window"] = self.sliding_window
        if self.partial_rotary_factor != 1.0:
            config["partial_rotary_factor"] = self.partial_rotary_factor
        if (rope := self.rope_scaling) is not None:
            original = rope.original_max_position_embeddings
            scaling: dict[str, Any] = {"type": "longrope", "rope_type": "longrope"}
            scaling |= {"long_factor": list(rope.long_factor), "short_factor": list(rope.short_factor)}
            if rope.attention_factor != attention_factor(self.max_position_embeddings / original, original):
                scaling["attention_factor"] = rope.attention_factor
            config |= {"original_max_position_embeddings": original, "rope_scaling": scaling}
        return config


@contextmanager
def _naming(source: str) -> Iterator[None]:
    """Put the file's name before the message of an error."""
    try:
        yield
    except (CheckpointError, UnsupportedModelError) as error:
        raise type(error)(f"{source}: {error}") from None
