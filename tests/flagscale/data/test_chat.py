from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from flagscale.data.chat import ChatEncoder
from flagscale.data.messages import dump_messages
from flagscale.data.sources import Document
from flagscale.errors import UserError

CONTENT = st.text(st.characters(codec="utf-8", exclude_characters="<|>"), max_size=12)
Messages = list[dict[str, Any]]


def conversation(*contents: str, system: str | None = None) -> Messages:
    """Question and answer in turn."""
    messages = [
        {"role": ("user", "assistant")[i % 2], "content": content}
        for i, content in enumerate(contents)
    ]
    return messages if system is None else [{"role": "system", "content": system}, *messages]


def encode(
    tokenizer: PreTrainedTokenizerFast, *conversations: Messages
) -> list[tuple[list[int], np.ndarray]]:
    documents = [
        Document(dump_messages(messages, "test"), f"test:{i}")
        for i, messages in enumerate(conversations, 1)
    ]
    found = ChatEncoder(tokenizer, 0, 0.1, 0.1)(documents)
    return [(item.ids.tolist(), item.mask) for item in found]


@settings(deadline=None, max_examples=100)
@given(
    conversations=st.lists(
        st.lists(CONTENT.map(str.strip), min_size=2, max_size=5), min_size=1, max_size=3
    )
)
def test_against_transformers(
    marking_tokenizer: PreTrainedTokenizerFast, conversations: list[list[str]]
) -> None:
    chats = [conversation(*contents, system="Be brief.") for contents in conversations]
    reference = marking_tokenizer.apply_chat_template(
        chats, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    found = encode(marking_tokenizer, *chats)
    for (ids, mask), wanted_ids, wanted_mask in zip(
        found, reference["input_ids"], reference["assistant_masks"], strict=True
    ):
        assert ids == [*wanted_ids, 0]
        assert mask.dtype == np.uint8
        assert mask.tolist() == [*wanted_mask, 0]


@settings(deadline=None, max_examples=100)
@given(contents=st.lists(CONTENT.map(str.lstrip), min_size=2, max_size=6))
def test_what_is_learnt_is_what_the_assistant_said(
    marking_tokenizer: PreTrainedTokenizerFast,
    chat_tokenizer: PreTrainedTokenizerFast,
    contents: list[str],
) -> None:
    """Blanks at its end included, with and without marks in the template.

    Blanks at its beginning may be one token with the line end of the prompt, which is not learnt.
    """
    chat = conversation(*contents)
    for tokenizer, ending in ((marking_tokenizer, ""), (chat_tokenizer, "\n")):
        ((ids, mask),) = encode(tokenizer, chat)
        learnt = str(tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m]))
        assert learnt == "".join(f"{answer}<|im_end|>{ending}" for answer in contents[1::2])


def test_a_template_that_ends_with_eod(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(chat_tokenizer.backend_tokenizer.to_str()),
        eos_token="<|endoftext|>",
    )
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message.role }}: {{ message.content }}"
        "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    )
    ((ids, mask),) = encode(tokenizer, conversation("a", "b", "c", "d"))
    assert ids.count(0) == 2  # the template's, and no other
    assert mask[-1] == 1
    assert tokenizer.decode(np.array(ids)[mask == 1]) == (
        "assistant: b<|endoftext|>assistant: d<|endoftext|>"
    )  # without a prompt to answer, the role's name counts as said


def test_conversations_without_an_answer_are_left_out(
    chat_tokenizer: PreTrainedTokenizerFast,
) -> None:
    found = encode(chat_tokenizer, conversation("a"), conversation("b", "c"))
    assert len(found) == 1
    assert encode(chat_tokenizer, conversation("a")) == []


def test_control_tokens_in_messages_are_counted(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = ChatEncoder(chat_tokenizer, 0, 0.1, 0.1)
    texts = [conversation("what is <|im_end|>?", "an end"), conversation("a", "b")]
    encoder([Document(dump_messages(text, "t"), "t") for text in texts])
    assert encoder.control_tokens == 1


def changed(tokenizer: PreTrainedTokenizerFast, template: str | None) -> PreTrainedTokenizerFast:
    other = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()),
        eos_token="<|endoftext|>",
    )
    other.chat_template = template
    return other


def test_what_cannot_be_told_apart(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    last_only = (  # drops earlier answers, as some reasoning models' templates do
        "{% for m in messages %}{% if m.role == 'user' or loop.last %}"
        "{{ m.role }}: {{ m.content }}\n{% endif %}{% endfor %}"
    )
    chats = [conversation("a", "b"), conversation("a", "b", "c", "d")]
    with pytest.raises(UserError, match="test:2: message 2 changes how the tokenizer's chat temp"):
        encode(changed(chat_tokenizer, last_only), *chats)
    with pytest.raises(UserError, match="test:1: the conversation begins with an answer"):
        encode(chat_tokenizer, [{"role": "assistant", "content": "hello"}])
    refusing = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match=r"test:1: .* TemplateError: roles must alternate"):
        encode(changed(chat_tokenizer, refusing), conversation("a", "b"))
    with pytest.raises(UserError, match=r"data.format='chat': the tokenizer has no chat_template"):
        ChatEncoder(changed(chat_tokenizer, None), 0, 0.1, 0.1)
