"""Passages of held-out documents, each cut in two: what a model is shown, and what comes next.

Of text they lie end to end in each document. Of a conversation there is one, whose second part is
the beginning of its last answer.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset
from transformers import PreTrainedTokenizerFast

from flagscale.data.layout import Part, mask_file, parts_of, read_manifest

# A word with the blanks before it. Chinese, Japanese and Korean have none between words, so there
# each character is one.
_IDEOGRAPHS = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_WORD = re.compile(rf"\s*(?:[{_IDEOGRAPHS}]|[^\s{_IDEOGRAPHS}]+)")
_SHOWN, _NEXT = 24, 12  # words
_LEAST = 2  # words of an answer that is asked for
_LONGEST_CONVERSATION = 2_000  # characters before the answer
_SIZES = (1.0, 0.5, 0.25)  # shorter passages, where documents are too short for many of the longest
_ENOUGH = 100


@dataclass(frozen=True)
class Passage:
    """A piece of a document.

    Attributes:
        document: which, in the order of the test split.
        shown: what a model is given.
        following: what comes next, blanks before it included.
    """

    document: int
    shown: str
    following: str

    @property
    def order(self) -> str:
        """A hash of all of it, for an order that no corpus has chosen."""
        return hashlib.sha256(
            f"{self.document}\0{self.shown}\0{self.following}".encode()
        ).hexdigest()


def words(text: str) -> list[str]:
    """The words of a text, each with the blanks before it; together they are the text's start."""
    return _WORD.findall(text)


def heldout_passages(
    dataset: Path, tokenizer: PreTrainedTokenizerFast, count: int, split: str = "test"
) -> list[Passage]:
    """Passages of a split, always the same, spread over its documents.

    Args:
        dataset: a `dataset` artifact.
        tokenizer: the dataset's.
        count: at most so many.
        split: `test`, or `validation` where students are chosen by them.

    Returns:
        First one of each document, then a second one of each that has two, and so on, in an order
        by hashes: so the first n, for every n, are spread too.
    """
    parts = parts_of(read_manifest(dataset)["facts"], split)
    texts: list[str] = []
    conversations: list[tuple[str, str]] = []
    for part in parts:
        if part.kind == "text":
            texts += _texts(dataset, part, tokenizer)
        else:
            conversations += _conversations(dataset, part, tokenizer)
    asked = [
        Passage(len(texts) + number, shown, "".join(words(answer)[:_NEXT]))
        for number, (shown, answer) in enumerate(conversations)
        if len(shown) <= _LONGEST_CONVERSATION and len(words(answer)) >= _LEAST
    ]
    best: list[list[Passage]] = []
    for size in _SIZES:
        found = [_cut(number, text, size) for number, text in enumerate(texts)]
        if sum(map(len, found)) > sum(map(len, best)):
            best = found
        if sum(map(len, best)) + len(asked) >= _ENOUGH:
            break
    return _spread([*best, *([passage] for passage in asked)])[:count]


def _cut(document: int, text: str, size: float) -> list[Passage]:
    """One after the other; what is left at the end is none."""
    shown, following = int(_SHOWN * size), int(_NEXT * size)
    found, whole = words(text), shown + following
    return [
        Passage(
            document,
            "".join(found[start : start + shown]).lstrip(),
            "".join(found[start + shown : start + whole]),
        )
        for start in range(0, len(found) - whole + 1, whole)
    ]


def _spread(documents: Sequence[Sequence[Passage]]) -> list[Passage]:
    rounds: list[list[Passage]] = []
    for passages in documents:
        for number, passage in enumerate(sorted(passages, key=lambda passage: passage.order)):
            if number == len(rounds):
                rounds.append([])
            rounds[number].append(passage)
    return [p for passages in rounds for p in sorted(passages, key=lambda passage: passage.order)]


def _documents(path: Path, part: Part) -> Iterator[np.ndarray]:
    indexed = IndexedDataset(str(path))
    for numbers in part.documents:
        for number in numbers:
            yield indexed[number]


def _texts(dataset: Path, part: Part, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    return [
        str(tokenizer.decode(tokens.tolist(), skip_special_tokens=True))
        for tokens in _documents(dataset / part.file, part)
    ]


def _conversations(
    dataset: Path, part: Part, tokenizer: PreTrainedTokenizerFast
) -> list[tuple[str, str]]:
    """What stands before the last answer of each, special tokens included, and that answer."""
    found = []
    tokens_and_masks = zip(
        _documents(dataset / part.file, part),
        _documents(dataset / mask_file(part.file), part),
        strict=True,
    )
    for tokens, mask in tokens_and_masks:
        begins = np.flatnonzero(np.diff(mask.astype(np.int8), prepend=0) == 1)
        if not len(begins):
            continue
        start = int(begins[-1])
        learnt = tokens[start:][mask[start:] > 0]
        found.append(
            (
                str(tokenizer.decode(tokens[:start].tolist())),
                str(tokenizer.decode(learnt.tolist(), skip_special_tokens=True)),
            )
        )
    return found
