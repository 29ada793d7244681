"""Shards: files of records, each with an index that is written after the records.

Whoever is killed while writing leaves at most records that no index names, and half an entry of the
index. Whether the disk kept what the index names, checksums say: no write waits for the disk.
"""

from __future__ import annotations

import logging
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

logger = logging.getLogger(__name__)

SHARD_BYTES = 2**28  # an object store takes files of this size at once
RECORDS, INDEX = ".records", ".index"
ENTRY = np.dtype([("sample", "<i8"), ("offset", "<i8"), ("bytes", "<i8"), ("checksum", "<u4")])


def checksum(split: str, sample: int, record: bytes) -> int:
    """CRC-32 of a record and of whose it is: one in another's place is found, too."""
    return zlib.crc32(record, zlib.crc32(f"{split}/{sample}".encode()))


def entries_of(content: bytes) -> np.ndarray:
    """The entries of an index; half an entry at the end is none."""
    return np.frombuffer(content[: len(content) // ENTRY.itemsize * ENTRY.itemsize], ENTRY)


class ShardWriter:
    """The shards of one split that one writer writes."""

    def __init__(self, folder: Path, split: str, writer: int) -> None:
        """Begin a new shard with the first record; what is there already is left alone.

        Args:
            folder: of the split.
            split: its name.
            writer: number that no other process writes under.
        """
        self._folder, self._split, self._writer = folder, split, writer
        self._files: tuple[BinaryIO, BinaryIO] | None = None
        self._offset = 0

    def write(self, samples: Sequence[int], records: Sequence[bytes]) -> None:
        """Append records; when it returns, a kill of this process does not lose them.

        Raises:
            OSError: they cannot be written.
        """
        if not records:
            return
        if self._files is None or self._offset >= SHARD_BYTES:
            self.close()
            self._files = self._new()
        sizes = np.array([len(record) for record in records], np.int64)
        entries = np.empty(len(records), ENTRY)
        entries["sample"] = samples
        entries["offset"] = self._offset + np.cumsum(sizes) - sizes
        entries["bytes"] = sizes
        entries["checksum"] = [
            checksum(self._split, sample, record)
            for sample, record in zip(samples, records, strict=True)
        ]
        for file, content in zip(self._files, (b"".join(records), entries.tobytes()), strict=True):
            file.write(content)
            file.flush()
        self._offset += int(sizes.sum())

    def close(self) -> None:
        """Close the shard that is open."""
        for file in self._files or ():
            file.close()
        self._files = None

    def _new(self) -> tuple[BinaryIO, BinaryIO]:
        self._folder.mkdir(parents=True, exist_ok=True)
        name = f"{self._writer:05d}"
        numbers = [int(path.stem.split("-")[1]) for path in self._folder.glob(f"{name}-*")]
        stem = f"{name}-{max(numbers, default=-1) + 1:05d}"
        self._offset = 0
        return (
            (self._folder / f"{stem}{RECORDS}").open("xb"),
            (self._folder / f"{stem}{INDEX}").open("xb"),
        )


def repair(folder: Path, split: str) -> np.ndarray:
    """Make the shards of a split agree with their indices; nobody may be writing there.

    Args:
        folder: of the split; need not be there.
        split: its name.

    Returns:
        int64, the samples whose records are there and whole; in order, each once.
    """
    found = [np.empty(0, np.int64)]
    size = sum(path.stat().st_size for path in folder.glob(f"*{RECORDS}"))
    if size:
        logger.info("%s: checking the %.1f MB that are there", folder, size / 1e6)
    for stem in sorted({path.stem for path in folder.glob("[0-9]*")}):
        records, index = folder / f"{stem}{RECORDS}", folder / f"{stem}{INDEX}"
        for path in (records, index):
            path.touch()
        content = index.read_bytes()
        entries = entries_of(content)
        whole = entries[list(_whole(records, split, entries))]
        if len(whole) < len(entries):
            logger.warning(
                "%s: %d of %d records are damaged; their samples are asked for anew",
                records,
                len(entries) - len(whole),
                len(entries),
            )
        _keep(records, index, content, whole)
        found.append(whole["sample"])
    return np.unique(np.concatenate(found))


def _whole(records: Path, split: str, entries: np.ndarray) -> Iterator[bool]:
    with records.open("rb") as file:
        for sample, offset, size, expected in entries.tolist():
            file.seek(max(offset, 0))
            record = file.read(max(size, 0))
            yield size > 0 and len(record) == size and checksum(split, sample, record) == expected


def _keep(records: Path, index: Path, content: bytes, entries: np.ndarray) -> None:
    """Let the shard have these entries and no bytes after the last of them."""
    if not len(entries):
        index.unlink()
        records.unlink()
        return
    if entries.tobytes() != content:
        partial = index.with_name(f".{index.name}.partial")
        partial.write_bytes(entries.tobytes())
        os.replace(partial, index)
    end = int((entries["offset"] + entries["bytes"]).max())
    if end < records.stat().st_size:
        os.truncate(records, end)
