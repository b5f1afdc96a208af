"""What every model file must hold: the tensors that its configuration asks for, in the right shapes.

Owns the messages. Knows no file format.
"""

from pathlib import Path

from miniphi.checkpoint.mapped_file import quoted
from miniphi.checkpoint.names import num_expected_tensors
from miniphi.config import ModelConfig
from miniphi.errors import CheckpointError

__all__ = ["check_count", "check_names", "check_shape", "check_token_id"]


def check_count(config: ModelConfig, num_found: int, path: Path) -> None:
    """Refuse an absurd number of layers before listing what they need."""
    num_expected = num_expected_tensors(config)
    if num_expected > num_found:
        raise CheckpointError(
            f"{path}: {config.num_hidden_layers} layers need {num_expected} tensors, found {num_found}; the file is "
            "not complete, or its configuration is not its own"
        )


def check_names(surplus: list[str], missing: list[str], path: Path) -> None:
    """Refuse missing and surplus tensors, naming the first of each."""
    if missing:
        raise CheckpointError(f"{path}: {quoted(min(missing))} is missing ({len(missing)} in all)")
    if surplus:
        raise CheckpointError(
            f"{path}: {quoted(min(surplus))} is not part of the model that the configuration describes ({len(surplus)} "
            "such tensors in all)"
        )


def check_shape(name: str, found: tuple[int, ...], expected: tuple[int, ...], path: Path) -> None:
    """Refuse a tensor whose shape the configuration contradicts."""
    if found != expected:
        raise CheckpointError(
            f"{path}: {quoted(name)} has shape {list(found)}, the configuration says {list(expected)}"
        )


def check_token_id(value: object, key: str, config: ModelConfig, path: Path) -> int:
    """Return `value` if it is a token id of the model."""
    if type(value) is not int or not 0 <= value < config.vocab_size:
        raise CheckpointError(f"{path}: {key} is {quoted(value)}, expected a token id below {config.vocab_size}")
    return value
