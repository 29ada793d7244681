"""What a `dataset` artifact consists of.

`{train,validation,test}.{bin,idx}` are Megatron indexed datasets, a sequence a document. Of several
corpora each has a training split of its own, `train-NAME`; their held-out documents are together,
one corpus after the other. Beside conversations lies `SPLIT.mask.{bin,idx}` of the same structure,
1 where a token is to be learnt.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flagscale.artifacts import MANIFEST
from flagscale.errors import UserError

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Part:
    """Documents of a split that are packed together.

    Attributes:
        split: `train`, `validation` or `test`.
        kind: `text` or `chat`.
        file: the indexed dataset inside the artifact.
        documents: which of its documents, rising; all of one kind.
        tokens: of these documents, EODs included.
        name: of the corpus; None where there is one alone, or where several are together.
        weight: share of the training samples; None: by the number of samples.
    """

    split: str
    kind: str
    file: str
    documents: list[range]
    tokens: int
    name: str | None
    weight: float | None

    @property
    def whose(self) -> str:
        """What to call it in messages."""
        if self.name:
            return f"the {self.split} split of {self.name!r}"
        return f"the {self.split} split" + ("" if self.kind == "text" else "'s conversations")


def corpus_file(split: str, corpus: str | None) -> str:
    """Prefix of the indexed dataset of a split; in training each of several corpora has its own."""
    return split if corpus is None or split != "train" else f"{split}-{corpus}"


def mask_file(corpus: str) -> str:
    """Prefix of what says which tokens of an indexed dataset are to be learnt."""
    return f"{corpus}.mask"


def parts_of(facts: dict[str, Any], split: str) -> list[Part]:
    """What is packed together: in training each corpus, else all text, and all conversations.

    Args:
        facts: the manifest's.
        split: `train`, `validation` or `test`.
    """
    alone = {"name": None, "kind": "text", "weight": 1.0, "splits": facts["splits"]}
    parts: dict[str, Part] = {}
    begin = 0
    for corpus in facts.get("corpora", [alone]):
        counts = corpus["splits"][split]
        name = corpus["name"] if split == "train" else None
        if split == "train":
            begin = 0
        documents = range(begin, begin + counts["documents"])
        begin = documents.stop
        key = name or corpus["kind"]
        before = parts.get(key)
        parts[key] = Part(
            split,
            corpus["kind"],
            corpus_file(split, name),
            [*(before.documents if before else []), documents],
            counts["tokens"] + (before.tokens if before else 0),
            name,
            corpus["weight"] if split == "train" else None,
        )
    return list(parts.values())


def check_split(split: str) -> None:
    """Raise `ValueError` unless it is one of `SPLITS`."""
    if split not in SPLITS:
        raise ValueError(f"split {split!r}: must be one of {', '.join(SPLITS)}")


def read_manifest(dataset: Path) -> dict[str, Any]:
    """The manifest alone: the step has checked the files when it opened the artifact.

    Raises:
        UserError: there is none, or it is of another kind.
    """
    try:
        manifest = json.loads((dataset / MANIFEST).read_text(encoding="utf-8"))
        kind = manifest["kind"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{dataset}: no dataset here ({MANIFEST}: {error})") from error
    if kind != "dataset":
        raise UserError(f"{dataset}: is a {kind!r}, but a 'dataset' is needed")
    return manifest
