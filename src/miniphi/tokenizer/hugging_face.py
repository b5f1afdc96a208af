"""The vocabulary in Hugging Face's tokenizer.json and tokenizer_config.json."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import models, pre_tokenizers

from miniphi.errors import CheckpointError, UnsupportedModelError
from miniphi.tokenizer.special_tokens import SpecialToken
from miniphi.tokenizer.vocabulary import Prefix, Vocabulary, add_special


def vocabulary_from_files(tokenizer_json: Path, config: Mapping[str, Any]) -> Vocabulary:
    """Build the vocabulary. Raises: CheckpointError, UnsupportedModelError."""
    source = str(tokenizer_json)
    if not tokenizer_json.is_file():
        raise CheckpointError(f"{source}: there is no such file; expected a tokenizer.json")
    try:
        full = tokenizers.Tokenizer.from_file(source)
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(f"{source}: not a tokenizer.json: {error}") from None
    if not isinstance(full.model, models.BPE):
        raise UnsupportedModelError(f"{source}: the model is {type(full.model).__name__}; only BPE is supported")
    plain = _without_added_tokens(full)
    added = _added_tokens(full, config, source)
    used = set(full.get_vocab(with_added_tokens=True).values()) | {token.id for token in added}
    size = max(used) + 1
    ids = {token.text: token.id for token in added}
    bos, eos = (_named_token_id(config, name, ids, plain, source) for name in ("bos_token", "eos_token"))
    add_bos = config.get("add_bos_token")
    if add_bos is None:
        add_bos = bos is not None and full.encode("").ids[:1] == [bos]
    prefix = _prefix(plain)
    return Vocabulary(
        plain=plain,
        plain_inside=_inside(plain, source) if prefix is Prefix.TEXT else plain,
        is_byte_level=_is_byte_level(full, source),
        prefix=prefix,
        special=add_special(plain, added, source),
        vocab_size=size,
        unused_ids=frozenset(range(size)) - used,
        bos_token_id=bos,
        eos_token_id=eos,
        add_bos=bool(add_bos),
    )


def _without_added_tokens(full: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """Return the same pipeline without added tokens, truncation, padding or post-processing."""
    plain = tokenizers.Tokenizer(full.model)
    if full.normalizer is not None:
        plain.normalizer = full.normalizer
    if full.pre_tokenizer is not None:
        plain.pre_tokenizer = full.pre_tokenizer
    return plain


def _added_tokens(full: tokenizers.Tokenizer, config: Mapping[str, Any], source: str) -> list[SpecialToken]:
    """Return the added tokens; where both files describe one, tokenizer_config.json is right, as in transformers."""
    states = {
        token_id: {"content": token.content, **{flag: getattr(token, flag) for flag in _FLAGS}}
        for token_id, token in full.get_added_tokens_decoder().items()
    }
    for token_id, state in config.get("added_tokens_decoder", {}).items():
        states[int(token_id)] = states.get(int(token_id), dict.fromkeys(_FLAGS, False)) | state
    for token_id, state in states.items():
        content = state["content"]
        if state["single_word"]:
            raise UnsupportedModelError(
                f"{source}: added token {content!r} (id {token_id}) has single_word; not supported"
            )
    return [
        SpecialToken(
            id=token_id,
            text=state["content"],
            lstrip=state["lstrip"],
            rstrip=state["rstrip"],
            is_control=state["special"],
        )
        for token_id, state in sorted(states.items())
    ]


_FLAGS = ("lstrip", "rstrip", "single_word", "special")


def _named_token_id(
    config: Mapping[str, Any], name: str, ids: Mapping[str, int], plain: tokenizers.Tokenizer, source: str
) -> int | None:
    value = config.get(name)
    text = value.get("content") if isinstance(value, Mapping) else value
    if text is None:
        return None
    token_id = ids.get(text, plain.token_to_id(text))
    if token_id is None:
        raise CheckpointError(f"{source}: {name} {text!r} of tokenizer_config.json is not in the vocabulary")
    return token_id


def _parts(component: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the description of a pipeline step, or of each step in a sequence of them."""
    if component is None:
        return
    waiting = [json.loads(component.__getstate__())]
    while waiting:
        part = waiting.pop(0)
        nested = next((part[key] for key in ("normalizers", "pretokenizers", "decoders") if key in part), None)
        if nested is None:
            yield part
        else:
            waiting = [*nested, *waiting]


def _is_byte_level(full: tokenizers.Tokenizer, source: str) -> bool:
    kinds = {part["type"] for part in _parts(full.decoder)}
    if "ByteLevel" in kinds:
        return True
    if "ByteFallback" in kinds:
        return False
    found = ", ".join(sorted(kinds)) or "missing"
    raise UnsupportedModelError(f"{source}: the decoder is {found}; supported are ByteLevel and ByteFallback")


def _prefix(plain: tokenizers.Tokenizer) -> Prefix:
    if any(part["type"] == "Prepend" for part in _parts(plain.normalizer)):
        return Prefix.SEGMENT
    for part in _parts(plain.pre_tokenizer):
        if part["type"] == "Metaspace":
            return {"first": Prefix.TEXT, "always": Prefix.SEGMENT, "never": Prefix.NONE}[part["prepend_scheme"]]
    return Prefix.NONE


def _inside(plain: tokenizers.Tokenizer, source: str) -> tokenizers.Tokenizer:
    """Return the pipeline for text that does not start the string, which gets no prefix."""
    metaspace = plain.pre_tokenizer
    if not isinstance(metaspace, pre_tokenizers.Metaspace):
        raise UnsupportedModelError(
            f"{source}: Metaspace with prepend_scheme 'first' inside a sequence is not supported"
        )
    inside = _without_added_tokens(plain)
    inside.pre_tokenizer = pre_tokenizers.Metaspace(
        metaspace.replacement, prepend_scheme="never", split=metaspace.split
    )
    return inside
