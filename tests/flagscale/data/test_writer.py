import errno
import gc
import itertools
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset
from transformers import PreTrainedTokenizerFast

from flagscale.artifacts import hash_files, is_disk_full
from flagscale.data import writer
from flagscale.data.counts import Counts, SplitCounts, check_splits
from flagscale.data.document_tokens import DocumentTokens
from flagscale.data.encoder import Encoder
from flagscale.data.layout import SPLITS
from flagscale.data.rows import BadRows
from flagscale.data.sources import Document
from flagscale.data.writer import Corpus, write_splits
from flagscale.errors import UserError


@pytest.fixture(scope="session")
def encoder(tokenizer: PreTrainedTokenizerFast) -> Encoder:
    return Encoder(tokenizer, DocumentTokens(0, None), 0.25, 0.25)


def stream(texts: list[str]) -> Iterator[Document]:
    return (Document(text, "test") for text in texts)


def write(
    documents: Iterator[Document], encoder: Encoder, folder: Path, workers: int | None = None
) -> Counts:
    (counts,) = write_splits([Corpus(None, "text", documents, encoder, BadRows())], folder, workers)
    return counts


def numbered(count: int) -> list[str]:
    return [f"Document {i}. " + "some words " * (i % 7) for i in range(count)]


def read(folder: Path, tokenizer: PreTrainedTokenizerFast) -> dict[str, list[str]]:
    """Split -> texts of its documents."""
    texts = {}
    for name in SPLITS:
        if (folder / f"{name}.bin").stat().st_size:  # an empty file cannot be mapped
            indexed = IndexedDataset(str(folder / name))
            parts = [indexed.get(i).tolist() for i in range(len(indexed))]
            texts[name] = [str(tokenizer.decode(ids[:-1])) for ids in parts]
    return texts


def test_round_trip_and_counts(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, encoder: Encoder
) -> None:
    texts = numbered(200)
    counts = write(stream(texts), encoder, tmp_path)
    found = read(tmp_path, tokenizer)
    assert sorted(found) == sorted(SPLITS)
    assert sorted(itertools.chain(*found.values())) == sorted(texts)
    for name, kept in found.items():
        assert kept == [text for text in texts if text in set(kept)]  # in the order of the source
        indexed = IndexedDataset(str(tmp_path / name))  # its arrays die with it
        tokens = int(indexed.sequence_lengths.sum())
        assert counts.splits[name] == SplitCounts(len(kept), tokens, sum(map(len, kept)), tokens)
    assert counts.documents == 200
    assert counts.duplicates == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        f"{name}.{ending}" for name in SPLITS for ending in ("bin", "idx")
    )


@settings(deadline=None, max_examples=25)
@given(texts=st.lists(st.text("ab c", min_size=1, max_size=6), min_size=1), data=st.data())
def test_a_text_has_one_split_in_any_order(
    tmp_path_factory: pytest.TempPathFactory,
    tokenizer: PreTrainedTokenizerFast,
    encoder: Encoder,
    texts: list[str],
    data: st.DataObject,
) -> None:
    splits = []
    for order in (texts, data.draw(st.permutations(texts))):
        folder = tmp_path_factory.mktemp("order")
        counts = write(stream(order), encoder, folder, workers=2)
        found = read(folder, tokenizer)
        splits.append({name: sorted(kept) for name, kept in found.items()})
        assert counts.duplicates == len(texts) - len(set(texts))
        assert sum(len(set(kept)) for kept in found.values()) == len(set(texts))
    assert splits[0] == splits[1]


def test_files_do_not_depend_on_the_workers(
    tmp_path: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "_BATCH_CHARACTERS", 500)
    hashes = []
    for workers in (1, 2, 5):
        folder = tmp_path / str(workers)
        folder.mkdir()
        write(stream(numbered(300)), encoder, folder, workers)
        hashes.append(hash_files(folder))
    assert hashes[0] == hashes[1] == hashes[2]


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path, encoder: Encoder) -> None:
    process = psutil.Process()
    words = "for with " * 1_000
    used = []

    def documents() -> Iterator[Document]:
        for i in range(3_000):
            if i in (500, 2_999):
                gc.collect()
                used.append(process.memory_info().rss)
            yield Document(f"{i} {words}", "test")

    write(documents(), encoder, tmp_path, workers=2)
    assert used[1] - used[0] < 12 * 2**20  # to keep the 23 MB of text, or its tokens, takes more


def test_reading_waits_for_writing() -> None:
    started = []
    release = threading.Event()

    def slow(batch: int) -> int:
        release.wait(10)
        return batch

    def items() -> Iterator[int]:
        for i in range(100):
            started.append(i)
            yield i

    results = writer._map_in_order(slow, items(), 2)
    threading.Timer(0.3, release.set).start()
    before = time.monotonic()
    assert next(results) == 0
    assert time.monotonic() - before > 0.2
    assert len(started) == 4
    assert list(results) == list(range(1, 100))


@pytest.mark.parametrize("name", ["train.bin", "train.idx", "hashes.partial"])
def test_full_disk(tmp_path: Path, encoder: Encoder, name: str) -> None:
    (tmp_path / name).symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as caught:
        write(stream(numbered(50)), encoder, tmp_path)
    assert caught.value.errno == errno.ENOSPC
    assert is_disk_full(caught.value)


def test_an_error_while_reading_passes_through(tmp_path: Path, encoder: Encoder) -> None:
    def broken() -> Iterator[Document]:
        yield from stream(numbered(3000))
        raise UserError("bad line")

    threads = threading.active_count()
    with pytest.raises(UserError, match="bad line"):
        write(broken(), encoder, tmp_path)
    assert threading.active_count() == threads


def test_repeats_are_counted_across_parts(tmp_path: Path) -> None:
    path = tmp_path / "hashes"
    values = np.arange(2**20 + 5, dtype=np.uint64)
    values[2**20] = values[2**20 - 1]
    np.concatenate([values, values[:3]]).tofile(path)
    assert writer._count_repeats(path) == 4
    path.write_bytes(b"")
    assert writer._count_repeats(path) == 0


@pytest.mark.parametrize(
    ("split", "advice"),
    [
        ("train", "or lower data.validation_fraction=0.1 or data.test_fraction=0.2"),
        ("validation", "or raise data.validation_fraction=0.1"),
        ("test", "or raise data.test_fraction=0.2"),
    ],
)
def test_too_little_text(split: str, advice: str) -> None:
    enough = {name: {"documents": 3, "tokens": 65} for name in SPLITS}

    def facts(splits: dict[str, dict[str, int]]) -> dict[str, object]:
        corpus = {"name": None, "kind": "text", "weight": 1.0, "splits": splits}
        return {"seq_length": 64, "corpora": [corpus], "splits": splits}

    check_splits(facts(enough), 0.1, 0.2)
    with pytest.raises(UserError) as caught:
        check_splits(facts(enough | {split: {"documents": 2, "tokens": 64}}), 0.1, 0.2)
    message = str(caught.value)
    assert message.startswith(
        f"the {split} split has 2 documents and 64 tokens, but one sequence of data.seq_length=64 "
        "needs 65; the whole corpus has 8 documents and 194 tokens"
    )
    assert message.endswith(advice)
