"""One conversation under one template: rendered whole, in prefixes, or with a mark behind each content.

Works on disguised text throughout; knows nothing of tokens.
"""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from miniphi.chat.disguise import Danger, Disguise
from miniphi.chat.message import Message
from miniphi.chat.sandbox import TemplateProgram
from miniphi.errors import ChatTemplateError


class Rendering:
    """The disguised messages and tools of one conversation, ready to render."""

    def __init__(
        self,
        program: TemplateProgram,
        danger: Danger,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, str],
    ) -> None:
        self._program, self._variables = program, variables
        fields = [message.for_template() for message in messages]
        self.disguise = Disguise(danger, (program.source, fields, tools or ()))
        self._messages = [
            {key: value if key == "role" else self.disguise.hide(value) for key, value in message.items()}
            for message in fields
        ]
        self._tools = self.disguise.hide(tools) if tools else None
        self._lead: list[dict[str, Any]] = []
        if tools and "tools" not in program.variables:
            self._attach_tools()

    def run(self, num_messages: int, add_generation_prompt: bool) -> str:
        """Render the first messages. Raises: ChatTemplateError."""
        return self._run(self._messages[:num_messages], add_generation_prompt)

    def run_marked(self, add_generation_prompt: bool) -> tuple[str, list[str | None]]:
        """Render all with a mark behind each content, before its trailing whitespace; return the text and the marks."""
        marked: list[dict[str, Any]] = []
        marks: list[str | None] = []
        for message in self._messages:
            content = message["content"] or ""
            core = content.rstrip()
            mark = self.disguise.mark() if core else None
            marks.append(mark)
            marked.append(message if mark is None else {**message, "content": core + mark + content[len(core) :]})
        return self._run(marked, add_generation_prompt), marks

    def dropped(self, text: str, add_generation_prompt: bool) -> tuple[int, ...]:
        """Return the indices of messages whose content is left out of the rendered text."""
        try:
            text, evidence = self.run_marked(add_generation_prompt)
        except ChatTemplateError:  # it compares contents with something, so a mark does not do
            evidence = [(message["content"] or "").strip() for message in self._messages]
        return tuple(index for index, part in enumerate(evidence) if part and part not in text)

    def answer_span(self, index: int, text: str) -> tuple[int, int]:
        """Return where the answer that is message `index` lies in the whole conversation's text, with all that ends it.

        It begins where the generation prompt after the messages before it would end.
        Raises: ChatTemplateError where these are not the beginning of the whole.
        """
        before = self.run(index, True)
        through = self.run(index + 1, False)
        stop = len(os.path.commonprefix([text, through]))  # noqa: RUF071 - characters are meant
        if not text.startswith(before) or stop <= len(before):
            raise ChatTemplateError(
                f"no loss mask: message {index} does not simply follow the generation prompt in this template; "
                "put {% generation %} and {% endgeneration %} around what the assistant writes"
            )
        return len(before), stop

    def _run(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str:
        return self._program.run(
            self.disguise.num_characters,
            messages=[*self._lead, *messages],
            tools=self._tools,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **self._variables,
        )

    def _attach_tools(self) -> None:
        """Give the tools as JSON to the system turn, where templates look that take no `tools` (Phi-4-mini)."""
        for message in self._messages:
            if message["role"] == "system":
                break
        else:
            message = {"role": "system", "content": ""}
            self._lead.append(message)
        message["tools"] = json.dumps(self._tools, ensure_ascii=False)
