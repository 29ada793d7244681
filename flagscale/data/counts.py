"""What is in a dataset, and whether it is enough."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flagscale.data.indexed import sequence_lengths
from flagscale.data.layout import SPLITS, Part, parts_of
from flagscale.data.packing import pack
from flagscale.errors import UserError

if TYPE_CHECKING:
    from flagscale.data.encoder import EncodedDocument


@dataclass
class SplitCounts:
    """What a split holds.

    Attributes:
        documents: texts, or texts of conversations.
        tokens: with one EOD a document.
        characters: of the texts, or of the messages.
        learnt_tokens: those that a mask does not leave out.
    """

    documents: int = 0
    tokens: int = 0
    characters: int = 0
    learnt_tokens: int = 0

    def add(self, document: EncodedDocument) -> None:
        """Count one more document."""
        self.documents += 1
        self.tokens += len(document.ids)
        self.characters += document.characters
        mask = document.mask
        self.learnt_tokens += len(document.ids) if mask is None else int(np.count_nonzero(mask))


@dataclass
class Counts:
    """What was written of a corpus.

    Attributes:
        splits: counts of each.
        duplicates: documents whose text had occurred before (they are kept).
        highest_id: of all tokens; what a vocabulary has beyond need not be in the model.
    """

    splits: dict[str, SplitCounts] = field(
        default_factory=lambda: {name: SplitCounts() for name in SPLITS}
    )
    duplicates: int = 0
    highest_id: int = 0

    @property
    def documents(self) -> int:
        """Documents in all splits."""
        return sum(counts.documents for counts in self.splits.values())

    @property
    def tokens(self) -> int:
        """Tokens in all splits, EODs included."""
        return sum(counts.tokens for counts in self.splits.values())


def add_up(counts: list[Counts]) -> dict[str, dict[str, int]]:
    """Counts of each split over all corpora."""
    return {
        name: {
            key: sum(asdict(one.splits[name])[key] for one in counts)
            for key in asdict(SplitCounts())
        }
        for name in SPLITS
    }


def check_splits(facts: dict[str, Any], validation_fraction: float, test_fraction: float) -> None:
    """Make sure that whatever is packed together fills at least one sequence.

    Args:
        facts: the dataset's: `seq_length`, `splits`, `corpora`.
        validation_fraction: the recipe's.
        test_fraction: the recipe's.

    Raises:
        UserError: names the split, what it has, what it needs and what to change.
    """
    fractions = {"validation": validation_fraction, "test": test_fraction}
    seq_length = facts["seq_length"]
    for split in SPLITS:
        for part in parts_of(facts, split):
            needed = seq_length + 1 if part.kind == "text" else 1  # labels are shifted by one
            if part.tokens >= needed:
                continue
            lacking = (
                f"one sequence of data.seq_length={seq_length} needs {needed}"
                if part.kind == "text"
                else "at least one conversation is needed"
            )
            fraction = (
                f"raise data.{split}_fraction={fractions[split]}"
                if split in fractions
                else f"lower data.validation_fraction={validation_fraction} or "
                f"data.test_fraction={test_fraction}"
            )
            documents, tokens = _whole(facts, part)
            remedy = _longer(facts, part) or (
                "Give more or shorter documents (a split never cuts one), lower data.seq_length, "
                f"or {fraction}"
            )
            raise UserError(
                f"{part.whose} has {sum(map(len, part.documents))} documents and {part.tokens} "
                f"tokens, but {lacking}; the whole corpus has {documents} documents and {tokens} "
                f"tokens. {remedy}"
            )


def _longer(facts: dict[str, Any], part: Part) -> str:
    """What to change where conversations were too long; nothing where none was."""
    chats = [
        corpus["chat"]
        for corpus in facts["corpora"]
        if part.name in (None, corpus["name"]) and "chat" in corpus
    ]
    too_long = sum(chat["too_long"] for chat in chats)
    if part.kind != "chat" or not too_long:
        return ""
    some = min(chat["seq_length_for_some"] for chat in chats if chat["too_long"])
    return (
        f"{too_long} conversations were left out, since their answers begin after the "
        f"{facts['seq_length'] + 1} tokens that data.seq_length={facts['seq_length']} takes; with "
        f"{some} one of them has something to learn, and with "
        f"{max(chat['seq_length_for_all'] for chat in chats)} nothing is lost: raise "
        "data.seq_length"
    )


def _whole(facts: dict[str, Any], part: Part) -> tuple[int, int]:
    """Documents and tokens of what a part belongs to, over all splits."""
    found = [
        counts
        for corpus in facts["corpora"]
        if part.name in (None, corpus["name"]) and corpus["kind"] == part.kind
        for counts in corpus["splits"].values()
    ]
    return sum(one["documents"] for one in found), sum(one["tokens"] for one in found)


@dataclass(frozen=True)
class Epoch:
    """An epoch of a split.

    Attributes:
        sequences: samples.
        truncated: conversations that are longer than one.
    """

    sequences: int
    truncated: int


def measure_epoch(dataset: Path, facts: dict[str, Any], split: str) -> Epoch:
    """Count the samples of a split.

    Args:
        dataset: folder of the indexed datasets.
        facts: as for `check_splits`.
        split: `train`, `validation` or `test`.
    """
    sequences = truncated = 0
    capacity = facts["seq_length"] + 1
    for part in parts_of(facts, split):
        if part.kind == "text":
            sequences += (part.tokens - 1) // facts["seq_length"]
            continue
        lengths = part_lengths(dataset, part)
        sequences += len(pack(lengths, capacity, seed=0).firsts) - 1
        truncated += int(np.count_nonzero(lengths > capacity))
    return Epoch(sequences, truncated)


def part_lengths(dataset: Path, part: Part) -> np.ndarray:
    """Tokens of each document of a part."""
    lengths = sequence_lengths(dataset / part.file)
    return np.concatenate([lengths[r.start : r.stop] for r in part.documents])
