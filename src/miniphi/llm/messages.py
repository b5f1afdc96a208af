"""Messages as callers write them (Message values, or dicts in OpenAI's shape) -> Message values, checked."""

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from miniphi.chat import Message
from miniphi.errors import InvalidRequestError

__all__ = ["MessageLike", "read_messages"]

MessageLike = Message | Mapping[str, Any]

_KEYS = tuple(field.name for field in fields(Message))


def read_messages(messages: Iterable[MessageLike]) -> list[Message]:
    """Return the messages as Message values.

    Raises:
        InvalidRequestError: there are none, or one has an unknown key or role, or content that is not text; the
            message names which and what is allowed.
    """
    if isinstance(messages, (str, bytes, Mapping)):
        raise InvalidRequestError('messages must be a list of messages, such as [{"role": "user", "content": "Hi"}]')
    checked = [_read(f"messages[{index}]", message) for index, message in enumerate(messages)]
    if not checked:
        raise InvalidRequestError("messages is empty; give at least one message of the user")
    return checked


def _read(where: str, message: MessageLike) -> Message:
    if isinstance(message, Message):
        return message
    if not isinstance(message, Mapping):
        raise InvalidRequestError(f"{where} is a {type(message).__name__}; give a Message or a dict")
    unknown = [key for key in message if key not in _KEYS]
    if unknown:
        raise InvalidRequestError(f"{where} has the unknown key {unknown[0]!r}; known keys: {', '.join(_KEYS)}")
    content = message.get("content")
    if content is not None and not isinstance(content, str):
        raise InvalidRequestError(f"{where}.content is a {type(content).__name__}; give a string")
    tool_calls = message.get("tool_calls")
    try:
        return Message(
            role=message.get("role", ""),
            content=content,
            name=message.get("name"),
            tool_calls=None if tool_calls is None else tuple(tool_calls),
            tool_call_id=message.get("tool_call_id"),
        )
    except InvalidRequestError as error:
        raise InvalidRequestError(f"{where}.{error}") from None
