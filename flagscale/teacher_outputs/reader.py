"""Reads teacher outputs: any samples, in any order, by any number of processes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flagscale.artifacts import Manifest, check_file, check_names, open_artifact
from flagscale.errors import UserError
from flagscale.teacher_outputs.codecs import codec_of
from flagscale.teacher_outputs.facts import KIND, OutputsFacts
from flagscale.teacher_outputs.shards import ENTRY, INDEX, RECORDS, checksum, entries_of
from flagscale.teacher_outputs.values import Codec, Hidden, SparseTargets


class TeacherOutputs:
    """An artifact of kind `teacher-outputs`. No file stays open, so it survives a fork.

    Attributes:
        manifest: of the artifact.
        facts: what the outputs are of.
        codec: that they are in.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        """See `open`."""
        self._folder, self.manifest = folder, manifest
        self.facts = OutputsFacts.of(manifest.facts)
        self.codec: Codec = codec_of(self.facts)
        self._splits: dict[str, _Index] = {}

    @classmethod
    def open(cls, folder: Path) -> TeacherOutputs:
        """Open an artifact. Its records are checked when they are read, all else now.

        Raises:
            UserError: there is none, it is of another kind or version, or was changed.
        """
        manifest = open_artifact(folder, KIND, check_files=False)
        check_names(folder, manifest)
        for name in manifest.files:
            if not name.endswith(RECORDS):
                check_file(folder, manifest, name)
        return cls(folder, manifest)

    @property
    def manifest_facts(self) -> dict[str, Any]:
        """Everything that the manifest says of the outputs, see `OutputsWriter.finish`."""
        return self.manifest.facts

    def missing(self, split: str, samples: Sequence[int]) -> list[int]:
        """Those of the samples that are not there, in their order."""
        wanted = np.asarray(samples, np.int64)
        absent: list[int] = wanted[~np.isin(wanted, self._index(split).entries["sample"])].tolist()
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
        records = [self._record(split, int(sample)) for sample in samples]
        return self.codec.decode(records)

    def _record(self, split: str, sample: int) -> bytes:
        index = self._index(split)
        at = int(np.searchsorted(index.entries["sample"], sample))
        if at == len(index.entries) or index.entries["sample"][at] != sample:
            raise UserError(
                f"{self._folder}: has no answer to sample {sample} of {split}, only to "
                f"{len(index.entries)} others; let cache-teacher ask for it: "
                "teacher_outputs.samples: all, or met with this training's seed, train_iters and "
                "global_batch_size"
            )
        _, offset, size, expected = index.entries[at].tolist()
        path = self._folder / split / f"{index.shards[at]}{RECORDS}"
        with path.open("rb") as file:
            file.seek(offset)
            record = file.read(size)
        if len(record) != size or checksum(split, sample, record) != expected:
            raise UserError(
                f"{path}: the record of sample {sample} of {split}, {size} bytes at {offset}, is "
                "damaged: its checksum is another; make the teacher-outputs anew"
            )
        return record

    def _index(self, split: str) -> _Index:
        if split not in self._splits:
            self._splits[split] = _Index(self._folder, split)
        return self._splits[split]


class _Index:
    """Where the records of a split are.

    Attributes:
        entries: `ENTRY` [n], by sample, each once.
        shards: [n], the names of the shards that they are in.
    """

    def __init__(self, folder: Path, split: str) -> None:
        files = sorted((folder / split).glob(f"*{INDEX}"))
        parts = [entries_of(file.read_bytes()) for file in files]
        names = np.repeat([file.stem for file in files], [len(part) for part in parts])
        entries = np.concatenate([np.empty(0, ENTRY), *parts])
        _, order = np.unique(entries["sample"], return_index=True)
        self.entries, self.shards = entries[order], names[order]
