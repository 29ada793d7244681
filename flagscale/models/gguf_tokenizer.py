"""The tokenizer that a GGUF file's metadata describes.

transformers drops part of what these say (the pre-tokenizer's name, above all), so that the ids are
others than the model was trained on. Here every `tokenizer.*` key is honoured, has no influence on
ids, or is refused by name. What the keys mean is llama.cpp's `src/llama-vocab.cpp` and
`gguf-py/gguf/constants.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gguf import GGUFReader, TokenType
from gguf.constants import Keys
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import PreTrainedTokenizerFast

from flagscale.errors import UserError
from flagscale.models.gguf_sentencepiece import check_against_scores, of_types, sentencepiece

_KEYS = Keys.Tokenizer
_SPECIAL = {
    "bos_token": _KEYS.BOS_ID,
    "eos_token": _KEYS.EOS_ID,
    "unk_token": _KEYS.UNK_ID,
    "pad_token": _KEYS.PAD_ID,
}
# What a runtime stops at, or what one inserts when it completes code: no text is encoded by them.
_NO_INFLUENCE = {
    *(_KEYS.EOT_ID, _KEYS.EOM_ID, _KEYS.SEP_ID, _KEYS.MASK_ID),
    *(_KEYS.FIM_PRE_ID, _KEYS.FIM_SUF_ID, _KEYS.FIM_MID_ID),
    *(_KEYS.FIM_PAD_ID, _KEYS.FIM_REP_ID, _KEYS.FIM_SEP_ID),
    *(_KEYS.PREFIX_ID, _KEYS.SUFFIX_ID, _KEYS.MIDDLE_ID),
}
_MUST_BE_FALSE = {_KEYS.ADD_SEP, _KEYS.REMOVE_EXTRA_WS}
_HONOURED = {
    *(_KEYS.MODEL, _KEYS.PRE, _KEYS.LIST, _KEYS.TOKEN_TYPE, _KEYS.SCORES, _KEYS.MERGES),
    *(_KEYS.ADD_BOS, _KEYS.ADD_EOS, _KEYS.ADD_PREFIX, *_SPECIAL.values()),
    *(_KEYS.CHAT_TEMPLATE, _KEYS.CHAT_TEMPLATES),
}


_NAMED_TEMPLATE = _KEYS.CHAT_TEMPLATE_N.format(name="")


class _Pre(NamedTuple):
    """What a name in `tokenizer.ggml.pre` stands for.

    Attributes:
        split: a regular expression; None: GPT-2's, `ByteLevel`'s own.
        digits_apart: each digit is a piece, before anything else is split.
        nfc: texts are composed first. llama.cpp does not; the model's own tokenizer does.
        ignore_merges: a piece that is a token is that token, whatever the merges would make of it.
        add_bos: where `tokenizer.ggml.add_bos_token` is not there.
    """

    split: str | None = None
    digits_apart: bool = False
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False


def _contractions_words_and(numbers: str) -> str:
    return (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + numbers + r"| ?[^\s\p{L}\p{N}]+"
        r"[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


_LLAMA_3 = _Pre(_contractions_words_and(r"\p{N}{1,3}"), ignore_merges=True, add_bos=True)
_TEKKEN = _Pre(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ignore_merges=True,
    add_bos=True,
)
_PRE_TOKENIZERS = {
    "gpt-2": _Pre(),
    "smollm": _Pre(digits_apart=True),
    "qwen2": _Pre(_contractions_words_and(r"\p{N}"), nfc=True),
    "llama-bpe": _LLAMA_3,
    "llama3": _LLAMA_3,
    "llama-v3": _LLAMA_3,
    "falcon3": _LLAMA_3,
    "tekken": _TEKKEN,
}


def read_gguf_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """Build the tokenizer of a GGUF file.

    Raises:
        UserError: the file says something about it that is not honoured here.
        ValueError: it is no GGUF file, or what it says makes no tokenizer.
    """
    metadata = {
        name: field.contents()
        for name, field in GGUFReader(path).fields.items()
        if name.startswith("tokenizer.")
    }
    try:
        return gguf_tokenizer(metadata, str(path))
    except UserError:
        raise
    except Exception as error:  # the tokenizers library raises no other type
        raise ValueError(str(error) or type(error).__name__) from error


def gguf_tokenizer(metadata: Mapping[str, Any], source: str) -> PreTrainedTokenizerFast:
    """Build the tokenizer that `tokenizer.*` keys describe.

    Args:
        metadata: these keys and what they hold.
        source: for messages.

    Raises:
        UserError: a key or a value that is not honoured; the message names it.
    """
    _check_keys(metadata, source)
    tokens, model = metadata[_KEYS.LIST], metadata[_KEYS.MODEL]
    if len(set(tokens)) != len(tokens):
        raise UserError(f"tokenizer of {source}: {_KEYS.LIST} holds a token twice")
    if model == "gpt2":
        backend, add_bos = _byte_level(metadata, source)
    elif model == "llama":
        backend, add_bos = sentencepiece(metadata, source), True
    else:
        raise UserError(f"tokenizer of {source}: {_KEYS.MODEL}={model!r}; known: gpt2, llama")
    backend.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token in of_types(metadata, TokenType.CONTROL, TokenType.UNKNOWN)
        ]
    )
    backend.add_tokens(
        [
            AddedToken(token, special=False, normalized=False)
            for token in of_types(metadata, TokenType.USER_DEFINED)
        ]
    )
    special = {
        name: _token(metadata, key, source) for name, key in _SPECIAL.items() if key in metadata
    }
    backend.post_processor = _around_texts(
        special.get("bos_token") if metadata.get(_KEYS.ADD_BOS, add_bos) else None,
        special.get("eos_token") if metadata.get(_KEYS.ADD_EOS, False) else None,
        tokens,
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokenizer.chat_template = _chat_template(metadata)
    if model == "llama":
        check_against_scores(tokenizer.backend_tokenizer, metadata, source)
    return tokenizer


def _check_keys(metadata: Mapping[str, Any], source: str) -> None:
    for key, value in metadata.items():
        if key in _MUST_BE_FALSE and value:
            raise UserError(f"tokenizer of {source}: {key}={value!r} is not supported")
        known = _HONOURED | _NO_INFLUENCE | _MUST_BE_FALSE
        if key not in known and not key.startswith(_NAMED_TEMPLATE):
            raise UserError(
                f"tokenizer of {source}: what its {key} says is not supported; give the folder or "
                "the Hugging Face id that the GGUF file was made of"
            )
    for key in (_KEYS.TOKEN_TYPE, _KEYS.SCORES):
        if key in metadata and len(metadata[key]) != len(metadata[_KEYS.LIST]):
            raise UserError(
                f"tokenizer of {source}: {key} has {len(metadata[key])} entries, {_KEYS.LIST} "
                f"{len(metadata[_KEYS.LIST])}"
            )


def _token(metadata: Mapping[str, Any], key: str, source: str) -> str:
    tokens, identifier = metadata[_KEYS.LIST], metadata[key]
    if not 0 <= identifier < len(tokens):
        raise UserError(
            f"tokenizer of {source}: {key}={identifier} is no token; there are {len(tokens)}"
        )
    return str(tokens[identifier])


def _chat_template(metadata: Mapping[str, Any]) -> str | dict[str, str] | None:
    """Its template; with templates for special purposes, all of them by name."""
    default: str | None = metadata.get(_KEYS.CHAT_TEMPLATE)
    named = {
        key.removeprefix(_NAMED_TEMPLATE): value
        for key, value in metadata.items()
        if key.startswith(_NAMED_TEMPLATE)
    }
    if not named:
        return default
    return named if default is None else {"default": default, **named}


def _around_texts(
    bos: str | None, eos: str | None, tokens: Sequence[str]
) -> processors.TemplateProcessing:
    names = [bos, "$A", eos]
    return processors.TemplateProcessing(
        single=[name for name in names if name],
        pair=[name for name in [*names, bos, "$B:1", eos] if name],
        special_tokens=[(name, tokens.index(name)) for name in {bos, eos} if name],
    )


def _byte_level(metadata: Mapping[str, Any], source: str) -> tuple[Tokenizer, bool]:
    """Byte-level BPE, and whether it begins texts with BOS unless the file says otherwise."""
    name = metadata.get(_KEYS.PRE)
    pre = _PRE_TOKENIZERS.get(name) if isinstance(name, str) else None
    if pre is None:
        raise UserError(
            f"tokenizer of {source}: {_KEYS.PRE}={name!r} says how it splits text before merging; "
            f"known: {', '.join(_PRE_TOKENIZERS)}. Give the folder or the Hugging Face id that "
            "the GGUF file was made of"
        )
    if metadata.get(_KEYS.ADD_PREFIX):
        raise UserError(f"tokenizer of {source}: {_KEYS.ADD_PREFIX}=True beside {name!r}")
    backend = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(metadata[_KEYS.LIST])},
            merges=[_pair(merge) for merge in metadata[_KEYS.MERGES]],
            ignore_merges=pre.ignore_merges,
        )
    )
    if pre.nfc:
        backend.normalizer = normalizers.NFC()
    steps: list[pre_tokenizers.PreTokenizer] = []
    if pre.digits_apart:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if pre.split is not None:
        steps.append(pre_tokenizers.Split(Regex(pre.split), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre.split is None))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    return backend, pre.add_bos


def _pair(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right
