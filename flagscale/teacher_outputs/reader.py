"""Reads teacher outputs: any samples, in any order, by any number of processes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from flagscale.artifacts import Manifest
from flagscale.errors import UserError
from flagscale.teacher_outputs.codecs import codec_of
from flagscale.teacher_outputs.facts import KIND, OutputsFacts
from flagscale.teacher_outputs.places import OutputsPlace, Range, place_of
from flagscale.teacher_outputs.shards import ENTRY, INDEX, RECORDS, checksum, entries_of
from flagscale.teacher_outputs.values import Codec, Hidden, SparseTargets


class TeacherOutputs:
    """An artifact of kind `teacher-outputs`.

    Attributes:
        facts: what the outputs are of.
    """

    def __init__(self, place: OutputsPlace) -> None:
        """See `open`."""
        self._place = place
        self.facts = OutputsFacts.of(place.manifest.facts)
        names = sorted(name for name in place.manifest.files if name.endswith(INDEX))
        splits = {PurePosixPath(name).parent.name for name in names}
        self._splits = {
            split: _Index({n: place.read(n) for n in names if n.startswith(f"{split}/")})
            for split in splits
        }

    @classmethod
    def open(cls, path: Path) -> TeacherOutputs:
        """Open an artifact, or what a pointer points to: of an object store only what is read.

        Names, indices and manifest are checked now, records when they are read.

        Raises:
            UserError: there is none, it is of another kind or version, or was changed.
        """
        return cls(place_of(path, KIND))

    @cached_property
    def codec(self) -> Codec:
        """That they are in.

        Raises:
            UserError: this program does not know it.
        """
        return codec_of(self.facts)

    @property
    def manifest(self) -> Manifest:
        """Of the artifact."""
        return self._place.manifest

    @property
    def manifest_facts(self) -> dict[str, Any]:
        """Everything that the manifest says of the outputs, see `OutputsWriter.finish`."""
        return self._place.manifest.facts

    def missing(self, split: str, samples: Sequence[int]) -> list[int]:
        """Those of the samples that are not there, in their order."""
        wanted, index = np.asarray(samples, np.int64), self._splits.get(split)
        if index is None:
            return [int(sample) for sample in samples]
        absent: list[int] = wanted[~np.isin(wanted, index.entries["sample"])].tolist()
        return absent

    def read(self, split: str, samples: Sequence[int]) -> Hidden | SparseTargets:
        """What the teacher answered to whole samples.

        Args:
            split: `train`, `validation` or `test`.
            samples: [b], their numbers in the split, in any order.

        Returns:
            Tensors [b, s, ...] on the CPU.

        Raises:
            UserError: a sample is not there, or its record is damaged.
        """
        absent = self.missing(split, samples)
        if absent:
            there = len(self._splits[split].entries) if split in self._splits else 0
            raise UserError(
                f"{self._place.name}: has no answer to sample {absent[0]} of {split}, only to "
                f"{there} others; let cache-teacher ask for it: teacher_outputs.samples: all, or "
                "met with this training's seed, train_iters and global_batch_size"
            )
        index = self._splits[split]
        found = [index.find(sample) for sample in samples]
        records = self._place.ranges([place for place, _ in found])
        for sample, record, (place, expected) in zip(samples, records, found, strict=True):
            if len(record) != place[2] or checksum(split, sample, record) != expected:
                raise UserError(
                    f"{self._place.name}: the record of sample {sample} of {split} ({place[0]}, "
                    f"{place[2]} bytes at {place[1]}) is damaged: its checksum is another; make "
                    f"the {KIND} anew"
                )
        return self.codec.decode(records)


class _Index:
    """Where the records of a split are.

    Attributes:
        entries: `ENTRY` [n], by sample, each once.
    """

    def __init__(self, files: dict[str, bytes]) -> None:
        parts = [entries_of(content) for content in files.values()]
        shards = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        entries = np.concatenate([np.empty(0, ENTRY), *parts])
        _, order = np.unique(entries["sample"], return_index=True)
        self.entries, self._shard = entries[order], shards[order]
        self._names = [name.removesuffix(INDEX) + RECORDS for name in files]

    def find(self, sample: int) -> tuple[Range, int]:
        """Where the record of a sample that is there is, and its checksum."""
        at = int(np.searchsorted(self.entries["sample"], sample))
        _, offset, size, expected = self.entries[at].tolist()
        return (self._names[self._shard[at]], offset, size), expected
