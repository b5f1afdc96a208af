"""Typed reads from parsed metadata, which remember what was read so that the rest can be refused."""

from collections.abc import Mapping
from typing import Any

from miniphi.config.rope import LONGROPE_NAMES
from miniphi.errors import CheckpointError, UnsupportedModelError

MAX_FLOAT32 = (2 - 2**-23) * 2.0**127
_INTEGERS = range(-(2**63), 2**64)  # what a file can hold in 64 bits


class Fields:
    """Typed reads from a mapping that remember what was read, so that what was not can be refused.

    `prefix` is part of every key in the mapping; `label` only appears in messages. Callers add the file's name.
    """

    def __init__(self, values: Mapping[str, Any], *, prefix: str = "", label: str = "") -> None:
        self._values, self._prefix, self._label = values, prefix, label + prefix
        self._read: set[str] = set()

    def has(self, name: str) -> bool:
        """Tell whether the key is present and not null."""
        return self.value(name) is not None

    def value(self, name: str) -> Any:
        """Return the value as it is, None where absent."""
        self._read.add(self._prefix + name)
        return self._values.get(self._prefix + name)

    def integer(self, name: str, default: int | None = None) -> int:
        """Return an integer; without a default its absence is an error."""
        value = int(self._required(name, self._typed(name, "an integer", (int,)), default))
        if value not in _INTEGERS:
            raise CheckpointError(f"{self._label}{name} is {_shown(value)}; expected an integer of 64 bits")
        return value

    def size(self, name: str, default: int | None = None) -> int:
        """Return an integer of at least 1; without a default its absence is an error."""
        value = self.integer(name, default)
        if value < 1:
            raise CheckpointError(f"{self._label}{name} is {value}; expected an integer of at least 1")
        return value

    def optional_size(self, name: str) -> int | None:
        """Return an integer of at least 1, or None where the key is absent or null."""
        return self.size(name) if self.has(name) else None

    def optional_integer(self, name: str) -> int | None:
        """Return an integer, or None where the key is absent or null."""
        return self.integer(name) if self.has(name) else None

    def number(self, name: str, default: float | None = None) -> float:
        """Return a float that float32 can hold, too; without a default its absence is an error."""
        return self._float(name, self._required(name, self._typed(name, "a number", (int, float)), default))

    def optional_number(self, name: str) -> float | None:
        """Return a float, or None where the key is absent or null."""
        return self.number(name) if self.has(name) else None

    def boolean(self, name: str, default: bool) -> bool:
        """Return true or false, never a number that looks like one."""
        return bool(self._required(name, self._typed(name, "true or false", (bool,)), default))

    def integers(self, name: str) -> tuple[int, ...]:
        """Return one integer, a list of them, or nothing as a tuple."""
        value = self.value(name)
        values = value if isinstance(value, list | tuple) else [] if value is None else [value]
        if any(not isinstance(item, int) or isinstance(item, bool) for item in values):
            raise CheckpointError(f"{self._label}{name} is {_shown(value)}; expected integers")
        return tuple(values)

    def numbers(self, name: str) -> tuple[float, ...]:
        """Return a list of numbers; its absence is an error."""
        value = self._required(name, self._typed(name, "a list of numbers", (list, tuple)), None)
        if any(not isinstance(item, int | float) or isinstance(item, bool) for item in value):
            raise CheckpointError(f"{self._label}{name} is {_shown(value)}; expected a list of numbers")
        return tuple(self._float(f"{name}[{index}]", item) for index, item in enumerate(value))

    def block(self, name: str) -> Mapping[str, Any]:
        """Return a nested object, empty where the key is absent or null."""
        value: Mapping[str, Any] = self._required(name, self._typed(name, "an object or null", (Mapping,)), {})
        return value

    def require_fixed(self, fixed: Mapping[str, tuple[object, ...]]) -> None:
        """Raise unless each of these keys is absent or has one of its allowed values."""
        for name, allowed in fixed.items():
            if self._prefix + name in self._values and self.value(name) not in allowed:
                raise UnsupportedModelError(
                    f"{self._label}{name} is {_shown(self.value(name))}; only {allowed[0]!r} is supported"
                )

    def require_all_known(self, neutral: frozenset[str] = frozenset()) -> None:
        """Raise for every key that has a value and was neither read nor is neutral."""
        known = self._read | neutral
        unknown = sorted(key for key, value in self._values.items() if key not in known and value is not None)
        if unknown:
            names = ", ".join(self._label + key.removeprefix(self._prefix) for key in unknown)
            raise UnsupportedModelError(f"unknown keys {names}; they may change the model's maths, so it is not loaded")

    def _typed(self, name: str, expected: str, kinds: tuple[type, ...]) -> Any:
        value = self.value(name)
        if value is not None and (not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)):
            raise CheckpointError(f"{self._label}{name} is {_shown(value)}; expected {expected}")
        return value

    def _float(self, name: str, value: int | float) -> float:
        if not abs(value) <= MAX_FLOAT32:  # NaN compares false
            raise CheckpointError(
                f"{self._label}{name} is {_shown(value)}; expected a finite number that float32 holds"
            )
        return float(value)

    def _required(self, name: str, value: Any, default: Any) -> Any:
        if value is None and default is None:
            raise CheckpointError(f"{self._label}{name} is missing")
        return default if value is None else value


def require_model_type(key: str, value: object) -> str:
    """Return a supported model type, or name the ones there are."""
    if not isinstance(value, str) or value not in LONGROPE_NAMES:
        raise UnsupportedModelError(f"{key} is {_shown(value)}; supported are {', '.join(sorted(LONGROPE_NAMES))}")
    return value


def head_dim_of(hidden_size: int, heads: int) -> int:
    """Divide the hidden size among the heads, which is what files mean that give no head size."""
    if hidden_size < 1 or heads < 1 or hidden_size % heads:
        raise CheckpointError(f"hidden size {hidden_size} is not a multiple of the {heads} attention heads")
    return hidden_size // heads


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
