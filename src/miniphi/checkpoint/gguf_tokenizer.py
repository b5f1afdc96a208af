"""The tokenizer of a checkpoint as GGUF metadata.

Owns the translation of tokenizer.json (byte-level BPE, and SentencePiece-like BPE with byte fallback) into
`tokenizer.*` keys; from a GGUF source the keys are copied. Knows no text: it encodes nothing.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from miniphi.checkpoint.mapped_file import quoted
from miniphi.checkpoint.stored import Checkpoint
from miniphi.checkpoint.strict_json import read_json_object
from miniphi.config import ModelConfig
from miniphi.errors import CheckpointError, UnsupportedModelError

__all__ = ["tokenizer_metadata"]

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)  # enum llama_token_type
_ADDED_SCORE = -1000.0  # as llama.cpp's converter gives; added tokens are never merged, so it decides nothing
_UNUSED_SCORE = -10000.0
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")

# Regular expressions of byte-level pre-tokenizers. GGUF names a pre-tokenizer by its steps: all regular expressions
# in order, "digits" for a step that splits digits, "ignore_merges" if whole words in the vocabulary are not merged.
_GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CL100K_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_O200K_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PRE_TOKENIZERS: Mapping[tuple[str, ...], str] = {
    (_GPT2_PATTERN,): "gpt-2",
    ("digits", _GPT2_PATTERN): "smollm",
    (_CL100K_PATTERN,): "dbrx",
    ("ignore_merges", _CL100K_PATTERN): "llama-bpe",
    (_O200K_PATTERN,): "gpt-4o",
}

# GGUF key -> key of tokenizer_config.json, and the special tokens themselves.
_SPECIAL_TOKENS = {
    "bos_token_id": "bos_token",
    "eos_token_id": "eos_token",
    "unknown_token_id": "unk_token",
    "padding_token_id": "pad_token",
}


def tokenizer_metadata(checkpoint: Checkpoint) -> dict[str, object]:
    """Return the `tokenizer.*` metadata of a checkpoint; empty if it has no tokenizer.

    Raises CheckpointError or UnsupportedModelError naming the file and the key.
    """
    source = checkpoint.tokenizer_source
    if source is None:
        return {}
    if source[0] == "gguf":
        return {key: value for key, value in source[1].items() if key.startswith("tokenizer.")}
    metadata = _from_files(source[1], source[2], checkpoint.config)
    if checkpoint.chat_template is not None:
        metadata["tokenizer.chat_template"] = checkpoint.chat_template
    return metadata


def _from_files(path: Path, tokenizer_config: Mapping[str, object], config: ModelConfig) -> dict[str, object]:
    tokenizer = read_json_object(path)
    model = _object(tokenizer.get("model"), f"{path}: model")
    if model.get("type") != "BPE":
        raise UnsupportedModelError(
            f"{path}: model.type is {quoted(model.get('type'))}; only BPE can be written to GGUF"
        )
    tokens, types = _read_tokens(tokenizer, model, config, path)
    merges = _read_merges(model, path)
    metadata: dict[str, object] = {}
    if model.get("byte_fallback"):
        types = [_BYTE if _is_byte(text, kind) else kind for text, kind in zip(tokens, types, strict=True)]
        metadata["tokenizer.ggml.model"] = "llama"
        metadata["tokenizer.ggml.pre"] = "default"
        metadata["tokenizer.ggml.tokens"] = tokens
        metadata["tokenizer.ggml.scores"] = _scores(tokens, types, merges)
        metadata["tokenizer.ggml.token_type"] = types
        metadata["tokenizer.ggml.add_space_prefix"] = _adds_space_prefix(tokenizer, path)
    else:
        metadata["tokenizer.ggml.model"] = "gpt2"
        metadata["tokenizer.ggml.pre"] = _pre_tokenizer_name(tokenizer, model, path)
        metadata["tokenizer.ggml.tokens"] = tokens
        metadata["tokenizer.ggml.token_type"] = types
        metadata["tokenizer.ggml.merges"] = [f"{left} {right}" for left, right in merges]
        metadata["tokenizer.ggml.add_space_prefix"] = False
    metadata.update(_special_ids(tokens, tokenizer_config, config))
    metadata["tokenizer.ggml.add_bos_token"] = _adds_bos(tokenizer, tokenizer_config, metadata, tokens)
    metadata["tokenizer.ggml.add_eos_token"] = False
    return metadata


def _read_tokens(
    tokenizer: Mapping[str, object], model: Mapping[str, object], config: ModelConfig, path: Path
) -> tuple[list[str], list[int]]:
    """Return the text and type of every id below vocab_size; ids without a token are `[PADn]`, unused."""
    tokens = [f"[PAD{token_id}]" for token_id in range(config.vocab_size)]
    types = [_UNUSED] * config.vocab_size
    for text, token_id in _object(model.get("vocab"), f"{path}: model.vocab").items():
        index = _token_id(token_id, text, config, path)
        tokens[index], types[index] = text, _NORMAL
    added = tokenizer.get("added_tokens") or []
    if not isinstance(added, list):
        raise CheckpointError(f"{path}: added_tokens is {quoted(added)}, expected a list")
    for entry in added:
        token = _object(entry, f"{path}: added_tokens")
        content = token.get("content")
        if not isinstance(content, str):
            raise CheckpointError(f"{path}: an added token has content {quoted(content)}, expected text")
        index = _token_id(token.get("id"), content, config, path)
        tokens[index], types[index] = content, _CONTROL if token.get("special") else _USER_DEFINED
        if content == model.get("unk_token"):
            types[index] = _UNKNOWN
    return tokens, types


def _token_id(value: object, text: str, config: ModelConfig, path: Path) -> int:
    if type(value) is not int or not 0 <= value < config.vocab_size:
        raise CheckpointError(
            f"{path}: the token {quoted(text)} has id {quoted(value)}, expected a number below {config.vocab_size}"
        )
    return value


def _read_merges(model: Mapping[str, object], path: Path) -> list[tuple[str, str]]:
    """Return the pairs; old files write "a b", new ones ["a", "b"]."""
    merges = model.get("merges")
    if not isinstance(merges, list):
        raise CheckpointError(f"{path}: model.merges is {quoted(merges)}, expected a list")
    pairs: list[tuple[str, str]] = []
    for merge in merges:
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, str) for part in parts):
            raise CheckpointError(f"{path}: the merge {quoted(merge)} is not a pair of tokens")
        pairs.append((parts[0], parts[1]))
    return pairs


def _is_byte(text: str, kind: int) -> bool:
    return kind == _NORMAL and _BYTE_TOKEN.fullmatch(text) is not None


def _scores(tokens: list[str], types: list[int], merges: list[tuple[str, str]]) -> list[float]:
    """Return scores that make SentencePiece merge in the order of the merge list.

    SentencePiece joins the pair whose result has the best score, so a token's score is minus the rank of the first
    merge that makes it. Tokens that no merge makes are never the result of joining; theirs decides nothing.
    """
    rank: dict[str, int] = {}
    for left, right in merges:
        rank.setdefault(left + right, len(rank))
    scores = []
    for text, kind in zip(tokens, types, strict=True):
        if kind == _NORMAL:
            scores.append(-float(rank.get(text, len(rank))))
        else:
            scores.append({_BYTE: 0.0, _UNUSED: _UNUSED_SCORE}.get(kind, _ADDED_SCORE))
    return scores


def _adds_space_prefix(tokenizer: Mapping[str, object], path: Path) -> bool:
    """Tell whether text gets a space in front: from a Prepend normaliser or a Metaspace pre-tokenizer."""
    adds = False
    for step in _sequence(tokenizer.get("normalizer"), "normalizers", f"{path}: normalizer"):
        if step.get("type") not in ("Prepend", "Replace"):
            raise UnsupportedModelError(f"{path}: the normalizer {quoted(step)} cannot be written to GGUF")
        adds = adds or step.get("type") == "Prepend"
    for step in _sequence(tokenizer.get("pre_tokenizer"), "pretokenizers", f"{path}: pre_tokenizer"):
        if step.get("type") != "Metaspace":
            raise UnsupportedModelError(f"{path}: the pre_tokenizer {quoted(step)} cannot be written to GGUF")
        adds = adds or step.get("prepend_scheme", "always") != "never"
    return adds


def _pre_tokenizer_name(tokenizer: Mapping[str, object], model: Mapping[str, object], path: Path) -> str:
    if tokenizer.get("normalizer") is not None:
        shown = quoted(tokenizer["normalizer"])
        raise UnsupportedModelError(
            f"{path}: the normalizer {shown} of a byte-level tokenizer cannot be written to GGUF"
        )
    steps = ["ignore_merges"] if model.get("ignore_merges") else []
    where = f"{path}: pre_tokenizer"
    for step in _sequence(tokenizer.get("pre_tokenizer"), "pretokenizers", where):
        steps += _patterns(step, where)
    name = _PRE_TOKENIZERS.get(tuple(steps))
    if name is None:
        raise UnsupportedModelError(f"{where}: {quoted(steps)} has no GGUF name that miniphi knows")
    return name


def _sequence(value: object, key: str, where: str) -> list[dict[str, object]]:
    """Return the steps of a normaliser or pre-tokenizer, which is nothing, one step, or a Sequence of steps."""
    if value is None:
        return []
    step = _object(value, where)
    if step.get("type") != "Sequence":
        return [step]
    steps = step.get(key)
    if not isinstance(steps, list):
        raise CheckpointError(f"{where}: {key} is {quoted(steps)}, expected a list")
    return [_object(each, where) for each in steps]


def _patterns(step: Mapping[str, object], where: str) -> list[str]:
    kind = step.get("type")
    if kind == "Digits" and step.get("individual_digits"):
        return ["digits"]
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return [_GPT2_PATTERN] if step.get("use_regex", True) else []
    if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        return [str(_object(step.get("pattern"), where).get("Regex"))]
    raise UnsupportedModelError(f"{where}: the step {quoted(step)} has no GGUF name that miniphi knows")


def _special_ids(tokens: list[str], tokenizer_config: Mapping[str, object], config: ModelConfig) -> dict[str, object]:
    ids: dict[str, object] = {}
    fallback = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_ids[0] if config.eos_token_ids else None,
        "padding_token_id": config.pad_token_id,
    }
    for key, name in _SPECIAL_TOKENS.items():
        value = tokenizer_config.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        token_id = tokens.index(text) if isinstance(text, str) and text in tokens else fallback.get(key)
        if token_id is not None:
            ids[f"tokenizer.ggml.{key}"] = token_id
    return ids


def _adds_bos(
    tokenizer: Mapping[str, object],
    tokenizer_config: Mapping[str, object],
    metadata: Mapping[str, object],
    tokens: list[str],
) -> bool:
    """Tell whether encoding begins with bos: tokenizer_config.json says so, or else the post-processor's template."""
    stated = tokenizer_config.get("add_bos_token")
    bos_id = metadata.get("tokenizer.ggml.bos_token_id")
    if isinstance(stated, bool) or not isinstance(bos_id, int):
        return bool(stated)
    processor = tokenizer.get("post_processor")
    steps = processor.get("processors", [processor]) if isinstance(processor, dict) else []
    for step in steps if isinstance(steps, list) else []:
        single = step.get("single") if isinstance(step, dict) else None
        if isinstance(single, list) and single and isinstance(single[0], dict):
            special = single[0].get("SpecialToken")
            return isinstance(special, dict) and special.get("id") == tokens[bos_id]
    return False


def _object(value: object, where: str) -> dict[str, object]:
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: is {quoted(value)}, expected a JSON object")
    return value
