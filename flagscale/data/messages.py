"""Conversations as they come in rows: messages, and what else a chat template takes.

Read are `[{"role": ..., "content": ...}, ...]`, ShareGPT's `[{"from": ..., "value": ...}, ...]`,
and JSON text of either. A row may also hold `tools`, `documents` and `chat_template_kwargs`, by the
names that transformers and TRL know them by.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from flagscale.data.rows import BadRow

ASSISTANT = "assistant"
MESSAGES = "messages"
REASONING = ("reasoning_content", "thinking", "reasoning")  # as transformers knows it
Message = dict[str, Any]

_SHAREGPT = "conversations"
_BESIDE = ("tools", "documents", "chat_template_kwargs", "system")
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": ASSISTANT,
    "chatgpt": ASSISTANT,
    "assistant": ASSISTANT,
    "function_call": ASSISTANT,
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}


class Conversation(NamedTuple):
    """What a chat template is given.

    Attributes:
        messages: each with a role, and a text as content; None beside nothing but `tool_calls`.
        tools: that may be called, as JSON schemas.
        documents: to answer from.
        arguments: others, by the template's names.
    """

    messages: list[Message]
    tools: list[Any] | None = None
    documents: list[Any] | None = None
    arguments: dict[str, Any] = {}  # noqa: RUF012 - never changed


def columns(field: str, names: Iterable[str]) -> list[str]:
    """Which of a row's keys a conversation is read from.

    Args:
        field: `data.messages_field`.
        names: keys that there are.
    """
    there = list(names)
    if field == MESSAGES and field not in there:
        field = _SHAREGPT
    return [name for name in (field, *_BESIDE) if name in there] if field in there else []


def dump_conversation(row: Mapping[str, Any], field: str, where: str) -> str:
    """A row's conversation as JSON text; empty text for none at all.

    Keys without a value are left out, at every depth: columnar formats give every message and every
    tool all keys. Keys beside `role` and `content` are kept, since templates may use them.

    Args:
        row: has one of `columns`.
        field: `data.messages_field`.
        where: the row, for messages.

    Raises:
        BadRow: it is no conversation in text.
    """
    name = field if field in row else _SHAREGPT
    found = _parsed(row.get(name), f"field {name!r}", where)
    if found is None:
        return ""
    if not isinstance(found, list):
        raise BadRow(where, f"field {name!r} must be a list of messages, found {_shown(found)}")
    messages = [_message(item, i, where) for i, item in enumerate(found, 1)]
    if not messages:
        return ""
    given = {key: _parsed(row.get(key), f"field {key!r}", where) for key in _BESIDE[:3]}
    for key, kind in (("tools", list), ("documents", list), ("chat_template_kwargs", dict)):
        if given[key] and not isinstance(given[key], kind):
            raise BadRow(
                where, f"field {key!r} must be a {kind.__name__}, found {_shown(given[key])}"
            )
    system = row.get("system")
    is_sharegpt = isinstance(found[0], dict) and "from" in found[0]
    if is_sharegpt and isinstance(system, str) and system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    tools, documents, arguments = (given[key] or None for key in _BESIDE[:3])
    return json.dumps(
        (messages, tools, documents, arguments or {}), ensure_ascii=False, default=str
    )


def load_conversation(text: str) -> Conversation:
    """The conversation that `dump_conversation` has written."""
    return Conversation(*json.loads(text))


def identity(conversation: Conversation) -> bytes:
    """Equal for equal messages, in whatever order their keys were."""
    return json.dumps(conversation.messages, ensure_ascii=False, sort_keys=True).encode()


def _message(value: object, number: int, where: str) -> Message:
    which = f"message {number}"
    if not isinstance(value, dict):
        raise BadRow(where, f"{which} must be an object, found {_shown(value)}")
    message = _without_none(value)
    if "role" not in message and "from" in message:
        message = _from_sharegpt(message, which, where)
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise BadRow(
            where,
            f"{which}: 'role' must be text, found {_shown(role)}; it has: {', '.join(message)}",
        )
    if role == "function":
        message["role"] = "tool"
    _name_calls(message, which, where)
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(_text_of(part, which, where) for part in content)
    if content is None and not message.get("tool_calls"):
        content = "" if any(message.get(key) for key in REASONING) else content
    elif content is not None and not isinstance(content, str):
        raise BadRow(where, f"{which}: 'content' must be text, found {_shown(content)}")
    if content is None and not message.get("tool_calls"):
        raise BadRow(where, f"{which}: no 'content'; it has: {', '.join(message)}")
    if message.get("weight", 1) not in (0, 1):
        raise BadRow(where, f"{which}: 'weight' must be 0 or 1, found {message['weight']!r}")
    return {**message, "content": content}


def _from_sharegpt(message: Message, which: str, where: str) -> Message:
    """The same by the names that templates use."""
    spoken = {key: item for key, item in message.items() if key not in ("from", "value")}
    role = _ROLES.get(str(message["from"]).lower())
    if role is None:
        known = ", ".join(_ROLES)
        raise BadRow(where, f"{which}: 'from' is {message['from']!r}, and must be one of {known}")
    if message["from"] == "function_call":
        call = _parsed(message.get("value"), f"{which}: 'value' of a function_call", where)
        return {"role": role, "tool_calls": call if isinstance(call, list) else [call], **spoken}
    return {"role": role, "content": message.get("value"), **spoken}


def _name_calls(message: Message, which: str, where: str) -> None:
    """`tool_calls` as templates read them: not empty, functions with arguments as objects."""
    calls = message.pop("tool_calls", None) or []
    if isinstance(calls, str):
        calls = _parsed(calls, f"{which}: 'tool_calls'", where) or []
    if not isinstance(calls, list):
        raise BadRow(where, f"{which}: 'tool_calls' must be a list, found {_shown(calls)}")
    old = message.pop("function_call", None)
    if old is not None:
        calls = [*calls, old]
    named = []
    for call in calls:
        if not isinstance(call, dict):
            raise BadRow(where, f"{which}: a tool call must be an object, found {_shown(call)}")
        function = call.get("function", call)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRow(where, f"{which}: a tool call has no function's name: {_shown(call)}")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):  # OpenAI's form, which templates would quote once more
            try:
                parsed = json.loads(arguments)
            except ValueError:
                parsed = arguments
            arguments = parsed if isinstance(parsed, dict) else arguments
        function = {**function, "arguments": arguments}
        outer = {"type": "function", **call} if "function" in call else {"type": "function"}
        named.append({**outer, "function": function})
    if named:
        message["tool_calls"] = named


def _text_of(part: object, which: str, where: str) -> str:
    """The text of one part of a content, which templates write one after the other."""
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and part.get("type", "text") == "text":
        text = part.get("text")
        if isinstance(text, str):
            return text
    kind = part.get("type") if isinstance(part, dict) else part
    raise BadRow(where, f"{which}: a part of 'content' is {_shown(kind)}, but only text is learnt")


def _parsed(value: Any, what: str, where: str) -> Any:  # noqa: ANN401 - whatever a row holds
    """Without keys that have no value; JSON text is read first."""
    if isinstance(value, str):
        if not value.strip():
            return None
        try:
            return json.loads(value)
        except (ValueError, RecursionError) as error:
            raise BadRow(
                where, f"{what} is text, but no JSON: {_shown(value)} ({str(error)[:80]})"
            ) from None
    return _without_none(value)


def _without_none(value: Any) -> Any:  # noqa: ANN401 - whatever a row holds
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [_without_none(item) for item in value]
    return value


def _shown(value: object) -> str:
    return f"{type(value).__name__} {str(value)[:40]!r}"
