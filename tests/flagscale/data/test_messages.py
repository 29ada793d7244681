from typing import Any

import pytest

from flagscale.data.messages import columns, dump_conversation, identity, load_conversation
from flagscale.data.rows import BadRow

USER = {"role": "user", "content": "a"}


def read(row: dict[str, Any]) -> list[dict[str, Any]]:
    return load_conversation(dump_conversation(row, "messages", "here")).messages


def test_round_trip() -> None:
    messages = [
        {"role": "user", "content": "Grüß Gott", "name": None},
        {"content": "hello", "role": "assistant", "mood": {"b": 1, "a": None}},
    ]
    row = {"messages": messages, "tools": [{"b": {"y": 1, "x": None, "w": 2}}], "id": 7}
    text = dump_conversation(row, "messages", "here")
    conversation = load_conversation(text)
    assert conversation.messages == [
        {"role": "user", "content": "Grüß Gott"},
        {"role": "assistant", "content": "hello", "mood": {"b": 1}},
    ]
    assert conversation.tools == [{"b": {"y": 1, "w": 2}}]
    assert list(conversation.tools[0]["b"]) == ["y", "w"]  # templates write them in this order
    assert (conversation.documents, conversation.arguments) == (None, {})
    other = {"messages": [dict(reversed(message.items())) for message in messages]}
    again = load_conversation(dump_conversation(other, "messages", "here"))
    assert identity(again) == identity(conversation)
    for nothing in (None, [], "", "[]"):
        assert dump_conversation({"messages": nothing}, "messages", "here") == ""


def test_which_columns() -> None:
    names = ["id", "tools", "messages", "conversations"]
    assert columns("messages", names) == ["messages", "tools"]
    assert columns("messages", ["conversations", "system"]) == ["conversations", "system"]
    assert columns("talk", names) == []


@pytest.mark.parametrize(
    ("message", "wanted"),
    [
        ({"from": "human", "value": "a"}, USER),
        ({"from": "gpt", "value": "a"}, {"role": "assistant", "content": "a"}),
        ({"from": "observation", "value": "a"}, {"role": "tool", "content": "a"}),
        (
            {"from": "function_call", "value": '{"name": "f", "arguments": {"x": null}}'},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {"type": "function", "function": {"name": "f", "arguments": {"x": None}}}
                ],
            },
        ),
        (
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"text": "b"}, "c"]},
            {"role": "user", "content": "abc"},
        ),
        (
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {"id": "1", "function": {"name": "f", "arguments": '{"b": 1, "a": null}'}}
                ],
            },
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {
                        "type": "function",
                        "id": "1",
                        "function": {"name": "f", "arguments": {"b": 1, "a": None}},
                    }
                ],
            },
        ),
        (
            {"role": "assistant", "function_call": {"name": "f", "arguments": "not JSON"}},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {"type": "function", "function": {"name": "f", "arguments": "not JSON"}}
                ],
            },
        ),
        (
            {"role": "assistant", "content": "a", "tool_calls": []},
            {"role": "assistant", "content": "a"},
        ),
        ({"role": "function", "content": "7"}, {"role": "tool", "content": "7"}),
        (
            {"role": "assistant", "content": None, "reasoning_content": "hm"},
            {"role": "assistant", "content": "", "reasoning_content": "hm"},
        ),
    ],
)
def test_forms_of_a_message(message: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert read({"messages": [USER, message]}) == [USER, wanted]


def test_forms_of_a_row() -> None:
    said = [{"from": "human", "value": "a"}]
    system = {"role": "system", "content": "Be brief."}
    assert read({"conversations": said}) == [USER]
    assert read({"conversations": said, "system": "Be brief."}) == [system, USER]
    assert read({"messages": [USER], "system": "Linux"}) == [USER]
    row = {"messages": '[{"role": "user", "content": "a"}]', "tools": '[{"name": "f"}]'}
    conversation = load_conversation(dump_conversation(row, "messages", "here"))
    assert conversation.messages == [USER]
    assert conversation.tools == [{"name": "f"}]
    row = {"messages": [USER], "tools": [], "documents": None, "chat_template_kwargs": {"a": None}}
    assert load_conversation(dump_conversation(row, "messages", "here"))[1:] == (None, None, {})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("hello", "here: field 'messages' is text, but no JSON: str 'hello'"),
        ('{"a": 1}', "field 'messages' must be a list of messages, found dict"),
        (7, "field 'messages' must be a list of messages, found int '7'"),
        (["hello"], "here: message 1 must be an object, found str 'hello'"),
        ([{"role": "user"}], "message 1: no 'content'; it has: role"),
        ([{"role": "user", "content": 7}], "message 1: 'content' must be text, found int '7'"),
        ([{"content": "a"}], "message 1: 'role' must be text, found .* it has: content"),
        ([{"from": "alien", "value": "a"}], "'from' is 'alien', and must be one of human, user"),
        ([{"role": "user", "content": [{"type": "image"}]}], "'content' is str 'image', but only"),
        ([{"role": "assistant", "tool_calls": [{"id": 1}]}], "a tool call has no function's name"),
        ([USER | {"weight": 0.5}], "'weight' must be 0 or 1, found 0.5"),
    ],
)
def test_what_is_no_conversation(value: object, message: str) -> None:
    with pytest.raises(BadRow, match=message):
        dump_conversation({"messages": value}, "messages", "here")


def test_what_is_beside_and_wrong() -> None:
    for key, value in (("tools", {"a": 1}), ("chat_template_kwargs", [1]), ("tools", "f(x)")):
        with pytest.raises(BadRow, match=f"here: field '{key}'"):
            dump_conversation({"messages": [USER], key: value}, "messages", "here")
