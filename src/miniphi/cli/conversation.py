"""A chat's messages on disk: one JSON file, written whole or not at all, checked when it is read."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from miniphi.atomic_write import atomic_file
from miniphi.errors import InvalidRequestError

__all__ = ["load_conversation", "save_conversation"]

FORMAT = "miniphi-chat"
VERSION = 1


def save_conversation(path: Path, model: str, messages: Sequence[dict[str, str]]) -> None:
    """Write the conversation to `path`; the file that was there stays as it was if anything fails.

    Raises StorageError if it cannot be written.
    """
    document = {"format": FORMAT, "version": VERSION, "model": model, "messages": list(messages)}
    text = json.dumps(document, ensure_ascii=False, indent=2) + "\n"
    with atomic_file(path, overwrite=True) as file:
        file.write(text.encode())


def load_conversation(path: Path) -> list[dict[str, str]]:
    """Read a conversation that `save_conversation` wrote.

    Raises:
        InvalidRequestError: the file is not one; the message names the file and what is wrong with it.
    """
    try:
        document = json.loads(path.read_bytes())
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise InvalidRequestError(f"{path}: not a JSON file ({error}); give a file that /save wrote") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise InvalidRequestError(f'{path}: has no "format": "{FORMAT}"; give a file that /save wrote')
    if document.get("version") != VERSION:
        raise InvalidRequestError(f"{path}: version is {document.get('version')!r}; this program reads {VERSION}")
    messages = document.get("messages")
    if not isinstance(messages, list):
        raise InvalidRequestError(f"{path}: messages is not a list; give a file that /save wrote")
    return [_message(path, index, message) for index, message in enumerate(messages)]


def _message(path: Path, index: int, message: Any) -> dict[str, str]:
    where = f"{path}: messages[{index}]"
    if not isinstance(message, dict) or set(message) != {"role", "content"}:
        raise InvalidRequestError(f"{where}: expected an object with role and content")
    role, content = message["role"], message["content"]
    if role not in ("system", "user", "assistant"):
        raise InvalidRequestError(f"{where}: role is {role!r}; expected system, user or assistant")
    if role == "system" and index > 0:
        raise InvalidRequestError(f"{where}: a system message can only be the first one")
    if not isinstance(content, str):
        raise InvalidRequestError(f"{where}: content is not text")
    return {"role": role, "content": content}
