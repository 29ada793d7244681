"""The samples of a `dataset` artifact, and the index that says which tokens each has.

Text is packed by Megatron's `GPTDataset`: documents, shuffled once, are laid end to end (each with
its EOD) and cut into samples. Conversations stay whole (`flagscale.data.packing`). Which tokens a
sample has depends on the dataset alone; a training's seed is of the order in which it takes them.
So what was computed for a sample serves every training. An index is built by one process, once, in
a cache folder, and then read by all; no collective call is made.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import Split

from flagscale.artifacts import digest
from flagscale.data.borders import Sample, starts_after
from flagscale.data.counts import part_lengths
from flagscale.data.layout import SPLITS, Part, mask_file, parts_of, read_manifest
from flagscale.data.packing import ChatSamples, load_packing, pack, save_packing
from flagscale.errors import UserError

_COMPLETE = "complete"
SEED = 0  # of all datasets' shuffles


class Samples(Protocol):
    """The samples of one part of a split, shuffled once and for all."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample: ...


class TextSamples:
    """`GPTDataset` as samples: its index, read without its tensors, masks and positions.

    Args:
        samples: Megatron's.
        eod_id: ends a document.
        masks_eod: EOD is not to predict the next document's first token.
    """

    def __init__(self, samples: GPTDataset, eod_id: int, masks_eod: bool) -> None:
        self._samples = samples
        self._eod_id = eod_id
        self._masks_eod = masks_eod

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Sample:
        row = self._row(index)
        tokens = row[:-1]
        starts = starts_after(tokens, self._eod_id)
        loss_mask = np.ones(len(tokens), np.float32)
        if self._masks_eod:
            loss_mask[tokens == self._eod_id] = 0
        return Sample(tokens, row[1:], loss_mask, starts)

    def _row(self, index: int) -> np.ndarray:
        """The tokens of a sample and the one after them, int64 [s + 1]."""
        read, documents = self._samples.dataset.get, self._samples.document_index
        place = int(self._samples.shuffle_index[index])
        (first, begin), (last, end) = self._samples.sample_index[place : place + 2].tolist()
        if first == last:
            return read(documents[first], begin, end + 1 - begin).astype(np.int64)
        pieces = [read(documents[first], begin)]
        pieces += [read(documents[between]) for between in range(first + 1, last)]
        pieces.append(read(documents[last], 0, end + 1))
        return np.concatenate(pieces, dtype=np.int64)


class Index:
    """The index of one split of a dataset in a cache folder.

    Args:
        dataset: a `dataset` artifact; nothing is written there.
        cache: folder that is kept between runs; of one run at a time.
        split: `train`, `validation` or `test`.

    Raises:
        UserError: the artifact is unusable, or the split does not fill one sample.
    """

    def __init__(self, dataset: Path, cache: Path, split: str) -> None:
        manifest = read_manifest(dataset)
        self._facts = manifest["facts"]
        self._dataset = dataset
        # Megatron's cache knows the path alone, and an artifact may be made anew at the same path
        self._cache = cache / digest(manifest["files"]).removeprefix("sha256:")[:16]
        self.parts = parts_of(self._facts, split)
        for part in self.parts:
            self._check(part)

    def build(self) -> None:
        """Build what is not there yet; in one process, rank 0 where there are several."""
        for part in self.parts:
            folder = self._folder(part)
            if (folder / _COMPLETE).exists():
                continue
            shutil.rmtree(folder, ignore_errors=True)  # a killed run may have left half an index
            if part.kind == "chat":
                lengths = part_lengths(self._dataset, part)
                save_packing(pack(lengths, self._facts["seq_length"] + 1, SEED), folder)
            else:
                self._gpt_dataset(part)
            (folder / _COMPLETE).touch()

    def open(self, reset_attention_mask: bool) -> list[Samples]:
        """The samples of each part.

        Raises:
            RuntimeError: the index is not there, and there are other processes.
        """
        if not all((self._folder(part) / _COMPLETE).exists() for part in self.parts):
            if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
                raise RuntimeError(
                    f"no index of {self._dataset} in {self._cache}: where there are several "
                    "processes, rank 0 calls prepare_index, then all of them wait for it"
                )
            self.build()
        return [self._samples(part, reset_attention_mask) for part in self.parts]

    def _samples(self, part: Part, reset_attention_mask: bool) -> Samples:
        eod_id = self._facts["eod_id"]
        if part.kind == "text":
            # What follows EOD cannot be seen from behind a border, and BOS goes without saying.
            masks_eod = reset_attention_mask or self._facts["bos_id"] is not None
            return TextSamples(self._gpt_dataset(part), eod_id, masks_eod)
        numbers = np.concatenate([np.arange(r.start, r.stop) for r in part.documents])
        return ChatSamples(
            self._dataset / part.file,
            self._dataset / mask_file(part.file),
            numbers,
            load_packing(self._folder(part)),
            self._facts["seq_length"],
            eod_id,
        )

    def _gpt_dataset(self, part: Part) -> GPTDataset:
        """Built directly: Megatron's builder of blends makes all ranks wait for one another."""
        prefix = str(self._dataset / part.file)
        index_split = Split(SPLITS.index(part.split))
        blends: list[tuple[list[str], None] | None] = [None] * len(SPLITS)
        blends[index_split.value] = ([prefix], None)
        config = GPTDatasetConfig(
            random_seed=SEED,
            sequence_length=self._facts["seq_length"],
            blend_per_split=blends,
            path_to_cache=str(self._folder(part)),
            tokenizer=_Vocabulary(self._facts["vocab_size"], self._facts["eod_id"]),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        indexed = GPTDataset.build_low_level_dataset(prefix, config)
        documents = np.concatenate(
            [np.arange(r.start, r.stop, dtype=np.int32) for r in part.documents]
        )
        return GPTDataset(indexed, prefix, documents, None, index_split, config)

    def _folder(self, part: Part) -> Path:
        plain = part.name is None and part.kind == "text"
        label = "" if plain else f"-{part.name or part.kind}"
        return self._cache / f"{part.split}{label}"

    def _check(self, part: Part) -> None:
        needed = self._facts["seq_length"] + 1
        if part.kind == "text" and part.tokens < needed:
            raise UserError(
                f"{self._dataset}: {part.whose} has {part.tokens} tokens, a sample needs {needed}"
            )
        if not part.tokens:
            raise UserError(f"{self._dataset}: {part.whose} has no conversation")


@dataclass(frozen=True)
class _Vocabulary:
    """What Megatron's datasets ask of a tokenizer. No padding token: samples are always full."""

    vocab_size: int
    eod: int

    @property
    def unique_identifiers(self) -> dict[str, int]:
        return {"vocab_size": self.vocab_size, "eod": self.eod}
