"""Whether two models read the same ids: a student that came from elsewhere must be its teacher's.

Two files of one tokenizer seldom are the same bytes: versions of the library write other fields,
instruct models name other special tokens. What counts is which id means what, and which ids a text
gets.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from flagscale.errors import UserError
from flagscale.models.probing_texts import probing_texts
from flagscale.models.tokenizers import pipeline_hash

_AT_ONCE = 4096  # texts


def check_same_tokenizer(
    tokenizer: PreTrainedTokenizerFast, other: PreTrainedTokenizerFast, name: str, whose: str
) -> None:
    """Refuse a tokenizer that gives other ids than the right one.

    Compared are the vocabularies, token by token; the rules by which a text falls into tokens; and
    the ids of the probing texts, of each token's own text, and of what is around added tokens.

    Args:
        tokenizer: whose ids are right.
        other: that must give the same.
        name: of the other's model, for the message.
        whose: the right one is, for the message.

    Raises:
        UserError: the first difference, by name.
    """
    if pipeline_hash(tokenizer) == pipeline_hash(other):
        return
    difference = (
        _other_id(tokenizer, other, whose)
        or _other_rules(tokenizer, other, whose)
        or _other_text(tokenizer, other, whose)
    )
    if difference:
        raise UserError(
            f"student.source={name}: its tokenizer is not {whose}: {difference}. A student learns "
            "from its teacher token by token: give a model of the same tokenizer"
        )


def _other_id(
    tokenizer: PreTrainedTokenizerFast, other: PreTrainedTokenizerFast, whose: str
) -> str | None:
    own, theirs = tokenizer.get_vocab(), other.get_vocab()
    by_id = sorted((own.get(token, theirs.get(token)), token) for token in own.keys() | theirs)
    differing = [token for _, token in by_id if own.get(token) != theirs.get(token)]
    if not differing:
        return None
    token = differing[0]
    known = f"{theirs[token]}" if token in theirs else "not in it"
    wanted = f"{own[token]} in {whose}" if token in own else f"not in {whose}"
    return f"{len(differing)} tokens differ, first {token!r}, which is {known}, and {wanted}"


def _other_rules(
    tokenizer: PreTrainedTokenizerFast, other: PreTrainedTokenizerFast, whose: str
) -> str | None:
    """Merges of two tokens into one; all else of the rules shows in texts."""
    own, theirs = (_model(one) for one in (tokenizer, other))
    if own.get("type") != theirs.get("type"):
        return f"it is {theirs.get('type')}, and {whose} is {own.get('type')}"
    pairs = zip(own.get("merges") or (), theirs.get("merges") or (), strict=False)
    for number, (wanted, found) in enumerate(pairs):
        if wanted != found:
            return f"its merge {number} is {found}, and {wanted} in {whose}"
    counts = [len(one.get("merges") or ()) for one in (theirs, own)]
    if counts[0] != counts[1]:
        return f"it has {counts[0]} merges, and {whose} {counts[1]}"
    return None


def _model(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    return found


def _other_text(
    tokenizer: PreTrainedTokenizerFast, other: PreTrainedTokenizerFast, whose: str
) -> str | None:
    own, theirs = (_plain(one) for one in (tokenizer, other))
    added = sorted({token.content for token in own.get_added_tokens_decoder().values()})
    around = [f"a{token}b {token} \n{token}\n{token}{token}" for token in added]
    vocabulary = [own.decode([number], skip_special_tokens=False) for number in _ids(own)]
    texts = [*probing_texts(), *around, *vocabulary]
    for start in range(0, len(texts), _AT_ONCE):
        some = texts[start : start + _AT_ONCE]
        for text, wanted, found in zip(
            some, _encode(own, some), _encode(theirs, some), strict=True
        ):
            if wanted != found:
                return f"{text!r} becomes {found}, and {wanted} in {whose}"
    return None


def _plain(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """Without what is of a use: lengths, and what is put around a text, which is the dataset's."""
    plain = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    plain.no_truncation()
    plain.no_padding()
    return plain


def _ids(tokenizer: Tokenizer) -> list[int]:
    return sorted(tokenizer.get_vocab().values())


def _encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    encodings: list[Any] = tokenizer.encode_batch(list(texts), add_special_tokens=False)
    return [encoding.ids for encoding in encodings]
