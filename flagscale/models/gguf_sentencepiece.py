"""Sentencepiece's BPE as GGUF files hold it: tokens with scores, and no merges."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from typing import Any

from gguf import TokenType
from gguf.constants import Keys
from tokenizers import Tokenizer, decoders, models, normalizers

from flagscale.errors import UserError
from flagscale.models.probing_texts import probing_texts

_KEYS = Keys.Tokenizer
_BLANK = "\u2581"


def of_types(metadata: Mapping[str, Any], *types: TokenType) -> list[str]:
    """The tokens of these types, in the order of their ids."""
    kinds = metadata.get(_KEYS.TOKEN_TYPE, ())
    return [t for t, kind in zip(metadata[_KEYS.LIST], kinds, strict=False) if kind in types]


def sentencepiece(metadata: Mapping[str, Any], source: str) -> Tokenizer:
    """Sentencepiece's BPE, whose merges are told by the tokens' scores.

    Its own pre-tokenizer is none: a blank is put in front, and blanks become U+2581.

    Args:
        metadata: `tokenizer.*` keys and what they hold.
        source: for messages.

    Raises:
        UserError: the file names a pre-tokenizer.
    """
    if metadata.get(_KEYS.PRE, "default") != "default":
        raise UserError(
            f"tokenizer of {source}: {_KEYS.PRE}={metadata[_KEYS.PRE]!r} beside {_KEYS.MODEL}="
            "'llama', which splits no text before merging"
        )
    ids = {token: i for i, token in enumerate(metadata[_KEYS.LIST])}
    scores = metadata[_KEYS.SCORES]
    merges = [
        (-scores[i], token[:cut], token[cut:])
        for token, i in ids.items()
        for cut in range(1, len(token))
        if token[:cut] in ids and token[cut:] in ids
    ]
    unknown = of_types(metadata, TokenType.UNKNOWN)
    backend = Tokenizer(
        models.BPE(
            vocab=ids,
            merges=[(left, right) for _, left, right in sorted(merges, key=lambda m: m[0])],
            unk_token=unknown[0] if unknown else None,
            fuse_unk=True,
            byte_fallback="<0x00>" in ids,
        )
    )
    blanks = normalizers.Replace(" ", _BLANK)
    prefixed = metadata.get(_KEYS.ADD_PREFIX, True)
    first: list[normalizers.Normalizer] = [normalizers.Prepend(_BLANK)] if prefixed else []
    backend.normalizer = normalizers.Sequence([*first, blanks])
    strip: list[decoders.Decoder] = [decoders.Strip(" ", 1, 0)] if prefixed else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_BLANK, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend


def check_against_scores(backend: Tokenizer, metadata: Mapping[str, Any], source: str) -> None:
    """Merging by rank must give what sentencepiece's merging by score gives.

    Args:
        backend: that `sentencepiece` has built.
        metadata: that it was built of.
        source: for messages.

    Raises:
        UserError: with the first text whose ids differ.
    """
    prefix = _BLANK if metadata.get(_KEYS.ADD_PREFIX, True) else ""
    ids = {token: i for i, token in enumerate(metadata[_KEYS.LIST])}
    whole = of_types(metadata, TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED)
    for text in probing_texts():
        if any(token in text for token in whole):
            continue
        pieces = _merge_by_score(prefix + text.replace(" ", _BLANK), ids, metadata[_KEYS.SCORES])
        wanted = [i for piece in pieces for i in _ids_of(piece, ids)]
        found = backend.encode(text, add_special_tokens=False).ids
        if None not in wanted and found != wanted:
            raise UserError(
                f"tokenizer of {source}: {text!r} becomes {found}, but {wanted} by {_KEYS.SCORES}; "
                "give the folder or the Hugging Face id that the GGUF file was made of"
            )


def _ids_of(piece: str, ids: Mapping[str, int]) -> list[int | None]:
    """One id, or those of its bytes; None where the vocabulary has no byte tokens."""
    if piece in ids:
        return [ids[piece]]
    return [ids.get(f"<0x{byte:02X}>") for byte in piece.encode()]


def _merge_by_score(text: str, ids: Mapping[str, int], scores: Sequence[float]) -> list[str]:
    """Merge the two neighbours whose union scores highest, the leftmost of equals, and so on."""
    pieces: list[str | None] = list(text)
    left, right = list(range(-1, len(text) - 1)), list(range(1, len(text) + 1))
    candidates: list[tuple[float, int, int, str]] = []

    def propose(a: int, b: int) -> None:
        if a >= 0 and b < len(text):
            union = f"{pieces[a]}{pieces[b]}"
            if union in ids:
                heapq.heappush(candidates, (-scores[ids[union]], a, b, union))

    for i in range(len(text) - 1):
        propose(i, i + 1)
    while candidates:
        _, a, b, union = heapq.heappop(candidates)
        if pieces[a] is None or pieces[b] is None or f"{pieces[a]}{pieces[b]}" != union:
            continue  # one of the two has been merged with another since
        pieces[a], pieces[b] = union, None
        right[a] = right[b]
        if right[a] < len(text):
            left[right[a]] = a
        propose(left[a], a)
        propose(a, right[a])
    return [piece for piece in pieces if piece is not None]
