"""A `dataset` artifact -> training and validation batches, and whole documents for evaluation.

What a step trains on depends on the seed and the step alone: not on how many steps there will be,
nor on where a run was resumed, nor on the number of ranks. An epoch of a corpus is a permutation of
its samples that depends on the seed and the epoch's number; several corpora are interleaved by
weight, each with epochs of its own.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset

from flagscale.data.layout import check_split, parts_of, read_manifest
from flagscale.data.mixture import VALIDATION_SEED, Mixture, weights_of
from flagscale.data.prefetch import Ahead
from flagscale.data.samples import Index, Samples
from flagscale.data.stacking import MicroBatch, stacked
from flagscale.errors import UserError
from flagscale.megatron import platform

logger = logging.getLogger(__name__)

_AHEAD = 8  # micro-batches
_MOST_COUNTED, _COUNTED_TOGETHER = 2**24, 256  # tokens, documents


@dataclass(frozen=True)
class BatchShape:
    """How samples are dealt out.

    Attributes:
        micro_batch_size: sequences a forward pass (b).
        global_batch_size: sequences an optimiser step, over all data-parallel ranks.
        data_parallel_rank: which share of each global batch to take.
        data_parallel_size: number of shares.
    """

    micro_batch_size: int
    global_batch_size: int
    data_parallel_rank: int = 0
    data_parallel_size: int = 1

    def __post_init__(self) -> None:
        together = self.micro_batch_size * self.data_parallel_size
        if self.global_batch_size % together:
            raise UserError(
                f"training.global_batch_size={self.global_batch_size} is not a multiple of "
                f"training.micro_batch_size={self.micro_batch_size} x {self.data_parallel_size} "
                "data-parallel ranks"
            )

    def micro_batches(self, step: int) -> Iterator[range]:
        """Positions, in the endless sequence of samples, of this rank's micro-batches."""
        first = step * self.global_batch_size + self.data_parallel_rank * self.micro_batch_size
        together = self.micro_batch_size * self.data_parallel_size
        for start in range(first, first + self.global_batch_size, together):
            yield range(start, start + self.micro_batch_size)


class Batches:
    """Micro-batches of some steps; each `iter()` starts again at the first of them.

    A micro-batch has `tokens`, `labels` and `position_ids`, int64 [b, s], `loss_mask`, float32
    [b, s], and `samples`, int64 [b]: the samples' numbers in the split, which no seed changes;
    `split`, int64, is that one's place in `SPLITS`, and `following` has the numbers of the next
    micro-batch, none after the last. All are in pinned memory where there is a GPU. A step has
    `global_batch_size / (micro_batch_size * data_parallel_size)` of them; a thread makes them
    ahead.

    With `reset_attention_mask`, documents are to be kept apart. Position ids then begin at 0 in
    each document, and a micro-batch also has:

    * `cu_seqlens`: int32 [pieces + 1], the documents' borders in the b * s tokens laid out row
      after row, strictly rising from 0 to b * s. What fills a row after its last conversation is a
      piece of its own, and each row begins one.
    * `max_seqlen`: int, tokens of the longest piece.

    No loss is then taken where a document's last token (EOD) would have to predict the first of
    the next one, about which it knows nothing.
    """

    def __init__(
        self,
        parts: list[Samples],
        weights: list[float],
        shape: BatchShape,
        seed: int,
        steps: Iterable[int],
        reset_attention_mask: bool,
        split: str,
    ) -> None:
        self._parts = parts
        self._weights = weights
        self._shape = shape
        self._seed = seed
        self._steps = steps
        self._reset, self._split = reset_attention_mask, split
        self._device = platform.device()

    def __iter__(self) -> Iterator[MicroBatch]:
        return Ahead(self._make, _AHEAD)

    def _make(self) -> Iterator[MicroBatch]:
        if platform.HAS_GPU:
            torch.cuda.set_device(self._device)  # a thread begins on device 0
        samples = Mixture(self._parts, self._weights, self._seed)
        numbered = (
            [samples.number(position) for position in positions]
            for step in self._steps
            for positions in self._shape.micro_batches(step)
        )
        nothing: list[int] = []
        for numbers, following in itertools.pairwise(itertools.chain(numbered, [nothing])):
            rows = [samples.sample(number) for number in numbers]
            yield stacked(rows, numbers, self._split, self._reset, following)


def prepare_index(dataset: Path, cache: Path) -> None:
    """Build what `train_iterator` and `validation_batches` read in `cache`.

    Where there are several processes, rank 0 calls this, and the others wait for it (a barrier is
    the caller's); they then only read, and need not all do so. A process alone may leave it out.

    Args:
        dataset: a `dataset` artifact; nothing is written there.
        cache: folder for the index, kept between runs; of one run at a time.

    Raises:
        UserError: the artifact is unusable, or a split does not fill one sample.
    """
    Index(dataset, cache, "train").build()
    prepare_validation_index(dataset, cache)


def prepare_validation_index(dataset: Path, cache: Path) -> None:
    """`prepare_index` of what `validation_batches` alone reads."""
    Index(dataset, cache, "validation").build()


def train_iterator(
    dataset: Path,
    cache: Path,
    *,
    micro_batch_size: int,
    global_batch_size: int,
    seed: int,
    start_step: int = 0,
    data_parallel_rank: int = 0,
    data_parallel_size: int = 1,
    reset_attention_mask: bool = False,
) -> Iterator[MicroBatch]:
    """Micro-batches of the training split, for ever, as `Batches` and `BatchShape` describe them.

    Args:
        dataset: a `dataset` artifact; nothing is written there.
        cache: folder of the sample index (`prepare_index`).
        micro_batch_size: see `BatchShape`; so are the other sizes.
        global_batch_size: sequences a step.
        seed: of the order.
        start_step: the optimiser step that the first batch belongs to, from 0.
        data_parallel_rank: this rank's share.
        data_parallel_size: number of shares.
        reset_attention_mask: keep documents apart; see `Batches`.

    Raises:
        UserError: the artifact is unusable, the split does not fill one sample, or the batch sizes
            do not divide.
        RuntimeError: there are several processes, and no index.
    """
    shape = BatchShape(micro_batch_size, global_batch_size, data_parallel_rank, data_parallel_size)
    index = Index(dataset, cache, "train")
    parts = index.open(reset_attention_mask)
    steps = itertools.count(start_step)
    weights = weights_of(index, parts)
    return iter(Batches(parts, weights, shape, seed, steps, reset_attention_mask, "train"))


def validation_batches(
    dataset: Path,
    cache: Path,
    *,
    micro_batch_size: int,
    global_batch_size: int,
    eval_iters: int,
    data_parallel_rank: int = 0,
    data_parallel_size: int = 1,
    reset_attention_mask: bool = False,
) -> Batches:
    """`eval_iters` global batches of the validation split: the same samples whatever the run.

    Iterate once per validation. Where the split has fewer samples than that, some come twice.
    Arguments and errors are those of `train_iterator`.
    """
    shape = BatchShape(micro_batch_size, global_batch_size, data_parallel_rank, data_parallel_size)
    index = Index(dataset, cache, "validation")
    parts = index.open(reset_attention_mask)
    found = sum(map(len, parts))
    if found < eval_iters * global_batch_size:
        logger.info(
            "validation: there are %d samples, so with eval_iters=%d and global_batch_size=%d some "
            "are used twice",
            found,
            eval_iters,
            global_batch_size,
        )
    weights = weights_of(index, parts)
    steps = range(eval_iters)
    return Batches(
        parts, weights, shape, VALIDATION_SEED, steps, reset_attention_mask, "validation"
    )


def split_documents(
    dataset: Path, split: str, max_documents: int | None = None
) -> list[np.ndarray]:
    """The documents of a split, in the order of the index, corpus after corpus.

    Args:
        dataset: a `dataset` artifact.
        split: `train`, `validation` or `test`.
        max_documents: take this many, spread evenly over the split; None: all.

    Returns:
        Token ids of each document, int64 [tokens], EOD last.

    Raises:
        UserError: the artifact is unusable.
    """
    check_split(split)
    facts = read_manifest(dataset)["facts"]
    files = dict.fromkeys(part.file for part in parts_of(facts, split))
    indexed = [IndexedDataset(str(dataset / file)) for file in files]
    places = [(one, number) for one in indexed for number in range(len(one))]
    count = len(places)
    if max_documents is not None and max_documents < count:
        places = [places[i * count // max_documents] for i in range(max_documents)]
    return [np.asarray(one[number], np.int64) for one, number in places]


def token_counts(dataset: Path, split: str, vocab_size: int) -> np.ndarray:
    """How often each token stands in a split, int64 [vocab_size].

    Of a large split a sample is counted, about `_MOST_COUNTED` tokens of evenly spread documents.

    Args:
        dataset: a `dataset` artifact.
        split: `train`, `validation` or `test`.
        vocab_size: of the tokenizer.

    Raises:
        UserError: the artifact is unusable.
    """
    check_split(split)
    facts = read_manifest(dataset)["facts"]
    files = dict.fromkeys(part.file for part in parts_of(facts, split))
    indexed = [IndexedDataset(str(dataset / file)) for file in files]
    tokens = sum(int(one.sequence_lengths.sum()) for one in indexed)
    every = max(1, round(tokens / _MOST_COUNTED))
    counts_v = np.zeros(vocab_size, dtype=np.int64)
    for one in indexed:
        chosen = range(0, len(one), every)
        for start in range(0, len(chosen), _COUNTED_TOGETHER):
            documents = [one[number] for number in chosen[start : start + _COUNTED_TOGETHER]]
            counts_v += np.bincount(np.concatenate(documents), minlength=vocab_size)
    return counts_v
