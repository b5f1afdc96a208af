"""Memory planning: what a model needs at a given context, and whether this machine has it.

Owns the arithmetic, before anything is loaded. Does not know files, kernels or the engine; the sizes of the cache's
formats are those of the kernels and are stated here once more so that planning needs no native code.
"""

from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any, Literal

from miniphi.config import ModelConfig
from miniphi.errors import CapacityError, ContextLengthError, InvalidRequestError
from miniphi.models.machine import machine_memory
from miniphi.models.sizes import format_bytes

__all__ = [
    "KV_TYPES",
    "KVType",
    "MemoryPlan",
    "kv_bytes_per_token",
    "plan_memory",
]

KVType = Literal["f32", "f16", "q8", "q4"]

KV_TYPES: tuple[KVType, ...] = ("f32", "f16", "q8", "q4")

# The cache is handed out in blocks of this many tokens.
_KV_BLOCK_TOKENS = 32
# The most tokens that one step computes: a prompt is prefilled in chunks of this size.
_CHUNK_TOKENS = 512
_ACTIVATION_BYTES = 4
# Interpreter, NumPy, tokenizer with a vocabulary of 200,000 and the template engine: resident size on Linux x86-64.
_RUNTIME_BYTES = 96 << 20


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """What a run needs and what the machine has, in bytes; `largest_context` is in tokens and 0 if nothing fits."""

    context: int
    sequences: int
    kv_type: str
    kv_bytes_per_token: int
    weights_bytes: int
    kv_bytes: int
    activation_bytes: int
    runtime_bytes: int
    total_bytes: int
    available_bytes: int
    fits: bool
    largest_context: int

    def explain(self) -> tuple[str, ...]:
        """Return the plan as lines for people; the last one is the verdict."""
        kv_note = f"{self.kv_type}, {format_bytes(self.kv_bytes_per_token)} per token"
        tokens = f"{self.context:,} tokens" + (f" x {self.sequences} sequences" if self.sequences > 1 else "")
        return (
            f"weights      {format_bytes(self.weights_bytes):>10}",
            f"KV cache     {format_bytes(self.kv_bytes):>10}  {tokens} ({kv_note})",
            f"activations  {format_bytes(self.activation_bytes):>10}",
            f"runtime      {format_bytes(self.runtime_bytes):>10}",
            f"total        {format_bytes(self.total_bytes):>10}",
            f"available    {format_bytes(self.available_bytes):>10}",
            self.verdict,
        )

    @property
    def verdict(self) -> str:
        """One sentence: fits or not, with the numbers and what to do."""
        if self.fits:
            return f"fits: a context of {self.context:,} tokens leaves {format_bytes(self._spare_bytes)} free"
        missing = (
            f"does not fit: a context of {self.context:,} tokens needs {format_bytes(self.total_bytes)} "
            f"and {format_bytes(self.available_bytes)} is available, {format_bytes(-self._spare_bytes)} too little"
        )
        if self.largest_context:
            return f"{missing}; the largest context that fits is {self.largest_context:,} tokens"
        return f"{missing}; not even the shortest context fits: use a smaller quantisation or free memory"

    def require_fit(self) -> None:
        """Raise CapacityError with the verdict unless the plan fits."""
        if not self.fits:
            raise CapacityError(f"the model {self.verdict}")

    def to_dict(self) -> dict[str, Any]:
        """Return every field, ready for JSON."""
        return asdict(self)

    @property
    def _spare_bytes(self) -> int:
        return self.available_bytes - self.total_bytes


def kv_bytes_per_token(config: ModelConfig, kv_type: KVType) -> int:
    """Return the bytes that one token takes in the cache, over all layers, as csrc/kv_cache.h lays it out.

    Values, and quantised keys, are padded to groups of 32 numbers. A half-precision scale comes with every group of
    keys and with every head of values; `q4` has keys of 5 bits and values of 4.
    """
    groups = -(-config.head_dim // 32)
    if kv_type in ("f32", "f16"):
        head = (config.head_dim + 32 * groups) * (4 if kv_type == "f32" else 2)
    elif kv_type == "q8":
        head = 2 * 32 * groups + 2 * groups + 2
    elif kv_type == "q4":
        head = (20 + 16) * groups + 2 * groups + 2
    else:
        raise InvalidRequestError(f"kv_type {kv_type!r} is unknown; expected one of {', '.join(KV_TYPES)}")
    return config.num_hidden_layers * config.num_key_value_heads * head


def plan_memory(
    config: ModelConfig,
    *,
    context: int,
    kv_type: KVType = "f16",
    weight_bytes: int | None = None,
    bits_per_weight: float | None = None,
    sequences: int = 1,
    available_bytes: int | None = None,
) -> MemoryPlan:
    """Plan the memory of `sequences` sequences of `context` tokens each.

    The weights' size is given as `weight_bytes`, or as `bits_per_weight` over all parameters. `available_bytes` is
    what this process may still allocate; None measures this machine.

    Raises: ContextLengthError when the model cannot attend that far; InvalidRequestError for any other bad value.
    """
    _check(config, context, sequences)
    weights = _weights_bytes(config, weight_bytes, bits_per_weight)
    available = machine_memory().available_bytes if available_bytes is None else available_bytes
    per_token = kv_bytes_per_token(config, kv_type)
    kv = sequences * _in_blocks(context) * per_token
    activations = _activation_bytes(config, sequences)
    fixed = weights + activations + _RUNTIME_BYTES
    spare_tokens = max(0, available - fixed) // (sequences * per_token)
    return MemoryPlan(
        context=context,
        sequences=sequences,
        kv_type=kv_type,
        kv_bytes_per_token=per_token,
        weights_bytes=weights,
        kv_bytes=kv,
        activation_bytes=activations,
        runtime_bytes=_RUNTIME_BYTES,
        total_bytes=fixed + kv,
        available_bytes=available,
        fits=fixed + kv <= available,
        largest_context=min(config.max_position_embeddings, spare_tokens // _KV_BLOCK_TOKENS * _KV_BLOCK_TOKENS),
    )


def _check(config: ModelConfig, context: int, sequences: int) -> None:
    if context < 1:
        raise InvalidRequestError(f"context is {context}; it must be at least 1 token")
    if context > config.max_position_embeddings:
        raise ContextLengthError(
            f"context is {context:,} tokens and the model attends over at most {config.max_position_embeddings:,}: "
            f"ask for {config.max_position_embeddings:,} or less"
        )
    if sequences < 1:
        raise InvalidRequestError(f"sequences is {sequences}; it must be at least 1")


def _weights_bytes(config: ModelConfig, weight_bytes: int | None, bits_per_weight: float | None) -> int:
    if (weight_bytes is None) == (bits_per_weight is None):
        raise InvalidRequestError("give either weight_bytes or bits_per_weight")
    if weight_bytes is not None:
        if weight_bytes < 1:
            raise InvalidRequestError(f"weight_bytes is {weight_bytes}; it must be at least 1")
        return weight_bytes
    if bits_per_weight is None or not 0 < bits_per_weight <= 64:
        raise InvalidRequestError(f"bits_per_weight is {bits_per_weight}; it must be above 0 and at most 64")
    return -int(-config.num_parameters * Fraction(bits_per_weight) // 8)


def _activation_bytes(config: ModelConfig, sequences: int) -> int:
    """Return the bytes of one step's f32 arrays, all alive at once.

    Per token of a chunk: the residual and its norm (hidden each), q, k and v, the attention's output (heads x
    head_dim), gate and up (2 x intermediate) and their product (intermediate). Per sequence: one row of logits.
    """
    heads_width = config.num_attention_heads * config.head_dim
    kv_width = 2 * config.num_key_value_heads * config.head_dim
    width = 2 * config.hidden_size + 2 * heads_width + kv_width + 3 * config.intermediate_size
    return _ACTIVATION_BYTES * (_CHUNK_TOKENS * width + sequences * config.vocab_size)


def _in_blocks(tokens: int) -> int:
    return -(-tokens // _KV_BLOCK_TOKENS) * _KV_BLOCK_TOKENS
