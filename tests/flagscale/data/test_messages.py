import pytest

from flagscale.data.messages import dump_messages, load_messages
from flagscale.errors import UserError


def test_round_trip() -> None:
    messages = [
        {"role": "user", "content": "Grüß Gott", "name": None},
        {"content": "hello", "role": "assistant", "tool_calls": [{"id": 1}]},
    ]
    text = dump_messages(messages, "here")
    assert load_messages(text) == [
        {"role": "user", "content": "Grüß Gott"},
        {"role": "assistant", "content": "hello", "tool_calls": [{"id": 1}]},
    ]
    other_order = [dict(reversed(message.items())) for message in messages]
    assert dump_messages(other_order, "here") == text
    assert dump_messages(None, "here") == dump_messages([], "here") == ""


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("hello", "here: must be a list of messages, found str 'hello'"),
        (["hello"], "here, message 1: must be an object, found 'hello'"),
        (
            [{"role": "user"}],
            "message 1: 'content' must be text, found 'None'; the message has",
        ),
        ([{"from": "human", "value": "a"}], "'role' must be text, .* the message has: from, value"),
        ([{"role": "user", "content": [{"type": "image"}]}], "'content' must be text"),
    ],
)
def test_what_is_no_conversation(value: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        dump_messages(value, "here")
