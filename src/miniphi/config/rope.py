"""LongRoPE's numbers and the checks they must pass. Knows nothing of where they were read."""

import math
from dataclasses import dataclass

from miniphi.errors import CheckpointError

MAX_POSITIONS = 1 << 25  # far above every known model

# The names of LongRoPE that each model type's files have used; Phi-3's first remote code also called it su and yarn.
LONGROPE_NAMES = {"phi3": ("longrope", "su", "yarn"), "llama": ("longrope",)}


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """LongRoPE: per-frequency divisors, one list up to `original_max_position_embeddings` tokens and one beyond.

    `attention_factor` multiplies cos and sin at every length.
    Source: LongRoPE (arXiv 2402.13753) as in transformers' `_compute_longrope_parameters`.
    """

    long_factor: tuple[float, ...]
    short_factor: tuple[float, ...]
    original_max_position_embeddings: int
    attention_factor: float

    def __post_init__(self) -> None:
        for name in ("long_factor", "short_factor"):
            for index, value in enumerate(getattr(self, name)):
                check_positive(f"rope_scaling.{name}[{index}]", value)
        check_size("original_max_position_embeddings", self.original_max_position_embeddings, MAX_POSITIONS)
        check_positive("attention_factor", self.attention_factor)


def attention_factor(scale: float, original: int) -> float:
    """Return sqrt(1 + ln(scale) / ln(original)), LongRoPE's correction of the logits for a longer context."""
    return 1.0 if scale <= 1 or original <= 1 else math.sqrt(1 + math.log(scale) / math.log(original))


def check_size(name: str, value: int, limit: int) -> None:
    """Raise CheckpointError unless 1 <= value <= limit."""
    if not 1 <= value <= limit:
        raise CheckpointError(f"{name} is {value}; expected an integer between 1 and {limit}")


def check_positive(name: str, value: float) -> None:
    """Raise CheckpointError unless the value is finite and above zero."""
    if not (math.isfinite(value) and value > 0):
        raise CheckpointError(f"{name} is {value}; expected a finite positive number")
