"""What a tokenizer is made of, whichever file it came from."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import tokenizers

from miniphi.errors import UnsupportedModelError
from miniphi.tokenizer.special_tokens import SpecialToken, is_blank


class Prefix(Enum):
    """Where SentencePiece puts the space that a text does not have: "Hello" is stored as "▁Hello"."""

    NONE = "none"
    TEXT = "text"  # only at the start of the text
    SEGMENT = "segment"  # at its start and after every special token


class Pipeline(Protocol):
    """What is asked of a `tokenizers.Tokenizer` once it is complete."""

    def encode(self, text: str, *, add_special_tokens: bool) -> tokenizers.Encoding:
        """Cut a text into tokens."""

    def id_to_token(self, token_id: int, /) -> str | None:
        """Return the token as the vocabulary spells it."""

    def to_str(self) -> str:
        """Return the pipeline as JSON, which `tokenizers.Tokenizer.from_str` reads."""


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """A pipeline for plain text and the special tokens beside it.

    `plain` has no special tokens, so no text can become one. `plain_inside` is the same for text that does not start
    the string; only `Prefix.TEXT` makes them differ. Byte-level pieces spell bytes as letters (GPT-2), others as text
    with "▁" for a space and "<0x0A>" for a byte (SentencePiece).
    """

    plain: Pipeline
    plain_inside: Pipeline
    is_byte_level: bool
    prefix: Prefix
    special: tuple[SpecialToken, ...]
    vocab_size: int
    unused_ids: frozenset[int]
    bos_token_id: int | None
    eos_token_id: int | None
    add_bos: bool


def add_special(plain: tokenizers.Tokenizer, tokens: Iterable[SpecialToken], source: str) -> tuple[SpecialToken, ...]:
    """Return the tokens that plain text must not become; the others become part of the plain pipeline.

    Whitespace is ordinary text (code models add runs of it), and so is a token that is not control and that the
    pipeline reaches anyway.
    """
    special = []
    for token in tokens:
        if is_blank(token.text):
            plain.add_tokens([tokenizers.AddedToken(token.text, normalized=False)])
        elif token.id not in plain.encode(token.text, add_special_tokens=False).ids:
            special.append(token)
        elif token.is_control:
            raise UnsupportedModelError(
                f"{source}: plain text becomes the control token {token.text!r} (id {token.id}), so it could be forged"
            )
    return tuple(special)
