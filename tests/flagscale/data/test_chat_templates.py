"""Every character of every answer is learnt, once, or told, whatever the template's form."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from flagscale.data.chat import ChatEncoder
from flagscale.data.encoder import EncodedDocument
from flagscale.data.messages import dump_conversation
from flagscale.data.rows import BadRow
from flagscale.data.sources import Document
from tests.flagscale.data.chat_templates import FORMS

SYSTEM = {"role": "system", "content": "Be brief."}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a place",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
    },
}
PLACE = 'Bad "Zell" \u00fc'


def call(**changes: Any) -> dict[str, Any]:
    function = {"name": "weather", "arguments": {"unit": "C", "place": PLACE}}
    made = {"type": "function", "id": "abcdefghi", "function": function} | changes
    return {"role": "assistant", "content": None, "tool_calls": [made]}


def talk(*contents: str) -> list[dict[str, Any]]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


@pytest.fixture(scope="session")
def tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    """A token a byte, so that what is learnt can be told to the character."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    found = {}
    for name, form in FORMS.items():
        vocabulary = {"<pad>": 0} | {byte: i for i, byte in enumerate(alphabet, 1)}
        backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend, bos_token="<s>", eos_token="</s>"
        )
        tokenizer.chat_template = form.template
        found[name] = tokenizer
    return found


def encode(
    tokenizer: PreTrainedTokenizerFast, row: dict[str, Any], **changes: Any
) -> tuple[list[EncodedDocument | BadRow], ChatEncoder]:
    arguments = {"seq_length": 100_000} | changes
    encoder = ChatEncoder(tokenizer, 0, 0.1, 0.1, **arguments)
    try:
        text = dump_conversation(row, "messages", "here")
    except BadRow as error:
        return [error], encoder
    return encoder([Document(text, "here")]), encoder


def learnt(tokenizer: PreTrainedTokenizerFast, items: list[EncodedDocument | BadRow]) -> list[str]:
    """Each stretch of what is learnt, of all texts."""
    found = []
    for item in items:
        assert not isinstance(item, BadRow), item
        assert item.mask is not None
        edges = np.flatnonzero(np.diff(np.concatenate([[0], item.mask, [0]])))
        found += [str(tokenizer.decode(item.ids[a:b])) for a, b in edges.reshape(-1, 2)]
    return found


def whole(tokenizer: PreTrainedTokenizerFast, item: EncodedDocument | BadRow) -> str:
    assert not isinstance(item, BadRow), item
    return str(tokenizer.decode(item.ids[:-1] if item.ids[-1] == 0 else item.ids))


@pytest.mark.parametrize("name", FORMS)
def test_two_turns(name: str, tokenizers: dict[str, PreTrainedTokenizerFast]) -> None:
    form, tokenizer = FORMS[name], tokenizers[name]
    answers = ["One.\n\n<b>Two</b>  ", " Drei \u00fc\u4e16\n"]
    messages = [SYSTEM, *talk("Hi", answers[0], "And?", answers[1])]
    found, encoder = encode(tokenizer, {"messages": messages})
    wanted = [text.strip() if form.strip == "both" else text for text in answers]
    if name == "Qwen3":  # as it writes an answer that was just given
        wanted = [f"<think>\n\n</think>\n\n{text}" for text in wanted]
    if name == "Mistral":  # it has no prompt to answer but the question's end
        wanted = [f" {text}" for text in wanted]
    assert learnt(tokenizer, found) == [text + form.end for text in wanted]
    assert all("Be brief." in whole(tokenizer, item) for item in found)
    rewrites = name in ("Qwen3", "Phi-4-mini", "Mistral")
    assert len(found) == 1 + rewrites
    assert encoder.counts.several_texts == rewrites
    assert encoder.counts.changed_answers == (2 if form.strip == "both" else 0)
    assert encoder.counts.changed_prompts == 0
    assert encoder.template.tells_the_date == (name == "Llama 3")
    last, _ = encode(tokenizer, {"messages": messages}, last_only=True)
    assert learnt(tokenizer, last) == [wanted[1] + form.end]
    assert whole(tokenizer, last[0]) == whole(tokenizer, found[-1])


@pytest.mark.parametrize("name", FORMS)
def test_thoughts(name: str, tokenizers: dict[str, PreTrainedTokenizerFast]) -> None:
    form, tokenizer = FORMS[name], tokenizers[name]
    said = "<think>\nhm\n</think>\n\nyes"
    row = {"messages": talk("Hi", said, "Sure?", said)}
    found, _ = encode(tokenizer, row)
    if not form.thoughts:
        assert str(found[0]).startswith(
            "here: message 2: the chat template does not write all of its content ('<think>"
        )
    else:
        begin = " " if name == "Mistral" else ""
        assert learnt(tokenizer, found) == [begin + said + form.end] * 2
    apart = {"role": "assistant", "content": "yes", "reasoning_content": "hm"}
    found, _ = encode(tokenizer, {"messages": [*talk("Hi"), apart]})
    if name == "Qwen3":
        assert learnt(tokenizer, found) == [said + form.end]
    else:
        assert "does not write all of its reasoning_content ('hm')" in str(found[0])


@pytest.mark.parametrize("name", FORMS)
def test_tools(name: str, tokenizers: dict[str, PreTrainedTokenizerFast]) -> None:
    form, tokenizer = FORMS[name], tokenizers[name]
    messages = [
        *talk("How is it?"),
        call(),
        {"role": "tool", "content": "{7}"},
        {"role": "assistant", "content": "Cold."},
    ]
    found, _ = encode(tokenizer, {"messages": messages, "tools": [TOOL]})
    if not form.tools:
        assert "the chat template does not write tools, which the row has" in str(found[0])
        return
    calling, cold = learnt(tokenizer, found)
    arguments = json.dumps({"unit": "C", "place": PLACE}, ensure_ascii=False)
    assert arguments in calling  # in the order that they were in
    assert calling.endswith(form.end)
    assert cold.endswith("Cold." + form.end)
    assert cold.count("Cold.") == 1
    assert json.dumps(TOOL) in whole(tokenizer, found[-1])
    # the same in other forms
    as_text = call(function={"name": "weather", "arguments": arguments})
    (first, *_), _ = encode(
        tokenizer,
        {"messages": json.dumps([*talk("How is it?"), as_text]), "tools": json.dumps([TOOL])},
    )
    assert learnt(tokenizer, [first]) == [calling]


def test_calls_without_declared_tools(tokenizers: dict[str, PreTrainedTokenizerFast]) -> None:
    """R1's form takes an answer for a call by its content, which is none."""
    for name, form in FORMS.items():
        found, _ = encode(tokenizers[name], {"messages": [*talk("How is it?"), call()]})
        if form.tools or name == "R1":
            (calling,) = learnt(tokenizers[name], found)
            assert "weather" in calling
            assert "None" not in calling
        else:
            assert "does not write its tool_calls ('weather')" in str(found[0])


def test_what_is_lost_beside_a_call(tokenizers: dict[str, PreTrainedTokenizerFast]) -> None:
    said = call() | {"content": "Let me see."}
    row = {"messages": [*talk("Hi"), said], "tools": [TOOL]}
    found, _ = encode(tokenizers["Llama 3"], row)
    assert "does not write all of its content ('Let me see.')" in str(found[0])
    found, _ = encode(tokenizers["Qwen2.5"], row)
    assert learnt(tokenizers["Qwen2.5"], found)[0].startswith("Let me see.\n<tool_call>")


@pytest.mark.parametrize(
    ("name", "messages", "message"),
    [
        ("Mistral", talk("a", "b")[::-1], "TemplateError: roles must alternate"),
        ("Gemma 3", talk("a", "b", "c")[1:], "TemplateError: Conversation roles must alternate"),
        ("Gemma 3", [*talk("a"), *talk("b", "c")], "roles must alternate"),
        (
            "Mistral",
            [*talk("a"), call(id="1")],
            "TemplateError: tool call IDs must have nine characters",
        ),
    ],
)
def test_what_a_template_refuses(
    name: str,
    messages: list[dict[str, Any]],
    message: str,
    tokenizers: dict[str, PreTrainedTokenizerFast],
) -> None:
    found, _ = encode(tokenizers[name], {"messages": messages})
    assert f"here: the chat template refuses this conversation: {message}" in str(found[0]) or (
        message in str(found[0])
    )


def test_an_answer_first(tokenizers: dict[str, PreTrainedTokenizerFast]) -> None:
    """Templates that cannot write a prompt of nothing, too."""
    for name in ("Llama 3", "SmolLM2", "Phi-4"):
        found, _ = encode(tokenizers[name], {"messages": talk("Hi", "Hello", "a", "b")[1:]})
        first, second = learnt(tokenizers[name], found)
        assert first.endswith("Hello" + FORMS[name].end)
        assert second == "b" + FORMS[name].end


def test_arguments(tokenizers: dict[str, PreTrainedTokenizerFast]) -> None:
    """`enable_thinking: false` puts the empty thoughts into the prompt, where they are not said."""
    tokenizer, row = tokenizers["Qwen3"], {"messages": talk("Hi", "yes")}
    off = {"enable_thinking": False}
    assert learnt(tokenizer, encode(tokenizer, row)[0]) == [
        "<think>\n\n</think>\n\nyes<|im_end|>\n"
    ]
    for found, _ in (
        encode(tokenizer, row, arguments=off),
        encode(tokenizer, row | {"chat_template_kwargs": off}),
    ):
        assert learnt(tokenizer, found) == ["yes<|im_end|>\n"]
    found, _ = encode(tokenizers["SmolLM2"], row | {"chat_template_kwargs": off})
    assert "does not write enable_thinking, which the row has" in str(found[0])
    found, _ = encode(tokenizers["SmolLM2"], row | {"documents": [{"title": "a", "text": "b"}]})
    assert "does not write documents, which the row has" in str(found[0])


PARTS = ["a", "m", " ", "\n", "<think>", "</think>", '"', "\u00fc", "\u4e16", "<", "assistant"]
CONTENT = st.lists(st.sampled_from(PARTS), max_size=5).map("".join)


@settings(deadline=None, max_examples=150)
@given(name=st.sampled_from(sorted(FORMS)), contents=st.lists(CONTENT, min_size=2, max_size=6))
def test_every_character_once_or_told(
    name: str, contents: list[str], tokenizers: dict[str, PreTrainedTokenizerFast]
) -> None:
    """Blanks aside, which are counted where they are others."""
    form, tokenizer = FORMS[name], tokenizers[name]
    answers = contents[1::2]
    found, encoder = encode(tokenizer, {"messages": talk(*contents)})
    if isinstance(found[0], BadRow):
        assert "</think>" in "".join(answers)
        return
    said = "".join(learnt(tokenizer, found)).split(form.end)
    assert said.pop() == ""
    assert len(said) == len(answers)
    for text, answer in zip(said, answers, strict=True):
        plain, wanted = ("".join(value.split()) for value in (text, answer))
        if name == "R1":  # its prompt begins the answer
            wanted = wanted.removeprefix("<think>")
            plain = plain.removeprefix("<think>")
        assert plain in (wanted, "<think></think>" + wanted, "<think>" + wanted)
        if not encoder.counts.changed_answers and name != "R1":
            assert answer in text
