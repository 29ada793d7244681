"""Documents -> tokens -> Megatron indexed datasets, one per split.

Of several corpora, each has a training split of its own; their held-out documents are together.
Conversations have a second indexed dataset of the same structure, which says what is to be learnt.

Threads tokenise: the Rust tokenizer releases the interpreter's lock, and threads were measured
faster than processes (`docs/data.md`). Batches are written in the order in which they were read, so
the files do not depend on the number of threads; only a few batches are in memory at any time.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from flagscale.cores import available_cores
from flagscale.data.counts import Counts
from flagscale.data.encoder import Encode, EncodedDocument
from flagscale.data.indexed import IndexedWriter
from flagscale.data.layout import SPLITS, corpus_file, mask_file
from flagscale.data.rows import BadRow, BadRows
from flagscale.data.sources import Document

logger = logging.getLogger(__name__)

_BATCH_CHARACTERS = 250_000  # some 60,000 tokens: 7 MB inside the tokenizer
_LOG_SECONDS = 5.0
_ItemT = TypeVar("_ItemT")
_ResultT = TypeVar("_ResultT")


class Corpus(NamedTuple):
    """What is to be written.

    Attributes:
        name: of its training split; None where the corpus is alone.
        kind: `text` or `chat`.
        documents: streamed; read once.
        encode: of the documents; of all corpora with the same vocabulary.
        bad_rows: those met so far, by whoever reads the documents too.
    """

    name: str | None
    kind: str
    documents: Iterable[Document]
    encode: Encode
    bad_rows: BadRows


def write_splits(
    corpora: Sequence[Corpus], folder: Path, workers: int | None = None
) -> list[Counts]:
    """Tokenise documents into `{train[-NAME],validation,test}.{bin,idx}` in `folder`.

    Every document is one sequence of the indexed dataset. Exact duplicates are kept: to drop them
    would take memory that grows with the corpus; they are counted, and share a split.

    Args:
        corpora: written one after the other, in this order.
        folder: exists; holds a temporary file of 8 bytes a document meanwhile.
        workers: threads; default: the cores this process may keep busy.

    Returns:
        Counts of each corpus; repeats of another corpus' documents count for the later one.
    """
    workers = workers or max(1, int(available_cores()))
    counts = [Counts() for _ in corpora]
    progress = _Progress(counts)
    hashes = folder / "hashes.partial"
    hashes.touch()
    masked = any(corpus.kind == "chat" for corpus in corpora)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_one_thread_a_call())
        dtype = corpora[0].encode.dtype
        held_out = {
            split: stack.enter_context(_Writer(folder / split, dtype, masked))
            for split in SPLITS
            if split != "train"
        }
        repeats = 0
        for corpus, found in zip(corpora, counts, strict=True):
            train = folder / corpus_file("train", corpus.name)
            with _Writer(train, dtype, corpus.kind == "chat") as writer:
                _write(corpus, {"train": writer, **held_out}, found, hashes, workers, progress)
            repeats, before = _count_repeats(hashes), repeats
            found.duplicates = repeats - before
    hashes.unlink()
    progress.report(final=True)
    return counts


def _write(
    corpus: Corpus,
    writers: dict[str, _Writer],
    counts: Counts,
    hashes: Path,
    workers: int,
    progress: _Progress,
) -> None:
    batches = _batches(corpus.documents)

    with (
        hashes.open("ab") as hash_file,
        contextlib.closing(_map_in_order(corpus.encode, batches, workers)) as encoded,
    ):
        for batch in encoded:
            hashes64 = []
            for item in batch:
                if isinstance(item, BadRow):
                    corpus.bad_rows.add(item, encoding=True)
                    continue
                writers[item.split].add(item)
                counts.splits[item.split].add(item)
                counts.highest_id = max(counts.highest_id, int(item.ids.max()))
                if item.hash64 is not None:
                    hashes64.append(item.hash64)
            hash_file.write(np.array(hashes64, np.uint64).tobytes())
            progress.report()


class _Writer:
    """An indexed dataset, and one of masks if wanted; finished when the context is left."""

    def __init__(self, path: Path, dtype: type[np.number[Any]], masked: bool) -> None:
        types = {path.name: dtype}
        if masked:
            types[mask_file(path.name)] = np.uint8
        self._files = [IndexedWriter(path.with_name(name), dtype) for name, dtype in types.items()]

    def add(self, document: EncodedDocument) -> None:
        """Append a document."""
        mask = document.mask
        if mask is None:
            mask = np.ones(len(document.ids), np.uint8)
        for file, values in zip(self._files, (document.ids, mask), strict=False):
            file.add(values)

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for file in self._files:
            if kind is None:
                file.finish()
            else:
                with contextlib.suppress(OSError):  # a full disk fails again when flushed
                    file.abandon()


@contextlib.contextmanager
def _one_thread_a_call() -> Iterator[None]:
    """Keep the tokenizer from starting threads of its own beside ours."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents in groups of about `_BATCH_CHARACTERS`: what bounds the memory in use."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _map_in_order(
    function: Callable[[_ItemT], _ResultT], items: Iterable[_ItemT], workers: int
) -> Generator[_ResultT, None, None]:
    """Like `map`, in `workers` threads, with at most twice as many items under way."""
    pending: deque[Future[_ResultT]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="tokenise") as pool:
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) >= 2 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def _count_repeats(hashes: Path) -> int:
    """How many of the 64-bit values in a file repeat an earlier one; sorts the file in place."""
    if not hashes.stat().st_size:
        return 0
    values = np.memmap(hashes, np.uint64, "r+")
    values.sort()
    repeats, step = 0, 1 << 20
    for start in range(0, len(values), step):
        part = values[start : start + step + 1]
        repeats += int(np.count_nonzero(part[1:] == part[:-1]))
    return repeats


class _Progress:
    """A log line every few seconds."""

    def __init__(self, counts: list[Counts]) -> None:
        self._counts = counts
        self._start = self._last = time.monotonic()

    def report(self, final: bool = False) -> None:
        now = time.monotonic()
        if not final and now - self._last < _LOG_SECONDS:
            return
        self._last = now
        documents = sum(counts.documents for counts in self._counts)
        tokens = sum(counts.tokens for counts in self._counts)
        logger.info(
            "%s%d documents, %d tokens, %.0f tokens/s",
            "done: " if final else "",
            documents,
            tokens,
            tokens / max(now - self._start, 1e-9),
        )
