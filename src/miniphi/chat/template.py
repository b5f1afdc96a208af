"""`ChatTemplate`: a conversation to token ids and, for training, the mask of what the model must learn to write."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from miniphi.chat.disguise import Danger
from miniphi.chat.message import Message
from miniphi.chat.rendering import Rendering
from miniphi.chat.sandbox import GENERATION_START, GENERATION_STOP, TemplateProgram, generation_spans
from miniphi.errors import ChatTemplateError, InvalidRequestError
from miniphi.tokenizer import Piece, Tokenizer


@dataclass(frozen=True, kw_only=True)
class RenderedChat:
    """A conversation as the model reads it.

    `loss_mask`: true for each token that the assistant writes, up to and with the one that ends its turn; None where it
    was not asked for. `dropped`: indices of the messages whose content the template left out.
    """

    token_ids: tuple[int, ...]
    text: str
    dropped: tuple[int, ...]
    loss_mask: tuple[bool, ...] | None = None


class ChatTemplate:
    """A Jinja chat template over a tokenizer.

    Text of messages and tools is encoded as plain text, whatever it looks like; see `disguise`. Apart from that the ids
    are those of Hugging Face's `apply_chat_template`.
    """

    def __init__(self, source: str, tokenizer: Tokenizer) -> None:
        """Compile the template. Raises: ChatTemplateError."""
        self.source = source
        self._tokenizer = tokenizer
        self._program = TemplateProgram(source)
        self._danger = Danger(tokenizer.special_tokens, self._program.words, GENERATION_START + GENERATION_STOP)
        named = {"bos_token": tokenizer.bos_token_id, "eos_token": tokenizer.eos_token_id}
        self._variables = {name: tokenizer.token_text(id_) for name, id_ in named.items() if id_ is not None}

    @property
    def takes_tools(self) -> bool:
        """Tell whether the template has a place for tools."""
        return "tools" in self._program.variables | self._program.words

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        with_loss_mask: bool = False,
    ) -> RenderedChat:
        """Turn a conversation into token ids.

        Raises: ChatTemplateError where the template fails, or where a loss mask is asked for and the assistant's part
        cannot be told from the rest; InvalidRequestError for no messages, tools that the template ignores, or text that
        is not Unicode.
        """
        if not messages:
            raise InvalidRequestError("messages: there are none; expected at least one")
        if tools and not self.takes_tools:
            raise InvalidRequestError("tools: this model's chat template has no place for them")
        rendering = Rendering(self._program, self._danger, messages, tools, self._variables)
        text, spans = generation_spans(rendering.run(len(messages), add_generation_prompt))
        pieces = list(self._tokenizer.split(text))
        revealed = rendering.disguise.reveal(text)
        loss_mask = None
        if with_loss_mask:
            if not self._program.marks_generation:
                spans = self._answer_spans(messages, rendering, text, pieces)
            loss_mask = tuple(
                any(start <= at < stop for start, stop in spans) for at in self._token_starts(revealed, pieces)
            )
        return RenderedChat(
            token_ids=tuple(self._token_ids(revealed, pieces)),
            text=revealed,
            dropped=rendering.dropped(text, add_generation_prompt),
            loss_mask=loss_mask,
        )

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Return the special tokens that the template writes right after an assistant's content."""
        turns = [Message("user", "1"), Message("assistant", "2"), Message("user", "3"), Message("assistant", "4")]
        for messages in (turns, [Message("system", "0"), *turns]):
            rendering = Rendering(self._program, self._danger, messages, None, self._variables)
            try:
                marked, marks = rendering.run_marked(add_generation_prompt=False)
            except ChatTemplateError:
                continue  # some templates insist on a system turn
            text, _ = generation_spans(marked)
            answers = [mark for mark, message in zip(marks, messages, strict=True) if message.role == "assistant"]
            followers = (self._special_at_start(text.partition(mark)[2]) for mark in answers if mark)
            return frozenset(token_id for token_id in followers if token_id is not None)
        return frozenset()

    def _special_at_start(self, text: str) -> int | None:
        """Return the special token that the text starts with, whitespace aside."""
        piece = next(iter(self._tokenizer.split(text.lstrip())), None)
        return piece.token_id if piece else None

    def _answer_spans(
        self, messages: Sequence[Message], rendering: Rendering, text: str, pieces: Sequence[Piece]
    ) -> list[tuple[int, int]]:
        """Return the span of each assistant turn, through the first token that stops it."""
        spans = []
        for index, message in enumerate(messages):
            if message.role == "assistant":
                start, stop = rendering.answer_span(index, text)
                ends = (piece.start + 1 for piece in pieces if piece.token_id in self.stop_ids and piece.start >= start)
                spans.append((start, min(stop, next(ends, stop))))
        return spans

    def _token_ids(self, text: str, pieces: Sequence[Piece]) -> Iterator[int]:
        for piece in pieces:
            if piece.token_id is None:
                yield from self._tokenizer.encode_plain(text[piece.start : piece.stop], piece.start)
            else:
                yield piece.token_id

    def _token_starts(self, text: str, pieces: Sequence[Piece]) -> Iterator[int]:
        """Yield the position of each token's first character."""
        for piece in pieces:
            if piece.token_id is None:
                plain = self._tokenizer.encode_plain_with_starts(text[piece.start : piece.stop], piece.start)
                yield from (start for _, start in plain)
            else:
                yield piece.start
