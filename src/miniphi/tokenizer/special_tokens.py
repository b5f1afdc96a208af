"""Special tokens: where they stand in a text, and the whitespace they swallow.

Knows nothing of vocabularies. The rules are those of the `tokenizers` library: the leftmost match wins, of several the
longest, and `rstrip` swallows all whitespace up to the next character.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

# Unicode's White_Space, which is what the library means; Python's \s also has U+001C..U+001F.
WHITESPACE = "\t\n\v\f\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_LEADING = re.compile(f"[{WHITESPACE}]*")
_TRAILING = re.compile(f"[{WHITESPACE}]*$")
_BLANK = re.compile(f"[{WHITESPACE}]+")


@dataclass(frozen=True, kw_only=True)
class SpecialToken:
    """A token that plain text never becomes. `is_control` ones are left out of text for people."""

    id: int
    text: str
    lstrip: bool = False
    rstrip: bool = False
    is_control: bool = True


@dataclass(frozen=True, slots=True)
class Piece:
    """A slice of a text: a special token with the whitespace it swallows, or plain text where `token_id` is None."""

    start: int
    stop: int
    token_id: int | None


class SpecialTokenFinder:
    """Cuts a text at its special tokens."""

    def __init__(self, tokens: Iterable[SpecialToken]) -> None:
        self._tokens = {token.text: token for token in tokens}
        longest_first = sorted(self._tokens, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def split(self, text: str) -> Iterator[Piece]:
        """Yield pieces that cover the text without gap or overlap; plain ones are never empty."""
        done = 0
        for match in self._pattern.finditer(text):
            token, start, stop = self._tokens[match.group()], match.start(), match.end()
            if start < done:
                continue
            if token.lstrip and (blank := _TRAILING.search(text, done, start)):
                start = blank.start()
            if token.rstrip and (blank := _LEADING.match(text, stop)):
                stop = blank.end()
            if start > done:
                yield Piece(done, start, None)
            yield Piece(start, stop, token.id)
            done = stop
        if done < len(text):
            yield Piece(done, len(text), None)


def is_blank(text: str) -> bool:
    """Tell whether the text is whitespace only."""
    return _BLANK.fullmatch(text) is not None
