"""Writes teacher outputs; killed at any point and begun again it goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flagscale.artifacts import disk_full, flush, is_disk_full, write_json
from flagscale.errors import UserError
from flagscale.teacher_outputs.facts import OutputsFacts
from flagscale.teacher_outputs.shards import INDEX, RECORDS, ShardWriter, entries_of, repair

FACTS = "facts.json"


class OutputsWriter:
    """One process's writer of teacher outputs; several may write into one folder side by side.

    First one process asks what is `missing`, and tells the others; then all `write`; when all have
    closed, one calls `finish` and puts what that returns into the artifact's manifest.
    """

    def __init__(self, folder: Path, facts: OutputsFacts, writer: int = 0) -> None:
        """Begin, or go on with what a killed process left.

        Args:
            folder: where to write, of the artifact to be.
            facts: of all that is written there.
            writer: number of this process among those that write into the folder.

        Raises:
            UserError: other facts' outputs are there.
        """
        self.folder, self._writer = folder, writer
        self._shards: dict[str, ShardWriter] = {}
        folder.mkdir(parents=True, exist_ok=True)
        self._facts = facts
        self._claim()

    def missing(self, split: str, samples: Sequence[int]) -> list[int]:
        """Those of the samples that are not there yet, in their order; nobody may be writing.

        What a kill left half written, and what the disk lost, is removed.
        """
        there = repair(self.folder / split, split)
        wanted = np.asarray(samples, np.int64)
        absent: list[int] = wanted[~np.isin(wanted, there)].tolist()
        return absent

    def write(self, split: str, samples: Sequence[int], records: Sequence[bytes]) -> None:
        """Keep records; when it returns, a kill does not lose them.

        Args:
            split: that the samples are of.
            samples: [b], their numbers.
            records: [b], from the codec's `encode`.

        Raises:
            UserError: the disk is full.
        """
        shards = self._shards.setdefault(
            split, ShardWriter(self.folder / split, split, self._writer)
        )
        try:
            shards.write(samples, records)
        except OSError as error:
            if is_disk_full(error):
                raise disk_full(self.folder) from error
            raise

    def close(self) -> None:
        """Close what is open; writing again begins a new shard."""
        for shards in self._shards.values():
            shards.close()

    def finish(self, totals: Mapping[str, int]) -> dict[str, Any]:
        """What the artifact's manifest says of the outputs, once every writer has closed.

        Args:
            totals: split -> how many samples the dataset has there.

        Returns:
            The fields of `OutputsFacts`; `samples`: split -> `stored` and `of`; `bytes_per_token`,
            of the records and their index.
        """
        self.close()
        for partial in self.folder.rglob(".*"):  # of writers that were killed
            if partial.is_file():
                partial.unlink()
        counts = {split: self._count(split) for split in totals}
        tokens = sum(counts.values()) * self._facts.seq_length
        size = sum(
            path.stat().st_size
            for split in totals
            for path in (self.folder / split).glob("*")
            if path.suffix in (RECORDS, INDEX)
        )
        return {
            **self._facts.values(),
            "samples": {s: {"stored": counts[s], "of": total} for s, total in totals.items()},
            "bytes_per_token": size / tokens if tokens else 0.0,
        }

    def _count(self, split: str) -> int:
        found = [np.empty(0, np.int64)]
        for index in (self.folder / split).glob(f"*{INDEX}"):
            found.append(entries_of(index.read_bytes())["sample"])
        return len(np.unique(np.concatenate(found)))

    def _claim(self) -> None:
        file = self.folder / FACTS
        if not file.exists():
            # Several may begin at once, and all write the same; the others' files come and go.
            partial = self.folder / f".{FACTS}.{self._writer}"
            write_json(partial, self._facts.values())
            with partial.open("rb") as stream:
                os.fsync(stream.fileno())
            os.replace(partial, file)
            flush(self.folder, deep=False)  # before the records, which are nobody's without it
            return
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{file}: cannot be read: {error}; remove {self.folder}") from error
        there = OutputsFacts.of(values)
        different = self._facts.differences(there)
        if different:
            raise UserError(
                f"{self.folder}: has teacher outputs of another kind ({'; '.join(different)}); "
                "remove the folder, or write to another"
            )
