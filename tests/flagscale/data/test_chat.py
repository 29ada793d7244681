from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from flagscale.data.chat import ChatEncoder
from flagscale.data.messages import dump_conversation
from flagscale.data.rows import BadRow
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


def documents(*conversations: Messages) -> list[Document]:
    return [
        Document(dump_conversation({"messages": messages}, "messages", "test"), f"test:{i}")
        for i, messages in enumerate(conversations, 1)
    ]


def encode(
    tokenizer: PreTrainedTokenizerFast, *conversations: Messages
) -> list[tuple[list[int], np.ndarray]]:
    found = []
    for item in ChatEncoder(tokenizer, 0, 0.1, 0.1, seq_length=1000)(documents(*conversations)):
        assert not isinstance(item, BadRow), item
        assert item.mask is not None
        found.append((item.ids.tolist(), item.mask))
    return found


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
    chats = [chat if chat[-1]["role"] == "assistant" else chat[:-1] for chat in chats]
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
@given(contents=st.lists(CONTENT, min_size=2, max_size=6))
def test_what_is_learnt_is_what_the_assistant_said(
    marking_tokenizer: PreTrainedTokenizerFast,
    chat_tokenizer: PreTrainedTokenizerFast,
    contents: list[str],
) -> None:
    """Blanks at its ends included, with and without marks in the template.

    Those at its beginning may be one token with the line end of the prompt, which is then learnt.
    """
    chat = conversation(*contents)
    for tokenizer, ending in ((marking_tokenizer, ""), (chat_tokenizer, "\n")):
        ((ids, mask),) = encode(tokenizer, chat)
        learnt = str(tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m]))
        said = learnt.split(f"<|im_end|>{ending}")
        assert said.pop() == ""
        for text, answer in zip(said, contents[1::2], strict=True):
            assert text in (answer, f"\n{answer}")
            assert text == answer or answer[0].isspace()


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
    encoder = ChatEncoder(chat_tokenizer, 0, 0.1, 0.1, 1000)
    encoder(documents(conversation("what is <|im_end|>?", "an end"), conversation("a", "b")))
    assert encoder.counts.control_tokens == 1
    assert encoder.end_ids == {chat_tokenizer.convert_tokens_to_ids("<|im_end|>")}


def changed(tokenizer: PreTrainedTokenizerFast, template: str | None) -> PreTrainedTokenizerFast:
    other = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()),
        eos_token="<|endoftext|>",
    )
    other.chat_template = template
    return other


LAST_ONLY = (  # drops earlier answers, as some reasoning models' templates do
    "{% for m in messages %}{% if m.role == 'user' or loop.last %}"
    "{{ m.role }}: {{ m.content }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def test_a_template_that_drops_earlier_answers(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    """Each answer is learnt where it is the last; they are one document of the corpus."""
    tokenizer = changed(chat_tokenizer, LAST_ONLY)
    encoder = ChatEncoder(tokenizer, 0, 0.1, 0.1, 1000)
    first, second = encoder(documents(conversation("a", "b", "c", "d")))
    texts = []
    for item in (first, second):
        assert not isinstance(item, BadRow)
        texts.append((tokenizer.decode(item.ids), tokenizer.decode(item.ids[item.mask == 1])))
    assert texts == [
        ("user: a\nassistant: b\n<|endoftext|>", " b\n"),  # one token
        ("user: a\nuser: c\nassistant: d\n<|endoftext|>", " d\n"),
    ]
    assert first.split == second.split
    assert (first.characters, second.characters, second.hash64) == (4, 0, None)


def test_what_is_refused(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    """One conversation alone, or, where no conversation could be written, all of them."""
    picky = changed(
        chat_tokenizer,
        "{% for m in messages %}{% if m.content == 'no' %}{{ raise_exception('not this') }}"
        "{% elif m.content != 'lost' %}{{ m.content }};{% endif %}{% endfor %}",
    )
    chats = [conversation("a", "b"), conversation("a", "no"), conversation("a", "lost")]
    good, refused, lost = sorted(
        ChatEncoder(picky, 0, 0.1, 0.1, 1000)(documents(*chats)),
        key=lambda item: (isinstance(item, BadRow), str(item)),
    )
    assert not isinstance(good, BadRow)
    assert str(refused).startswith("test:2: the chat template refuses this conversation: Template")
    assert str(lost).startswith("test:3: message 2: the chat template does not write all of its co")
    with pytest.raises(UserError, match=r"no chat_template .* give one in data.chat_template"):
        ChatEncoder(changed(chat_tokenizer, None), 0, 0.1, 0.1, 1000)
    with pytest.raises(UserError, match=r"chat_template_kwargs: thinking: .* it has: .*messages"):
        ChatEncoder(chat_tokenizer, 0, 0.1, 0.1, 1000, {"thinking": False})


def test_marks_that_hold_less_than_an_answer(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    """What a template's author does not want learnt is not learnt, and told."""
    template = (
        "{% for m in messages %}{{ m.role }}: "
        "{% if loop.last %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}\n{% endfor %}"
    )
    encoder = ChatEncoder(changed(chat_tokenizer, template), 0, 0.1, 0.1, 1000)
    encoder(documents(conversation("a", "b", "c", "d")))
    assert encoder.counts.unmarked_answers == 0  # each of them is the last in its own text
    template = template.replace("{{ m.content }}{% endgen", "{{ m.content[:1] }}{% endgen").replace(
        "{% endgeneration %}", "{% endgeneration %}{{ m.content[1:] }}"
    )
    encoder = ChatEncoder(changed(chat_tokenizer, template), 0, 0.1, 0.1, 1000)
    (item,) = encoder(documents(conversation("a", "bcd")))
    assert not isinstance(item, BadRow)
    assert encoder.counts.unmarked_answers == 1


def test_weights(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    """OpenAI's: an answer with weight 0 is context alone."""
    chat = conversation("a", "b", "c", "d")
    chat[1]["weight"] = 0
    ((ids, mask),) = encode(chat_tokenizer, chat)
    assert chat_tokenizer.decode(np.array(ids)[mask == 1]) == "d<|im_end|>\n"
    chat[3]["weight"] = 0
    encoder = ChatEncoder(chat_tokenizer, 0, 0.1, 0.1, 1000)
    assert encoder(documents(chat)) == []
    assert encoder.counts.left_out == 1


def test_what_is_too_long(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    """An answer keeps its start; what has nothing to learn is left out, and its length known."""
    chats = [conversation("a", "b " * 9), conversation("a " * 99, "b"), conversation("a", "b")]
    whole = encode(chat_tokenizer, *chats)
    starts = [int(np.flatnonzero(mask)[0]) for _, mask in whole]
    ends = [int(np.flatnonzero(mask)[-1]) for _, mask in whole]
    seq_length = starts[0] + 3  # four tokens of the first answer are labels
    encoder = ChatEncoder(chat_tokenizer, 0, 0.1, 0.1, seq_length)
    found = encoder(documents(*chats))
    assert len(found) == 2
    counts = encoder.counts
    assert counts.too_long == 1
    assert counts.lost_answers == 2 + (ends[2] > seq_length)
    assert counts.lost_tokens == sum(mask[seq_length + 1 :].sum() for _, mask in whole)
    assert counts.seq_length_for_some == starts[1]
    assert counts.seq_length_for_all == max(ends)
    for length, kept in ((starts[1] - 1, 2), (starts[1], 3)):
        assert len(ChatEncoder(chat_tokenizer, 0, 0.1, 0.1, length)(documents(*chats))) == kept
    enough = ChatEncoder(chat_tokenizer, 0, 0.1, 0.1, counts.seq_length_for_all)
    enough(documents(*chats))
    assert enough.counts.lost_tokens == enough.counts.too_long == 0
