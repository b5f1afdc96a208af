"""`Tokenizer` and `StreamDecoder`: the public face of a vocabulary."""

import codecs
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import tokenizers

from miniphi.errors import InvalidRequestError
from miniphi.tokenizer.gguf import vocabulary_from_gguf
from miniphi.tokenizer.hugging_face import vocabulary_from_files
from miniphi.tokenizer.saved import restore_vocabulary, save_vocabulary
from miniphi.tokenizer.special_tokens import Piece, SpecialToken, SpecialTokenFinder
from miniphi.tokenizer.vocabulary import Prefix, Vocabulary

__all__ = ["StreamDecoder", "Tokenizer"]

# GPT-2 spells each byte as one printable letter: itself where it is one, else the next free one from U+0100.
_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_HIDDEN = (byte for byte in range(256) if byte not in _PRINTABLE)
_BYTE_OF_LETTER = {chr(byte): byte for byte in _PRINTABLE} | {chr(0x100 + n): byte for n, byte in enumerate(_HIDDEN)}
_SPELLED = frozenset(_BYTE_OF_LETTER)
_BYTE_PIECE = re.compile("<0x([0-9A-Fa-f]{2})>")


class Tokenizer:
    """Text to token ids and back.

    Decoding differs from the `tokenizers` library in two places, both on purpose. Bytes that are not UTF-8 become one
    U+FFFD for each maximal invalid part, also for byte-fallback tokens, of which the library replaces the whole run;
    only so can a stream equal the whole. And the space that SentencePiece puts before a segment is taken away after a
    special token too, so that text with special tokens comes back as it was.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._special = {token.id: token for token in vocabulary.special}
        self._finder = SpecialTokenFinder(vocabulary.special)

    @classmethod
    def from_files(cls, tokenizer_json: Path, tokenizer_config: Mapping[str, Any] | None) -> "Tokenizer":
        """Read a tokenizer.json; the parsed tokenizer_config.json gives bos, eos and corrects special tokens.

        Raises: CheckpointError, UnsupportedModelError.
        """
        return cls(vocabulary_from_files(tokenizer_json, tokenizer_config or {}))

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, object], *, source: str) -> "Tokenizer":
        """Build the tokenizer that a GGUF file's metadata describes; `source` names the file in errors.

        Raises: CheckpointError, UnsupportedModelError.
        """
        return cls(vocabulary_from_gguf(metadata, source))

    @classmethod
    def from_saved(cls, data: bytes) -> "Tokenizer":
        """Build the tokenizer that `save` wrote. Raises: CheckpointError."""
        return cls(restore_vocabulary(data))

    def save(self) -> bytes:
        """Return the tokenizer in the form that loads fastest; `from_saved` reads it."""
        return save_vocabulary(self._vocabulary)

    @property
    def vocab_size(self) -> int:
        """Return the number of ids; a model's vocabulary may be larger."""
        return self._vocabulary.vocab_size

    @property
    def bos_token_id(self) -> int | None:
        """Return the id that starts a text, where there is one."""
        return self._vocabulary.bos_token_id

    @property
    def eos_token_id(self) -> int | None:
        """Return the id that ends a text, where there is one."""
        return self._vocabulary.eos_token_id

    @property
    def add_bos(self) -> bool:
        """Tell whether plain completion prompts start with `bos_token_id`. Chat templates write it themselves."""
        return self._vocabulary.add_bos

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """Return the id of every special token by its text."""
        return {token.text: token.id for token in self._vocabulary.special}

    @property
    def unused_ids(self) -> frozenset[int]:
        """Return the ids below `vocab_size` that no text becomes and that must not be sampled."""
        return self._vocabulary.unused_ids

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Return the text's ids, never with bos.

        Special tokens are recognised only where allowed; otherwise their text is text like any other. A byte that a
        byte-level vocabulary cannot spell is left out, as everywhere (SmolLM2 lacks U+0004, among others).
        Raises: InvalidRequestError where the text has a lone surrogate.
        """
        if not allow_special:
            return self.encode_plain(text)
        ids: list[int] = []
        for piece in self.split(text):
            if piece.token_id is None:
                ids += self.encode_plain(text[piece.start : piece.stop], piece.start)
            else:
                ids.append(piece.token_id)
        return ids

    def split(self, text: str) -> Iterator[Piece]:
        """Cut a text at its special tokens."""
        return self._finder.split(text)

    def encode_plain(self, text: str, start: int = 0) -> list[int]:
        """Return the ids of a plain piece that starts at character `start` of its text."""
        return list(self._run(text, start).ids) if text else []

    def encode_plain_with_starts(self, text: str, start: int = 0) -> list[tuple[int, int]]:
        """Return a plain piece's ids, each with the position of its first character in the whole text."""
        encoding = self._run(text, start)
        return [
            (token_id, start + offset) for token_id, (offset, _) in zip(encoding.ids, encoding.offsets, strict=True)
        ]

    def _run(self, text: str, start: int) -> tokenizers.Encoding:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequestError(
                f"text: character {start + error.start} is the lone surrogate {text[error.start]!a}; expected Unicode"
            ) from None
        pipeline = self._vocabulary.plain if start == 0 else self._vocabulary.plain_inside
        return pipeline.encode(text, add_special_tokens=False)

    def decode(self, ids: Iterable[int], *, skip_special: bool = False, after: int | None = None) -> str:
        """Return the text of the ids; bytes that are not UTF-8 become U+FFFD. See `stream_decoder`."""
        stream = self.stream_decoder(skip_special=skip_special, after=after)
        return b"".join(map(stream.next_bytes, ids)).decode(errors="replace")

    def stream_decoder(self, *, skip_special: bool = False, after: int | None = None) -> "StreamDecoder":
        """Start decoding token by token.

        `skip_special` leaves out control tokens. `after` is the id before the first one: text that continues a prompt
        keeps its leading space, which is SentencePiece's own only at the start and after a special token.
        """
        return StreamDecoder(self, skip_special=skip_special, prefix=self._vocabulary.prefix, after=after)

    def special_token(self, token_id: int) -> SpecialToken | None:
        """Return the special token with this id, or None."""
        return self._special.get(token_id)

    def token_text(self, token_id: int) -> str:
        """Return the token as the vocabulary spells it. Raises: InvalidRequestError for an id that is no token."""
        if token_id in self._special:
            return self._special[token_id].text
        piece = self._vocabulary.plain.id_to_token(token_id) if 0 <= token_id < self.vocab_size else None
        if piece is None:
            raise InvalidRequestError(f"token id {token_id} is not in the vocabulary of {self.vocab_size}")
        return piece

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that the token adds to a text; special tokens add their own text."""
        piece = self.token_text(token_id)
        if token_id in self._special:
            return piece.encode()
        if self._vocabulary.is_byte_level:
            # Whitespace that a code model added as a token is not spelled in letters.
            return bytes(map(_BYTE_OF_LETTER.__getitem__, piece)) if _SPELLED.issuperset(piece) else piece.encode()
        if byte := _BYTE_PIECE.fullmatch(piece):
            return bytes.fromhex(byte[1])
        return piece.replace("▁", " ").encode()


class StreamDecoder:
    """Decodes token by token; all pushes and the flush together are what `Tokenizer.decode` returns.

    Text is held back only while it ends inside a UTF-8 character.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool, prefix: Prefix, after: int | None) -> None:
        self._tokenizer, self._skip_special, self._prefix = tokenizer, skip_special, prefix
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._drops_space = self._starts_segment(after)

    def push(self, token_id: int) -> str:
        """Take one token and return the text that is now certain, perhaps none."""
        return self._utf8.decode(self.next_bytes(token_id))

    def flush(self) -> str:
        """End the text and return what was held back, as U+FFFD where it is no character."""
        return self._utf8.decode(b"", final=True)

    def next_bytes(self, token_id: int) -> bytes:
        """Return the bytes that the next token adds to the text."""
        special = self._tokenizer.special_token(token_id)
        drops_space, self._drops_space = self._drops_space, special is not None and self._starts_segment(token_id)
        if special is not None:
            return b"" if self._skip_special and special.is_control else special.text.encode()
        added = self._tokenizer.token_bytes(token_id)
        return added.removeprefix(b" ") if drops_space else added

    def _starts_segment(self, after: int | None) -> bool:
        """Tell whether the space that begins what follows this token is the vocabulary's own."""
        is_inside = after is not None and self._tokenizer.special_token(after) is None
        return not is_inside and (self._prefix is Prefix.SEGMENT or (self._prefix is Prefix.TEXT and after is None))
