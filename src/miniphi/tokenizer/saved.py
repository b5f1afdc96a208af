"""A vocabulary as bytes that come back quickly, and the pipeline that then encodes a short text without all of it.

Owns that format and `SavedPipeline`. The merges of a vocabulary take the `tokenizers` library 40 ms and more to index;
the first prompt of a process needs a few hundred of them.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import models

from miniphi.errors import CheckpointError
from miniphi.tokenizer.special_tokens import SpecialToken
from miniphi.tokenizer.vocabulary import Pipeline, Prefix, Vocabulary

__all__ = ["restore_vocabulary", "save_vocabulary"]

_MAX_SHORT_TEXT = 400
"""Characters of a text that is encoded with the part of the vocabulary it can use; about 2 ms at most."""
_MAX_SHORT_TEXTS = 32
"""So many short texts together take as long as indexing the whole vocabulary; a chat prompt is about six of them."""
_LENGTHS = "<u4"
# Options of a BPE model under which a text can use other tokens than those that are substrings of it.
_ODD_OPTIONS = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
_OPTIONS = ("unk_token", "fuse_unk", "byte_fallback", "ignore_merges")
_SIMPLE_FIELDS = ("is_byte_level", "vocab_size", "bos_token_id", "eos_token_id", "add_bos")


class SavedPipeline:
    """A `tokenizers` pipeline over BPE that is built from its parts when it is needed, whole or for one short text.

    BPE joins pairs of pieces of a word in the order of their rank, so a text can use only merges whose result is a
    substring of it: a model of those alone gives the same tokens.
    """

    def __init__(self, skeleton: str, tokens: Sequence[str | None], merges: NDArray[np.int32]) -> None:
        """`skeleton` is the pipeline's JSON without vocabulary; `tokens` by id; `merges` int32 [n, 2] by rank."""
        self._skeleton = skeleton
        self._tokens = tokens
        self._merges = merges
        self._num_short = 0

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {token: token_id for token_id, token in enumerate(self._tokens) if token is not None}

    @cached_property
    def _longest(self) -> int:
        return max(map(len, self._ids), default=0)

    @cached_property
    def _options(self) -> dict[str, Any]:
        model = json.loads(self._skeleton)["model"]
        return {name: model.get(name) for name in _OPTIONS if model.get(name) is not None}

    @cached_property
    def _steps(self) -> tokenizers.Tokenizer:
        return tokenizers.Tokenizer.from_str(self._skeleton)

    @cached_property
    def _whole(self) -> tokenizers.Tokenizer:
        return self._pipeline(self._ids, self._merges)

    def _pipeline(self, vocab: dict[str, int], merges: NDArray[np.int32]) -> tokenizers.Tokenizer:
        named = ((self._tokens[left], self._tokens[right]) for left, right in merges.tolist())
        pairs = [(left, right) for left, right in named if left and right and left + right in vocab]
        pipeline = tokenizers.Tokenizer(models.BPE(vocab, pairs, **self._options))
        if self._steps.normalizer is not None:
            pipeline.normalizer = self._steps.normalizer
        if self._steps.pre_tokenizer is not None:
            pipeline.pre_tokenizer = self._steps.pre_tokenizer
        return pipeline

    def id_to_token(self, token_id: int) -> str | None:
        """Return the token as the vocabulary spells it, or None."""
        return self._tokens[token_id] if 0 <= token_id < len(self._tokens) else None

    def to_str(self) -> str:
        """Return the pipeline as JSON."""
        return self._whole.to_str()

    def encode(self, text: str, *, add_special_tokens: bool = False) -> tokenizers.Encoding:
        """Encode a text as the whole pipeline does."""
        pipeline = None
        if "_whole" not in self.__dict__ and len(text) <= _MAX_SHORT_TEXT and self._num_short < _MAX_SHORT_TEXTS:
            self._num_short += 1
            pipeline = self._pipeline_for(text)
        return (pipeline or self._whole).encode(text, add_special_tokens=add_special_tokens)

    def _pipeline_for(self, text: str) -> tokenizers.Tokenizer:
        """Return a pipeline of the tokens that are substrings of the text, those of single bytes, and the unknown."""
        normalizer, pre_tokenizer = self._steps.normalizer, self._steps.pre_tokenizer
        normal = text if normalizer is None else normalizer.normalize_str(text)
        words = {normal} if pre_tokenizer is None else {word for word, _ in pre_tokenizer.pre_tokenize_str(normal)}
        ids = self._ids
        used = {
            word[start:stop]
            for word in words
            for start in range(len(word))
            for stop in range(start + 1, min(len(word), start + self._longest) + 1)
        }
        used |= {f"<0x{byte:02X}>" for byte in range(256)} | {self._options.get("unk_token", "")}
        vocab = {token: ids[token] for token in used & ids.keys()}
        is_used = np.zeros(len(self._tokens), bool)
        is_used[list(vocab.values())] = True
        return self._pipeline(vocab, self._merges[is_used[self._merges].all(axis=1)])


def save_vocabulary(vocabulary: Vocabulary) -> bytes:
    """Return a vocabulary as bytes."""
    pipelines = {name: getattr(vocabulary, name).to_str() for name in ("plain", "plain_inside")}
    parsed = {name: json.loads(text) for name, text in pipelines.items()}
    model = parsed["plain"]["model"]
    description = {name: getattr(vocabulary, name) for name in _SIMPLE_FIELDS}
    description |= {
        "prefix": vocabulary.prefix.value,
        "special": [asdict(token) for token in vocabulary.special],
        "unused_ids": sorted(vocabulary.unused_ids),
        "tokens": None,
    }
    pairs = np.empty((0, 2), "<i4")
    has_added_tokens = any(each["added_tokens"] for each in parsed.values())
    if not has_added_tokens and not any(model.get(name) for name in _ODD_OPTIONS):
        description["tokens"], pairs = _take_apart(model["vocab"], model["merges"])
        without = model | {"vocab": {}, "merges": []}
        pipelines = {name: json.dumps(each | {"model": without}) for name, each in parsed.items()}
    text = json.dumps(description | pipelines, ensure_ascii=False).encode()
    return np.array([len(text)], _LENGTHS).tobytes() + pairs.tobytes() + text


def _take_apart(ids: dict[str, int], merges: list[str] | list[list[str]]) -> tuple[list[str | None], NDArray[np.int32]]:
    """Return the tokens by id, and the merges as pairs of ids, int32 [n, 2]."""
    tokens: list[str | None] = [None] * (max(ids.values(), default=-1) + 1)
    for token, token_id in ids.items():
        tokens[token_id] = token
    named = (merge.split(" ") if isinstance(merge, str) else merge for merge in merges)
    return tokens, np.array([[ids[left], ids[right]] for left, right in named], "<i4").reshape(-1, 2)


def restore_vocabulary(data: bytes) -> Vocabulary:
    """Read what `save_vocabulary` wrote. Raises CheckpointError for anything else."""
    try:
        num_text_bytes = int(np.frombuffer(data, _LENGTHS, 1)[0])
        split = len(data) - num_text_bytes
        merges = np.frombuffer(data[4:split], "<i4").reshape(-1, 2)
        description = json.loads(data[split:])
        plain = inside = _restore_pipeline(description, "plain", merges)
        if description["plain_inside"] != description["plain"]:
            inside = _restore_pipeline(description, "plain_inside", merges)
        return Vocabulary(
            plain=plain,
            plain_inside=inside,
            prefix=Prefix(description["prefix"]),
            special=tuple(SpecialToken(**token) for token in description["special"]),
            unused_ids=frozenset(description["unused_ids"]),
            **{name: description[name] for name in _SIMPLE_FIELDS},
        )
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise CheckpointError(f"a saved vocabulary cannot be read: {error}") from None


def _restore_pipeline(description: dict[str, Any], name: str, merges: NDArray[np.int32]) -> Pipeline:
    tokens = description["tokens"]
    if tokens is None:
        return tokenizers.Tokenizer.from_str(description[name])
    if len(merges) and not 0 <= merges.min() <= merges.max() < len(tokens):
        raise ValueError("a merge names a token that does not exist")
    return SavedPipeline(description[name], tokens, merges)
