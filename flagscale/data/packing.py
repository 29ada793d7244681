"""Whole conversations packed into samples, where plain text would be cut.

A sample of `seq_length` tokens and as many labels, one ahead, is a row of `seq_length + 1` tokens.
Conversations are put whole into rows, the longest first, each into the fullest row that still has
room for it. What is left of a row is filled with EOD, without loss. A conversation longer than a
row loses its end.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from flagscale.data.borders import Sample

_FIRSTS = "firsts.npy"
_ORDER = "order.npy"


class Packing(NamedTuple):
    """Which conversations each row holds: row i has `order[firsts[i] : firsts[i + 1]]`.

    Attributes:
        order: int64 [conversations].
        firsts: int64 [rows + 1].
    """

    order: np.ndarray
    firsts: np.ndarray


def pack(lengths: np.ndarray, capacity: int, seed: int) -> Packing:
    """Deal conversations out to rows, best fit decreasing; equal lengths and rows are shuffled.

    Args:
        lengths: tokens of each conversation, at least 1; what exceeds `capacity` counts as that.
        capacity: tokens a row.
        seed: of the shuffles.
    """
    random = np.random.default_rng(seed)
    lengths = np.minimum(lengths, capacity)
    shuffled = random.permutation(len(lengths))
    shuffled = shuffled[np.argsort(-lengths[shuffled], kind="stable")]
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # tokens left -> rows
    sizes = 0  # bit n is set: there is a row with n tokens left
    for conversation in shuffled.tolist():
        length = int(lengths[conversation])
        enough = sizes >> length
        if enough:
            room = length + (enough & -enough).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                sizes ^= 1 << room
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(conversation)
        left = room - length
        with_room[left].append(row)
        sizes |= 1 << left
    dealt = [rows[row] for row in random.permutation(len(rows)).tolist()]
    return Packing(
        order=np.array([conversation for row in dealt for conversation in row], np.int64),
        firsts=np.cumsum([0, *map(len, dealt)], dtype=np.int64),
    )


def save_packing(packing: Packing, folder: Path) -> None:
    """Write it into a folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / _ORDER, packing.order)
    np.save(folder / _FIRSTS, packing.firsts)


def load_packing(folder: Path) -> Packing:
    """Read it, mapped into memory."""
    return Packing(
        np.load(folder / _ORDER, mmap_mode="r"), np.load(folder / _FIRSTS, mmap_mode="r")
    )


class ChatSamples:
    """Rows of conversations as samples; loss on the tokens that the mask marks.

    Args:
        tokens: prefix of an indexed dataset, a document a conversation.
        mask: prefix of one of the same structure, 1 where a token is to be learnt.
        documents: numbers in `tokens` of the conversations that `packing` has numbered from 0.
        packing: of these.
        seq_length: tokens a sample.
        eod_id: fills what is left.
    """

    def __init__(
        self,
        tokens: Path,
        mask: Path,
        documents: np.ndarray,
        packing: Packing,
        seq_length: int,
        eod_id: int,
    ) -> None:
        # Only training reads rows; `prepare-data`, which counts them, needs no Megatron-Core.
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        self._tokens = IndexedDataset(str(tokens))
        self._mask = IndexedDataset(str(mask))
        self._documents = documents
        self._packing = packing
        self._seq_length = seq_length
        self._eod_id = eod_id

    def __len__(self) -> int:
        return len(self._packing.firsts) - 1

    def __getitem__(self, index: int) -> Sample:
        row = np.full(self._seq_length + 1, self._eod_id, np.int64)
        wanted = np.zeros(self._seq_length + 1, np.float32)
        starts = []
        place = 0
        first, last = self._packing.firsts[index : index + 2]
        for conversation in self._packing.order[first:last]:
            number = int(self._documents[conversation])
            room = len(row) - place
            ids = self._tokens.get(number)[:room]
            row[place : place + len(ids)] = ids
            wanted[place : place + len(ids)] = self._mask.get(number)[:room]
            wanted[place] = 0  # nothing before it tells a conversation's first token
            starts.append(place)
            place += len(ids)
        starts.append(place)  # what fills the row
        begins = np.array(starts, np.int64)
        return Sample(row[:-1], row[1:], wanted[1:], begins[begins < self._seq_length])
