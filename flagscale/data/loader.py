"""A `dataset` artifact -> training and validation batches, and whole documents for evaluation.

Packing is Megatron's: documents, shuffled once, are laid end to end (each with its EOD) and cut
into samples of `seq_length` tokens, the labels one token ahead. An epoch is a permutation of the
samples that depends on the seed and the epoch's number, so what a step trains on depends on the
seed and the step alone: not on how many steps there will be, nor on where a run was resumed.
"""

from __future__ import annotations

import itertools
import json
import logging
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset

from flagscale.artifacts import MANIFEST, digest
from flagscale.data.encoder import SPLITS
from flagscale.errors import UserError

logger = logging.getLogger(__name__)

_VALIDATION_SEED = 0  # of no run: every run validates on the same samples
_BATCH_KEYS = ("tokens", "labels", "loss_mask", "position_ids")


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

    A micro-batch has `tokens`, `labels` and `position_ids`, int64 [b, s], and `loss_mask`,
    float32 [b, s]; attention is causal. A step has `global_batch_size / (micro_batch_size *
    data_parallel_size)` of them.
    """

    def __init__(
        self, samples: GPTDataset, shape: BatchShape, seed: int, steps: Iterable[int]
    ) -> None:
        self._samples = samples
        self._shape = shape
        self._seed = seed
        self._steps = steps

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        order = _Order(len(self._samples), self._seed)
        for step in self._steps:
            for positions in self._shape.micro_batches(step):
                rows = [self._samples[order[position]] for position in positions]
                yield {key: torch.stack([row[key] for row in rows]) for key in _BATCH_KEYS}


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
) -> Iterator[dict[str, torch.Tensor]]:
    """Micro-batches of the training split, for ever, as `Batches` and `BatchShape` describe them.

    All ranks must call this together: rank 0 builds the sample index, the others then read it.

    Args:
        dataset: a `dataset` artifact; nothing is written there.
        cache: folder for the sample index, kept between runs; of one run at a time.
        micro_batch_size: see `BatchShape`; so are the other sizes.
        global_batch_size: sequences a step.
        seed: of the order.
        start_step: the optimiser step that the first batch belongs to, from 0.
        data_parallel_rank: this rank's share.
        data_parallel_size: number of shares.

    Raises:
        UserError: the artifact is unusable, the split does not fill one sample, or the batch sizes
            do not divide.
    """
    shape = BatchShape(micro_batch_size, global_batch_size, data_parallel_rank, data_parallel_size)
    samples = _open_samples(dataset, cache, "train", seed)
    return iter(Batches(samples, shape, seed, itertools.count(start_step)))


def validation_batches(
    dataset: Path,
    cache: Path,
    *,
    micro_batch_size: int,
    global_batch_size: int,
    eval_iters: int,
    data_parallel_rank: int = 0,
    data_parallel_size: int = 1,
) -> Batches:
    """`eval_iters` global batches of the validation split: the same samples whatever the run.

    Iterate once per validation. Where the split has fewer samples than that, some come twice.
    Arguments and errors are those of `train_iterator`.
    """
    shape = BatchShape(micro_batch_size, global_batch_size, data_parallel_rank, data_parallel_size)
    samples = _open_samples(dataset, cache, "validation", _VALIDATION_SEED)
    if len(samples) < eval_iters * global_batch_size:
        logger.info(
            "validation: there are %d samples, so with eval_iters=%d and global_batch_size=%d some "
            "are used twice",
            len(samples),
            eval_iters,
            global_batch_size,
        )
    return Batches(samples, shape, _VALIDATION_SEED, range(eval_iters))


def split_documents(
    dataset: Path, split: str, max_documents: int | None = None
) -> list[np.ndarray]:
    """The documents of a split, in the order of the index.

    Args:
        dataset: a `dataset` artifact.
        split: `train`, `validation` or `test`.
        max_documents: take this many, spread evenly over the split; None: all.

    Returns:
        Token ids of each document, int64 [tokens], EOD last.

    Raises:
        UserError: the artifact is unusable.
    """
    _check_split(split)
    _read_manifest(dataset)
    indexed = IndexedDataset(str(dataset / split))
    count = len(indexed)
    chosen: Iterable[int] = range(count)
    if max_documents is not None and max_documents < count:
        chosen = [i * count // max_documents for i in range(max_documents)]
    return [np.asarray(indexed[i], np.int64) for i in chosen]


class _Order:
    """Position in an endless sequence of epochs -> sample; keeps one epoch's permutation."""

    def __init__(self, count: int, seed: int) -> None:
        self._count = count
        self._seed = seed
        self._epoch = 0
        self._permutation: np.ndarray | None = None  # epoch 0: Megatron has shuffled already

    def __getitem__(self, position: int) -> int:
        epoch, place = divmod(position, self._count)
        if epoch != self._epoch:
            self._epoch = epoch
            random = np.random.default_rng((self._seed, epoch))
            self._permutation = random.permutation(self._count) if epoch else None
        return place if self._permutation is None else int(self._permutation[place])


def _open_samples(dataset: Path, cache: Path, split: str, seed: int) -> GPTDataset:
    """One epoch of samples."""
    _check_split(split)
    manifest = _read_manifest(dataset)
    facts = manifest["facts"]
    needed, found = facts["seq_length"] + 1, facts["splits"][split]["tokens"]
    if found < needed:
        raise UserError(f"{dataset}: the {split} split has {found} tokens, a sample needs {needed}")
    # Megatron's cache knows the path alone, and an artifact may be made anew at the same path
    folder = cache / digest(manifest["files"]).removeprefix("sha256:")[:16] / f"{split}-{seed}"
    complete = folder / "complete"
    is_first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    if is_first and not complete.exists():
        shutil.rmtree(folder, ignore_errors=True)  # a killed run may have left half an index
    blends: list[tuple[list[str], None] | None] = [None] * len(SPLITS)
    blends[SPLITS.index(split)] = ([str(dataset / split)], None)
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=facts["seq_length"],
        blend_per_split=blends,
        path_to_cache=str(folder),
        tokenizer=_Vocabulary(facts["vocab_size"], facts["eod_id"]),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    builder = BlendedMegatronDatasetBuilder(GPTDataset, [None] * len(SPLITS), lambda: True, config)
    samples = builder.build()[SPLITS.index(split)]
    if is_first:
        complete.touch()
    return samples


@dataclass(frozen=True)
class _Vocabulary:
    """What Megatron's datasets ask of a tokenizer. No padding token: samples are always full."""

    vocab_size: int
    eod: int

    @property
    def unique_identifiers(self) -> dict[str, int]:
        return {"vocab_size": self.vocab_size, "eod": self.eod}


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"split {split!r}: must be one of {', '.join(SPLITS)}")


def _read_manifest(dataset: Path) -> dict[str, Any]:
    """The manifest alone: the step has checked the files when it opened the artifact."""
    try:
        manifest = json.loads((dataset / MANIFEST).read_text(encoding="utf-8"))
        kind = manifest["kind"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{dataset}: no dataset here ({MANIFEST}: {error})") from error
    if kind != "dataset":
        raise UserError(f"{dataset}: is a {kind!r}, but a 'dataset' is needed")
    return manifest
