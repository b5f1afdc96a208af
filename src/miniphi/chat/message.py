"""One turn of a conversation, in the shape of the OpenAI protocol."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from miniphi.errors import InvalidRequestError

# Templates write roles into special tokens ('<|' + role + '|>'), so a role is one of these and never free text.
ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class Message:
    """One turn. Only an assistant that calls tools may have no content."""

    role: str
    content: str | None
    name: str | None = None
    tool_calls: tuple[Mapping[str, Any], ...] | None = None
    tool_call_id: str | None = None

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise InvalidRequestError(f"role: {self.role!r} is not a role; expected one of {', '.join(ROLES)}")
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise InvalidRequestError(f"content: missing in a message of the {self.role}; expected text")

    def for_template(self) -> dict[str, Any]:
        """Return the message as templates expect it: absent fields left out, tool arguments as an object."""
        fields: dict[str, Any] = {"role": self.role, "content": self.content}
        optional = {"name": self.name, "tool_call_id": self.tool_call_id}
        fields |= {key: value for key, value in optional.items() if value is not None}
        if self.tool_calls:
            fields["tool_calls"] = [_with_parsed_arguments(call) for call in self.tool_calls]
        return fields


def _with_parsed_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    """Parse the arguments, which the protocol sends as JSON text and templates write as JSON themselves."""
    function = call.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return dict(call)
    try:
        arguments = json.loads(function["arguments"])
    except ValueError:
        return dict(call)
    return {**call, "function": {**function, "arguments": arguments}} if isinstance(arguments, dict) else dict(call)
