"""Documents -> tokens -> Megatron indexed datasets, one per split.

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
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from flagscale.data.encoder import SPLITS, EncodedDocument, Encoder
from flagscale.data.sources import Document
from flagscale.errors import UserError

logger = logging.getLogger(__name__)

_BATCH_CHARACTERS = 250_000  # some 60,000 tokens: 7 MB inside the tokenizer
_LOG_SECONDS = 5.0
_ItemT = TypeVar("_ItemT")
_ResultT = TypeVar("_ResultT")


@dataclass
class SplitCounts:
    """What a split holds; `tokens` includes one EOD a document."""

    documents: int = 0
    tokens: int = 0
    characters: int = 0

    def add(self, document: EncodedDocument) -> None:
        """Count one more document."""
        self.documents += 1
        self.tokens += len(document.ids)
        self.characters += document.characters


@dataclass
class Counts:
    """What was written; `duplicates`: documents whose text had occurred before (they are kept)."""

    splits: dict[str, SplitCounts] = field(
        default_factory=lambda: {name: SplitCounts() for name in SPLITS}
    )
    duplicates: int = 0

    @property
    def documents(self) -> int:
        """Documents in all splits."""
        return sum(counts.documents for counts in self.splits.values())

    @property
    def tokens(self) -> int:
        """Tokens in all splits, EODs included."""
        return sum(counts.tokens for counts in self.splits.values())


def corpus_file(split: str, corpus: str | None) -> str:
    """Prefix of the indexed dataset of a split; in training each of several corpora has its own."""
    return split if corpus is None or split != "train" else f"{split}-{corpus}"


def mask_file(corpus: str) -> str:
    """Prefix of what says which tokens of an indexed dataset are to be learnt."""
    return f"{corpus}.mask"


def write_splits(
    documents: Iterable[Document], encoder: Encoder, folder: Path, workers: int | None = None
) -> Counts:
    """Tokenise documents into `{train,validation,test}.{bin,idx}` in `folder`.

    Every document is one sequence of the indexed dataset. Exact duplicates are kept: to drop them
    would take memory that grows with the corpus; they are counted, and share a split.

    Args:
        documents: streamed; read once.
        encoder: of texts.
        folder: exists; holds a temporary file of 8 bytes a document meanwhile.
        workers: threads; default: the cores this process may use.
    """
    workers = workers or len(os.sched_getaffinity(0))
    counts = Counts()
    progress = _Progress()
    hashes = folder / "hashes.partial"
    with contextlib.ExitStack() as stack:
        builders = {name: stack.enter_context(_builder(folder, name, encoder)) for name in SPLITS}
        hash_file = stack.enter_context(hashes.open("wb"))
        stack.enter_context(_one_thread_a_call())
        batches = _batches(documents)
        for batch in stack.enter_context(
            contextlib.closing(_map_in_order(encoder, batches, workers))
        ):
            for item in batch:
                builders[item.split].add_document(item.ids, [len(item.ids)])
                counts.splits[item.split].add(item)
            hash_file.write(np.array([item.hash64 for item in batch], np.uint64).tobytes())
            progress.report(counts)
        for name, builder in builders.items():
            builder.finalize(str(folder / f"{name}.idx"))
    counts.duplicates = _count_repeats(hashes)
    hashes.unlink()
    progress.report(counts, final=True)
    return counts


def check_counts(
    counts: Counts, seq_length: int, validation_fraction: float, test_fraction: float
) -> None:
    """Make sure that each split fills at least one sequence.

    Raises:
        UserError: names the split, what it has, what it needs and what to change.
    """
    fractions = {"validation": validation_fraction, "test": test_fraction}
    for name, found in counts.splits.items():
        needed = seq_length + 1  # the labels are the tokens shifted by one
        if found.tokens >= needed:
            continue
        fraction = (
            f"raise data.{name}_fraction={fractions[name]}"
            if name in fractions
            else f"lower data.validation_fraction={validation_fraction} or "
            f"data.test_fraction={test_fraction}"
        )
        raise UserError(
            f"the {name} split has {found.documents} documents and {found.tokens} tokens, but one "
            f"sequence of data.seq_length={seq_length} needs {needed}; the whole corpus has "
            f"{counts.documents} documents and {counts.tokens} tokens. Give more or shorter "
            f"documents (a split never cuts one), lower data.seq_length, or {fraction}"
        )


@contextlib.contextmanager
def _builder(folder: Path, name: str, encoder: Encoder) -> Iterator[IndexedDatasetBuilder]:
    builder = IndexedDatasetBuilder(str(folder / f"{name}.bin"), dtype=encoder.dtype)
    try:
        yield builder
    except BaseException:
        with contextlib.suppress(OSError):  # a full disk fails again when buffers are flushed
            builder.data_file.close()
        raise


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


def _batches(documents: Iterable[Document]) -> Iterator[list[str]]:
    """Texts in groups of about `_BATCH_CHARACTERS`: what bounds the memory in use."""
    batch: list[str] = []
    size = 0
    for document in documents:
        batch.append(document.text)
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

    def __init__(self) -> None:
        self._start = self._last = time.monotonic()

    def report(self, counts: Counts, final: bool = False) -> None:
        now = time.monotonic()
        if not final and now - self._last < _LOG_SECONDS:
            return
        self._last = now
        rate = counts.tokens / max(now - self._start, 1e-9)
        logger.info(
            "%s%d documents, %d tokens, %.0f tokens/s",
            "done: " if final else "",
            counts.documents,
            counts.tokens,
            rate,
        )
