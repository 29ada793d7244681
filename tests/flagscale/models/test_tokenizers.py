import json
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from flagscale.errors import UserError
from flagscale.models.probing_texts import probing_texts
from flagscale.models.tokenizers import load_tokenizer, tokenizer_hash

LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
Folder = Callable[..., Path]


def digits() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


def llama_3() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA_3), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


@pytest.fixture(scope="module")
def byte_level() -> str:
    """A byte-level BPE whose merges go over whatever a pre-tokenizer may leave together."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_end|>", "<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [topics["for"], *("0123456789 " * 20, "\n\n  x\n\n\n y" * 20), "it's I'M" * 20]
    backend.train_from_iterator(texts, trainer)
    return backend.to_str()


@pytest.fixture
def folder(tmp_path: Path, byte_level: str) -> Folder:
    """Writes a model's folder, its tokenizer with this pre-tokenizer and configuration."""

    def write(
        pre_tokenizer: pre_tokenizers.PreTokenizer | None,
        model_type: str = "llama",
        change: Callable[[Tokenizer], object] = lambda _: None,
        **config: Any,
    ) -> Path:
        backend = Tokenizer.from_str(byte_level)
        backend.pre_tokenizer = pre_tokenizer
        change(backend)
        backend.save(str(tmp_path / "tokenizer.json"))
        config = {"eos_token": "<|endoftext|>"} | config
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
        return tmp_path

    return write


@pytest.mark.parametrize(
    ("model_type", "pre_tokenizer", "config"),
    [
        ("qwen2", digits, {"tokenizer_class": "Qwen2Tokenizer"}),
        ("llama", llama_3, {"tokenizer_class": "GPT2Tokenizer"}),
        ("llama", llama_3, {"tokenizer_class": "LlamaTokenizerFast", "legacy": True}),
        ("llama", digits, {"tokenizer_class": "PreTrainedTokenizerFast"}),
        ("qwen3", llama_3, {"tokenizer_class": "Qwen2TokenizerFast", "add_bos_token": True}),
        ("mistral", llama_3, {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>"}),
        ("llama", digits, {"clean_up_tokenization_spaces": True}),
    ],
)
def test_ids_are_those_of_tokenizer_json(
    folder: Folder,
    model_type: str,
    pre_tokenizer: Callable[[], pre_tokenizers.PreTokenizer],
    config: dict[str, Any],
    tmp_path: Path,
) -> None:
    """Of whatever class its configuration says it is; and so they stay when it is written."""

    def change(backend: Tokenizer) -> None:
        backend.normalizer = normalizers.NFC()
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 2)]
        )

    source = folder(pre_tokenizer(), model_type, change, **config)
    own = Tokenizer.from_file(str(source / "tokenizer.json"))
    loaded = load_tokenizer(source)
    loaded.save_pretrained(tmp_path / "written")
    again = load_tokenizer(tmp_path / "written")
    for text in [*probing_texts()[:8], "a<s>b <|im_end|> c"]:
        wanted = own.encode(text).ids
        assert loaded(text)["input_ids"] == wanted
        assert again(text)["input_ids"] == wanted
    assert tokenizer_hash(again) == tokenizer_hash(loaded)


def test_how_added_tokens_match_is_what_tokenizer_json_says(folder: Folder) -> None:
    def change(backend: Tokenizer) -> None:
        backend.add_special_tokens([AddedToken("<|im_end|>", lstrip=True, rstrip=True)])

    other = {"content": "<|im_end|>", "lstrip": False, "rstrip": False, "special": True}
    other |= {"single_word": False, "normalized": True}
    source = folder(digits(), change=change, added_tokens_decoder={"1": other})
    assert load_tokenizer(source)("a <|im_end|> b")["input_ids"] == (
        Tokenizer.from_file(str(source / "tokenizer.json")).encode("a <|im_end|> b").ids
    )


def test_tokens_that_only_the_configuration_has_stay(
    folder: Folder, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        loaded = load_tokenizer(folder(digits(), pad_token="<pad>"))
    assert loaded.pad_token_id == 400 == len(loaded) - 1
    assert "tokenizer_config.json has the token '<pad>' (400), tokenizer.json has not" in (
        caplog.text
    )


@pytest.mark.parametrize("identifier", [300, 500])
def test_a_token_of_another_id(folder: Folder, identifier: int) -> None:
    token = {"content": "<foo>", "lstrip": False, "rstrip": False, "special": True}
    token |= {"single_word": False, "normalized": False}
    source = folder(digits(), added_tokens_decoder={f"{identifier}": token})
    with pytest.raises(UserError, match=rf"'<foo>' is {identifier} in .* and 400 by tokenizer.js"):
        load_tokenizer(source)


def test_a_word_that_only_the_configuration_takes_for_a_token(folder: Folder) -> None:
    word = {"content": "def", "lstrip": False, "rstrip": False, "special": False}
    word |= {"single_word": False, "normalized": False}
    source = folder(digits(), added_tokens_decoder={"400": word})
    with pytest.raises(UserError, match=r"token 'def' \(400\) stands in tokenizer_config.json a"):
        load_tokenizer(source)


def test_a_difference_is_refused_with_the_text_that_shows_it(folder: Folder) -> None:
    """What transformers does to a large vocabulary of Mistral's, if it is told to."""

    def change(backend: Tokenizer) -> None:
        names = ["<|endoftext|>", "<|im_end|>", "<s>", *pre_tokenizers.ByteLevel.alphabet()]
        vocab = {name: i for i, name in enumerate(names)}
        vocab |= {f"{i}": len(vocab) + i for i in range(10, 100_010)}
        backend.model = models.BPE(vocab=vocab, merges=[("1", "2")], ignore_merges=True)

    source = folder(llama_3(), "mistral", change, fix_mistral_regex=True)
    with pytest.raises(UserError, match=r"not follow its tokenizer.json: '0 12 345 6789"):
        load_tokenizer(source)


@pytest.mark.parametrize("actual", [True, False])
def test_a_blank_in_front(folder: Folder, actual: bool, tmp_path: Path) -> None:
    pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=actual)
    load_tokenizer(folder(pre_tokenizer)).save_pretrained(tmp_path / "written")
    config = json.loads((tmp_path / "written" / "tokenizer_config.json").read_text())
    assert config["add_prefix_space"] is actual  # transformers 4 believes this one
    with pytest.raises(UserError, match=rf"add_prefix_space is {not actual} in .*co.* {actual}"):
        load_tokenizer(folder(pre_tokenizer, add_prefix_space=not actual))


@pytest.mark.parametrize("name", ["tokenizer.model", "tekken.json", "vocab.json"])
def test_what_has_no_tokenizer_json(folder: Folder, name: str) -> None:
    source = folder(digits())
    (source / "tokenizer.json").rename(source / name)
    with pytest.raises(UserError, match=f"tokenizer of {source}: tokenizer.json is missing"):
        load_tokenizer(source)


def test_a_broken_file(folder: Folder) -> None:
    source = folder(digits())
    (source / "tokenizer.json").write_text('{"model": {}}')
    with pytest.raises(UserError, match=f"tokenizer of {source} cannot be read: tokenizer.json"):
        load_tokenizer(source)


def test_probing_texts_show_what_tokenizers_differ_in(byte_level: str) -> None:
    """Each of these changes alone shows in some text."""
    plain = Tokenizer.from_str(byte_level)
    plain.pre_tokenizer = digits()

    def ids(tokenizer: Tokenizer) -> list[list[int]]:
        return [found.ids for found in tokenizer.encode_batch(list(probing_texts()))]

    changes: list[tuple[str, Any]] = [
        *(("normalizer", each()) for each in (normalizers.NFC, normalizers.NFD, normalizers.NFKC)),
        ("normalizer", normalizers.Lowercase()),
        ("normalizer", normalizers.Strip()),
        ("normalizer", normalizers.Replace("\r\n", "\n")),
        ("pre_tokenizer", llama_3()),
        ("pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=False)),
        ("pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)),
    ]
    for part, value in changes:
        other = Tokenizer.from_str(plain.to_str())
        setattr(other, part, value)
        assert ids(other) != ids(plain), value
