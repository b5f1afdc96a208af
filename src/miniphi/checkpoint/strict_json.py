"""JSON from files that nobody vouches for: bounded size and depth, no duplicate keys, no NaN.

Owns parsing only; what the keys mean is the caller's business.
"""

import json
from pathlib import Path
from typing import NoReturn

from miniphi.checkpoint.mapped_file import MappedFile, quoted
from miniphi.errors import CheckpointError

__all__ = ["parse_json_object", "read_json_object"]

MAX_JSON_BYTES = 64 << 20  # the largest tokenizer.json in use is about 35 MB


def _reject_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _unique_pairs(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {quoted(key)} appears twice")
            seen.add(key)
    return result


def parse_json_object(text: bytes, *, source: str) -> dict[str, object]:
    """Parse UTF-8 JSON whose top level is an object. Raises CheckpointError naming `source`."""
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_unique_pairs, parse_constant=_reject_constant)
    except RecursionError:
        raise CheckpointError(f"{source}: the JSON is nested too deeply to be genuine") from None
    except ValueError as error:
        raise CheckpointError(f"{source}: is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{source}: expected a JSON object, found {type(value).__name__}")
    return value


def read_json_object(path: Path, *, max_bytes: int = MAX_JSON_BYTES) -> dict[str, object]:
    """Read and parse a JSON file whose top level is an object. Raises CheckpointError naming the file."""
    file = MappedFile(path)
    try:
        if file.size > max_bytes:
            raise CheckpointError(f"{path}: has {file.size} bytes of JSON, expected at most {max_bytes}")
        return parse_json_object(file.data.tobytes(), source=str(path))
    finally:
        file.close()
