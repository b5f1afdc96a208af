"""Makes text from outside unable to spell a special token while a template works on it.

A template mixes its own words with messages, and only the words may become special tokens. Before rendering, dangerous
characters of the messages are replaced one for one by private-use characters that occur nowhere else; the rendered
text is cut at special tokens, and then the characters are put back. Lengths and whitespace stay as they are, so
templates may trim, slice, measure, split and write JSON as ever.

A special token with a character from outside would begin in that text, end in it, or enclose all of it. So hidden are

* every character that begins or ends some special token, except within a phrase of the template's own, such as
  '</think>', that overlaps no special token (templates look for those), and
* every character of a text that is itself part of a special token, such as "end", unless it is a word of the template.

What remains is a template that cuts letters out of a message and writes them between the halves of a special token.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

from miniphi.errors import InvalidRequestError

_PRIVATE_USE = (range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))


class Danger:
    """What must be hidden for one template and one set of special tokens."""

    def __init__(self, special: Iterable[str], words: Iterable[str], marks: str) -> None:
        self.special = tuple(special)
        self.words = frozenset(words)
        self._longest = max(map(len, self.special), default=0)
        edges = {edge for text in self.special for edge in (text[0], text[-1])} | set(marks)
        phrases = [word for word in self.words if edges.intersection(word) and not self._meets_special(word)]
        choices = [*map(re.escape, sorted(phrases, key=len, reverse=True)), *map(re.escape, sorted(edges))]
        self.pattern = re.compile("|".join(choices))
        self.letters = sorted({letter for text in (*self.special, marks) for letter in text if not letter.isspace()})

    def is_fragment(self, text: str) -> bool:
        """Tell whether the text could be the inside of a special token."""
        core = text.strip()
        is_short = 0 < len(core) <= self._longest and core not in self.words
        return is_short and any(core in special for special in self.special)

    def _meets_special(self, word: str) -> bool:
        """Tell whether the word and a special token can share characters in one text."""
        return any(
            word in text or text in word or _overlap(word, text) or _overlap(text, word) for text in self.special
        )


class Disguise:
    """The private characters of one rendering."""

    def __init__(self, danger: Danger, values: Iterable[Any]) -> None:
        self._danger = danger
        texts = list(_texts(values))
        self.num_characters = sum(map(len, texts))
        used = set().union(*texts)
        self._free = (chr(point) for point in chain(*_PRIVATE_USE) if chr(point) not in used)
        self._private = {letter: self.mark() for letter in danger.letters}
        self._everything = str.maketrans(self._private)
        self._back = str.maketrans({private: letter for letter, private in self._private.items()})

    def mark(self) -> str:
        """Return a character that occurs nowhere else. Raises: InvalidRequestError where none is left."""
        mark = next(self._free, None)
        if mark is None:
            raise InvalidRequestError("messages: they use every private-use character of Unicode; remove some")
        return mark

    def hide(self, value: Any) -> Any:
        """Return a message, tool or text in which no text can take part in a special token."""
        if isinstance(value, str):
            if self._danger.is_fragment(value):
                return value.translate(self._everything)
            return self._danger.pattern.sub(lambda match: self._private.get(match[0], match[0]), value)
        if isinstance(value, Mapping):
            return {self.hide(key): self.hide(item) for key, item in value.items()}
        return [self.hide(item) for item in value] if isinstance(value, list | tuple) else value

    def reveal(self, text: str) -> str:
        """Put the hidden characters back; the length stays the same."""
        return text.translate(self._back)


def _overlap(left: str, right: str) -> bool:
    return any(left.endswith(right[:size]) for size in range(1, min(len(left), len(right))))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _texts(key)
            yield from _texts(item)
    elif isinstance(value, Iterable):
        for item in value:
            yield from _texts(item)
