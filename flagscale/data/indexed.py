"""Megatron's indexed dataset, as far as `prepare-data` needs it: written, and its lengths read.

Training reads these files with Megatron-Core's own `IndexedDataset`. What writes them there comes
with the whole of Megatron-Core and torch, three times what the rest of the step imports, for a
header and three arrays; a test compares the files byte for byte.
"""

from __future__ import annotations

import struct
from array import array
from pathlib import Path
from typing import Any

import numpy as np

# Magic, version, code of the type, number of sequences, number of document borders.
_HEADER = struct.Struct("<9sQBQQ")
_MAGIC = b"MMIDIDX\x00\x00"
_CODES: dict[type[np.number[Any]], int] = {np.uint8: 1, np.int32: 4, np.uint16: 8}


def token_type(vocab_size: int) -> type[np.number[Any]]:
    """The type in which Megatron stores ids below `vocab_size`."""
    return np.uint16 if vocab_size < 65500 else np.int32


class IndexedWriter:
    """Writes an indexed dataset in which every document is one sequence."""

    def __init__(self, prefix: Path, dtype: type[np.number[Any]]) -> None:
        """Begin it.

        Args:
            prefix: path without `.bin` and `.idx`.
            dtype: of the values: uint8, uint16 or int32.
        """
        self._index = prefix.with_name(f"{prefix.name}.idx")
        self._dtype = dtype
        self._lengths = array("i")
        self._data = prefix.with_name(f"{prefix.name}.bin").open("wb")

    def add(self, values: np.ndarray) -> None:
        """Append a document."""
        self._data.write(np.ascontiguousarray(values, self._dtype).data)
        self._lengths.append(len(values))

    def finish(self) -> None:
        """Write the index."""
        self._data.close()
        lengths = np.array(self._lengths, "<i4")
        count = len(lengths)
        ends = np.cumsum(lengths, dtype="<i8") * np.dtype(self._dtype).itemsize
        with self._index.open("wb") as stream:
            stream.write(_HEADER.pack(_MAGIC, 1, _CODES[self._dtype], count, count + 1))
            stream.write(lengths.tobytes())
            stream.write(np.concatenate([[0], ends[:-1]]).astype("<i8")[:count].tobytes())
            stream.write(np.arange(count + 1, dtype="<i8").tobytes())

    def abandon(self) -> None:
        """Leave it unfinished.

        Raises:
            OSError: what was not yet written cannot be.
        """
        self._data.close()


def sequence_lengths(prefix: Path) -> np.ndarray:
    """Tokens of each sequence of an indexed dataset, int32 [sequences].

    Raises:
        ValueError: that is none.
    """
    path = prefix.with_name(f"{prefix.name}.idx")
    with path.open("rb") as stream:
        header = stream.read(_HEADER.size)
        if len(header) < _HEADER.size or not header.startswith(_MAGIC):
            raise ValueError(f"{path}: is no index of an indexed dataset")
        count = _HEADER.unpack(header)[3]
        return np.fromfile(stream, "<i4", count)
