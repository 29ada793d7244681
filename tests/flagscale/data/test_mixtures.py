"""Batches of blends and of conversations, through the whole of the loader."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from flagscale.artifacts import new_artifact
from flagscale.data.chat import ChatEncoder
from flagscale.data.counts import add_up, measure_epoch
from flagscale.data.document_tokens import DocumentTokens
from flagscale.data.encoder import Encoder
from flagscale.data.layout import parts_of, read_manifest
from flagscale.data.loader import (
    prepare_index,
    split_documents,
    train_iterator,
    validation_batches,
)
from flagscale.data.messages import dump_conversation
from flagscale.data.rows import BadRows
from flagscale.data.sources import Document
from flagscale.data.writer import Corpus, write_splits

SEQ_LENGTH = 32
WEIGHTS = {"stories": 0.7, "talk": 0.2, "code": 0.1}


def _numbered(word: str, count: int) -> Iterator[Document]:
    for i in range(count):
        yield Document(" ".join(f"{word} {i}.{j}" for j in range(9)), f"{word}:{i}")


def _talks(count: int) -> Iterator[Document]:
    for i in range(count):
        turns = [
            {"role": ("user", "assistant")[j % 2], "content": f"{i} {'for ' * (1 + (i + j) % 5)}"}
            for j in range(2 + 2 * (i % 2))
        ]
        yield Document(dump_conversation({"messages": turns}, "messages", "talk"), f"talk:{i}")


@pytest.fixture(scope="session")
def blend(
    tmp_path_factory: pytest.TempPathFactory, chat_tokenizer: PreTrainedTokenizerFast
) -> tuple[Path, Path]:
    """A dataset of two texts and conversations, and its index."""
    path = tmp_path_factory.mktemp("blend") / "dataset"
    text = Encoder(chat_tokenizer, DocumentTokens(eod=0, bos=None), 0.2, 0.2)
    chat = ChatEncoder(chat_tokenizer, 0, 0.2, 0.2, SEQ_LENGTH)
    corpora = [
        Corpus("stories", "text", _numbered("Story", 80), text, BadRows()),
        Corpus("talk", "chat", _talks(60), chat, BadRows()),
        Corpus("code", "text", _numbered("with", 30), text, BadRows()),
    ]
    with new_artifact(path, "dataset", {}) as staging:
        counts = write_splits(corpora, staging.path)
        staging.facts = {
            "corpora": [
                {
                    "name": corpus.name,
                    "kind": corpus.kind,
                    "weight": WEIGHTS[corpus.name],
                    "splits": {name: vars(c) for name, c in found.splits.items()},
                }
                for corpus, found in zip(corpora, counts, strict=True)
            ],
            "splits": add_up(counts),
            "eod_id": 0,
            "bos_id": None,
            "vocab_size": text.vocab_size,
            "seq_length": SEQ_LENGTH,
        }
    prepare_index(path, path.parent / "cache")
    return path, path.parent / "cache"


def train(blend: tuple[Path, Path], **changes: Any) -> Iterator[dict[str, Any]]:
    arguments = {"micro_batch_size": 1, "global_batch_size": 8, "seed": 7} | changes
    return train_iterator(*blend, **arguments)


def rows(batches: Iterator[dict[str, Any]], count: int) -> list[tuple[int, ...]]:
    taken = torch.cat([batch["tokens"] for batch in itertools.islice(batches, count)])
    return [tuple(row) for row in taken.tolist()]


@pytest.fixture(scope="session")
def reference(blend: tuple[Path, Path]) -> list[tuple[int, ...]]:
    """The first 40 steps of 24 sequences on one rank."""
    return rows(train(blend, global_batch_size=24), 40 * 24)


@settings(deadline=None, max_examples=40)
@given(
    ranks=st.integers(1, 6),
    micro=st.integers(1, 4),
    times=st.integers(1, 3),
    step=st.integers(0, 5),
    reset=st.booleans(),
)
def test_the_order_depends_on_the_step_alone(
    blend: tuple[Path, Path],
    reference: list[tuple[int, ...]],
    ranks: int,
    micro: int,
    times: int,
    step: int,
    reset: bool,
) -> None:
    """What all ranks take together in a step, in the order of micro-batches and ranks."""
    sizes = {
        "micro_batch_size": micro,
        "global_batch_size": ranks * micro * times,
        "start_step": step,
        "data_parallel_size": ranks,
        "reset_attention_mask": reset,
    }
    taken = [rows(train(blend, data_parallel_rank=r, **sizes), times) for r in range(ranks)]
    together = [
        row
        for number in range(times)
        for rank in taken
        for row in rank[number * micro : (number + 1) * micro]
    ]
    first = step * ranks * micro * times
    assert together == reference[first : first + ranks * micro * times]


def test_corpora_come_by_weight(blend: tuple[Path, Path], reference: list[tuple[int, ...]]) -> None:
    """Found by what is in them, with several epochs of the small ones."""
    facts = read_manifest(blend[0])["facts"]
    parts = parts_of(facts, "train")
    texts = {p.name: {i for d in _documents(blend[0], p.file) for i in d} for p in parts}
    only = {
        name: ids - set().union(*(texts[other] for other in texts if other != name))
        for name, ids in texts.items()
    }
    found = dict.fromkeys(texts, 0)
    for row in reference:
        (name,) = [name for name, ids in only.items() if ids & set(row)]
        found[name] += 1
    for name, weight in WEIGHTS.items():
        assert abs(found[name] - weight * len(reference)) <= 0.5 + weight * 1.5
    assert measure_epoch(blend[0], facts, "train").sequences * 3 < len(reference)


def _documents(dataset: Path, file: str) -> list[np.ndarray]:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    indexed = IndexedDataset(str(dataset / file))
    return [np.array(indexed[i]) for i in range(len(indexed))]


def test_each_corpus_has_epochs_of_its_own(
    blend: tuple[Path, Path], reference: list[tuple[int, ...]]
) -> None:
    start = 1  # <|im_start|>, which no text has
    talk = [row for row in reference if start in row]
    facts = read_manifest(blend[0])["facts"]
    (part,) = [part for part in parts_of(facts, "train") if part.name == "talk"]
    epoch = measure_epoch(blend[0], {**facts, "corpora": [facts["corpora"][1]]}, "train").sequences
    assert part.kind == "chat"
    assert len(talk) > 3 * epoch
    assert len(set(talk[:epoch])) == epoch
    assert sorted(talk[:epoch]) == sorted(talk[epoch : 2 * epoch])
    assert talk[:epoch] != talk[epoch : 2 * epoch]


def test_conversations_are_whole_and_borders_theirs(
    blend: tuple[Path, Path], chat_tokenizer: PreTrainedTokenizerFast
) -> None:
    stored = {tuple(document) for document in _documents(blend[0], "train-talk")}
    seen = set()
    batches = train(blend, micro_batch_size=4, reset_attention_mask=True)
    for batch in itertools.islice(batches, 150):
        _check_borders(batch)
        cut = batch["cu_seqlens"].tolist()
        tokens, labels = batch["tokens"].flatten(), batch["labels"].flatten()
        mask = batch["loss_mask"].flatten()
        for begin, end in itertools.pairwise(cut):
            if tokens[begin] != 1:  # text, or what fills a row
                continue
            last = [] if end % SEQ_LENGTH else [int(labels[end - 1])]
            piece = (*tokens[begin:end].tolist(), *last)
            whole = next(
                (d for d in (piece, piece[:-1]) if d in stored),
                next((d for d in stored if d[: SEQ_LENGTH + 1] == piece), None),
            )
            assert whole is not None
            seen.add(whole)
            learnt = chat_tokenizer.decode(labels[begin:end][mask[begin:end] == 1])
            assert "assistant" not in learnt
            assert "user" not in learnt
            assert (learnt.count("<|im_end|>") >= 1) or len(whole) > SEQ_LENGTH
    assert seen == stored


def _check_borders(batch: dict[str, Any]) -> None:
    """What holds of every micro-batch with documents apart."""
    count, length = batch["tokens"].shape
    borders = batch["cu_seqlens"]
    assert borders.dtype == torch.int32
    assert borders[0] == 0
    assert borders[-1] == count * length
    assert (borders.diff() > 0).all()
    assert batch["max_seqlen"] == borders.diff().max()
    assert set(range(0, count * length, length)) <= set(borders.tolist())
    starts = torch.zeros(count * length + 1, dtype=torch.bool)
    starts[borders.long()] = True
    assert torch.equal((batch["position_ids"].flatten() == 0), starts[:-1])
    ends = starts[1:].view(count, length)[:, :-1]  # the next token is of another piece
    assert not batch["loss_mask"][:, :-1][ends].any()


def test_documents_of_text_apart(blend: tuple[Path, Path]) -> None:
    apart = train(blend, micro_batch_size=8, reset_attention_mask=True)
    together = train(blend, micro_batch_size=8)
    for one, other in itertools.islice(zip(apart, together, strict=True), 20):
        _check_borders(one)
        assert torch.equal(one["tokens"], other["tokens"])
        assert torch.equal(one["labels"], other["labels"])
        assert set(other) == {
            "tokens",
            "labels",
            "loss_mask",
            "position_ids",
            "samples",
            "split",
            "following",
        }
        assert torch.equal(other["position_ids"], torch.arange(SEQ_LENGTH).expand(8, -1))
        is_text = (one["tokens"] != 1).all(dim=1)
        predicted = torch.where(one["tokens"] == 0, 0.0, 1.0)
        assert torch.equal(one["loss_mask"][is_text], predicted[is_text])
        assert other["loss_mask"][is_text].all()


def test_held_out_documents_are_together(blend: tuple[Path, Path]) -> None:
    facts = read_manifest(blend[0])["facts"]
    for split in ("validation", "test"):
        documents = split_documents(blend[0], split)
        counts = [corpus["splits"][split]["documents"] for corpus in facts["corpora"]]
        assert min(counts) > 0
        assert len(documents) == sum(counts)
        assert all(document[-1] == 0 for document in documents)
        are_talk = [1 in document for document in documents]
        assert are_talk == [False] * counts[0] + [True] * counts[1] + [False] * counts[2]
    everything = split_documents(blend[0], "train")
    assert len(everything) == facts["splits"]["train"]["documents"]
    assert len(split_documents(blend[0], "train", 7)) == 7


def test_validation_has_every_part(blend: tuple[Path, Path]) -> None:
    facts = read_manifest(blend[0])["facts"]
    count = measure_epoch(blend[0], facts, "validation").sequences
    batches = validation_batches(*blend, micro_batch_size=1, global_batch_size=1, eval_iters=count)
    found = rows(iter(batches), count)
    assert len(set(found)) == count  # each sample once, text and conversations
    assert found == rows(iter(batches), count)
    talk = sum(1 in row for row in found)
    assert 0 < talk < count
