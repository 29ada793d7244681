import hashlib
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from flagscale.data.document_tokens import DocumentTokens
from flagscale.data.encoder import EncodedDocument, Encoder, choose_split
from flagscale.data.sources import Document

WITHOUT_BOS = DocumentTokens(eod=0, bos=None)
TEXT = st.text(st.characters(codec="utf-8"), max_size=80)


@pytest.fixture(scope="session")
def encoder(tokenizer: PreTrainedTokenizerFast) -> Encoder:
    return Encoder(tokenizer, WITHOUT_BOS, 0.1, 0.1)


def encode(encoder: Encoder, *texts: str) -> list[EncodedDocument]:
    return encoder([Document(text, "test") for text in texts])


@settings(deadline=None, max_examples=200)
@given(texts=st.lists(TEXT | st.just("a<|endoftext|>b"), max_size=5))
def test_tokens_read_back_as_the_text(
    tokenizer: PreTrainedTokenizerFast, encoder: Encoder, texts: list[str]
) -> None:
    for text, item in zip(texts, encode(encoder, *texts), strict=True):
        assert item.ids[-1] == 0
        assert not np.isin(item.ids[:-1], [0, 1]).any()
        assert tokenizer.decode(item.ids[:-1].tolist()) == text
        assert item.characters == len(text)


def test_names_of_special_tokens_in_a_text_are_text(
    tokenizer: PreTrainedTokenizerFast, encoder: Encoder
) -> None:
    text = "<|im_start|>user: what is <|endoftext|>?"
    assert 0 in tokenizer(text)["input_ids"]  # what would have happened
    (item,) = encode(encoder, text)
    assert item.ids.tolist().count(0) == 1
    assert 1 not in item.ids
    assert tokenizer(text)["input_ids"][0] == 1  # and the caller's tokenizer is as it was


def test_bos_and_eod_are_around_every_text(tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = Encoder(tokenizer, DocumentTokens(eod=0, bos=1), 0.1, 0.1)
    for text, item in zip(["some text", ""], encode(encoder, "some text", ""), strict=True):
        assert item.ids.tolist() == [1, *tokenizer(text)["input_ids"], 0]


def test_special_tokens_that_are_not_marked_special(tokenizer: PreTrainedTokenizerFast) -> None:
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in content["added_tokens"]:
        token["special"] = False
    careless = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)), eos_token="<|endoftext|>"
    )
    (item,) = encode(Encoder(careless, WITHOUT_BOS, 0.1, 0.1), "a<|endoftext|>b")
    assert item.ids.tolist().count(0) == 1


def test_a_tokenizers_own_truncation_is_ignored(tokenizer: PreTrainedTokenizerFast) -> None:
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    cutting = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    (item,) = encode(Encoder(cutting, WITHOUT_BOS, 0.1, 0.1), "one two three four five six seven")
    assert cutting.decode(item.ids[:-1].tolist()) == "one two three four five six seven"


def test_smallest_type_that_holds_the_ids(
    tokenizer: PreTrainedTokenizerFast, encoder: Encoder
) -> None:
    assert encoder.dtype == np.uint16
    assert encoder.vocab_size == 500
    large = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()),
        eos_token="<|endoftext|>",
    )
    large.add_tokens([f"<extra{i}>" for i in range(65_500)])
    assert Encoder(large, WITHOUT_BOS, 0.1, 0.1).dtype == np.int32


def test_shares_of_the_splits() -> None:
    digests = [hashlib.sha256(str(i).encode()).digest() for i in range(20_000)]
    found = [choose_split(digest, 0.1, 0.05) for digest in digests]
    assert found.count("validation") == pytest.approx(2000, rel=0.1)
    assert found.count("test") == pytest.approx(1000, rel=0.1)
