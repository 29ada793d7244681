"""Whether a text stands in what a chat template has written, and where."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from flagscale.data.messages import REASONING, Message


class Place(NamedTuple):
    """Characters of a rendering.

    Attributes:
        start: the first.
        stop: after the last.
        is_exact: nothing was trimmed and no blank is another.
    """

    start: int
    stop: int
    is_exact: bool


def find(piece: str, text: str, start: int = 0) -> Place | None:
    """The first place from `start` on where a text stands, blanks aside; as JSON's string too."""
    for form in (piece, _quoted(piece)):
        place = text.find(form, start)
        if place >= 0:
            return Place(place, place + len(form), True)
    wanted = "".join(piece.split())
    if not wanted:
        return Place(start, start, not piece)
    places = [i for i in range(start, len(text)) if not text[i].isspace()]
    written = "".join([text[i] for i in places])
    for form in (wanted, "".join(_quoted(piece).split())):
        place = written.find(form)
        if place >= 0:
            return Place(places[place], places[place + len(form) - 1] + 1, False)
    return None


def pieces(message: Message) -> Iterator[tuple[str, str]]:
    """What an answer consists of, in the order of writing: the message's key and the text."""
    reasoning = next((key for key in REASONING if message.get(key)), None)
    if reasoning is not None:
        yield reasoning, str(message[reasoning])
    if message["content"]:
        yield "content", message["content"]


def calls(message: Message) -> Iterator[str]:
    """Names and texts in an answer's tool calls, whose form is the template's own."""
    for call in message.get("tool_calls", ()):
        yield call["function"]["name"]
        yield from _texts(call["function"]["arguments"])


def tool_names(tools: list[Any]) -> Iterator[str]:
    """Of tools that may be called."""
    for tool in tools:
        if isinstance(tool, dict):
            function = tool.get("function", tool)
            if isinstance(function, dict) and isinstance(function.get("name"), str):
                yield function["name"]


def _texts(value: Any) -> Iterator[str]:  # noqa: ANN401 - JSON
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]
