"""Conversations as they come in rows: `[{"role": ..., "content": ...}, ...]`."""

from __future__ import annotations

import json
from typing import Any

from flagscale.data.rows import BadRow

ASSISTANT = "assistant"
Message = dict[str, Any]


def dump_messages(value: object, where: str) -> str:
    """A conversation as JSON text, equal for equal conversations; empty text for none at all.

    Keys without a value are left out: columnar formats give every message every key. Keys beside
    `role` and `content` are kept, since templates may use them.

    Args:
        value: what the row holds.
        where: the row, for messages.

    Raises:
        BadRow: it is no list of messages with a role and text.
    """
    if value is None:
        return ""
    if not isinstance(value, list):
        raise BadRow(
            where, f"must be a list of messages, found {type(value).__name__} {str(value)[:40]!r}"
        )
    messages = [_message(item, f"{where}, message {i}") for i, item in enumerate(value, 1)]
    if not messages:
        return ""
    return json.dumps(messages, ensure_ascii=False, sort_keys=True, default=str)


def load_messages(text: str) -> list[Message]:
    """The messages that `dump_messages` has written."""
    messages: list[Message] = json.loads(text)
    return messages


def _message(value: object, where: str) -> Message:
    if not isinstance(value, dict):
        raise BadRow(where, f"must be an object, found {str(value)[:40]!r}")
    message = {key: item for key, item in value.items() if item is not None}
    for key in ("role", "content"):
        if not isinstance(message.get(key), str):
            raise BadRow(
                where,
                f"{key!r} must be text, found {str(value.get(key))[:40]!r}; "
                f"the message has: {', '.join(map(str, message))}",
            )
    return message
