"""Documents -> token ids and a split."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from tokenizers import AddedToken, Tokenizer

from flagscale.data.document_tokens import DocumentTokens
from flagscale.data.indexed import token_type
from flagscale.data.rows import BadRow
from flagscale.data.sources import Document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class EncodedDocument(NamedTuple):
    """A document as it is stored.

    Attributes:
        split: `train`, `validation` or `test`.
        hash64: 64 bits of the text's SHA-256, to find repeats; None: it came with another document.
        characters: of the text; 0: they came with another document.
        ids: token ids [tokens], BOS first if there is one, EOD last.
        mask: uint8 [tokens], 1 where a token is to be learnt; None: all of them.
    """

    split: str
    hash64: int | None
    characters: int
    ids: np.ndarray
    mask: np.ndarray | None = None


class Encode(Protocol):
    """Encodes a batch of documents; may leave some out. Called from several threads."""

    vocab_size: int
    dtype: type[np.number[Any]]

    def __call__(self, documents: list[Document], /) -> Sequence[EncodedDocument | BadRow]:
        """Encode a batch; for a document that cannot be encoded, say what is wrong with it."""


def vocabulary_size(tokenizer: PreTrainedTokenizerFast) -> int:
    """One above the largest id."""
    return max(len(tokenizer), max(tokenizer.get_vocab().values()) + 1)


def token_dtype(tokenizer: PreTrainedTokenizerFast) -> type[np.number[Any]]:
    """The smallest type of an indexed dataset that holds every id."""
    return token_type(vocabulary_size(tokenizer))


def choose_split(digest: bytes, validation_fraction: float, test_fraction: float) -> str:
    """The split of a document, from its text alone.

    Args:
        digest: SHA-256 of the text in UTF-8. Equal texts are never in two splits, in whatever order
            and beside whatever other documents they come.
        validation_fraction: expected share of the documents.
        test_fraction: likewise.
    """
    place = int.from_bytes(digest[:8], "big") / 2**64
    if place < test_fraction:
        return "test"
    return "validation" if place < test_fraction + validation_fraction else "train"


class Encoder:
    """Texts -> token ids between BOS and EOD. Safe to call from several threads.

    A special token's name inside a text is text, not a control token: what somebody wrote about
    `<|endoftext|>` must not end a document.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        tokens: DocumentTokens,
        validation_fraction: float,
        test_fraction: float,
    ) -> None:
        backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        backend.no_truncation()
        backend.no_padding()
        names = {*map(str, tokenizer.all_special_tokens), *_names(backend, tokens)}
        # some tokenizers hold them as ordinary added tokens, which would match inside texts
        added = {token.content for token in backend.get_added_tokens_decoder().values()}
        backend.add_special_tokens(
            [AddedToken(name, special=True, normalized=False) for name in sorted(names & added)]
        )
        backend.encode_special_tokens = True
        self.vocab_size = vocabulary_size(tokenizer)
        self.dtype = token_dtype(tokenizer)
        self._backend = backend
        self._before = [] if tokens.bos is None else [tokens.bos]
        self._after = [tokens.eod]
        self._fractions = (validation_fraction, test_fraction)

    def __call__(self, documents: list[Document]) -> list[EncodedDocument]:
        """Encode a batch and choose the splits."""
        encoded = []
        texts = [document.text for document in documents]
        # `encode` would hold the interpreter's lock
        for text, found in zip(
            texts, self._backend.encode_batch_fast(texts, add_special_tokens=False), strict=True
        ):
            ids = np.array([*self._before, *found.ids, *self._after], self.dtype)
            digest = hashlib.sha256(text.encode()).digest()
            split = choose_split(digest, *self._fractions)
            encoded.append(
                EncodedDocument(split, int.from_bytes(digest[-8:], "big"), len(text), ids)
            )
        return encoded


def _names(backend: Tokenizer, tokens: DocumentTokens) -> set[str]:
    return {str(backend.id_to_token(i)) for i in tokens if i is not None}
