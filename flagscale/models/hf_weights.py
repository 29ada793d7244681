"""Which rows of which Hugging Face tensors a Megatron-Core tensor is made of: one map, both ways.

Megatron-Core names its weights by the keys of a distributed checkpoint (`sharded_state_dict`):
`decoder.layers.self_attention.linear_qkv.weight` holds every layer's, stacked along a leading axis.
A rank has a slice of such a tensor. Whatever the family, a layer's tensor is rows of Hugging Face
tensors put together, with all their columns: query, key and value heads by key/value group, gate
over up, a vocabulary with padding below (`hf_rules`).
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass

from flagscale.errors import UserError
from flagscale.megatron.shape import ModelShape
from flagscale.models.hf_rules import LAYERS, Rows, Table, rules

_NUMBER = re.compile(r"(\d+)\.")


@dataclass(frozen=True)
class Located:
    """What a slice of a Megatron-Core tensor lies in.

    Attributes:
        parts: that make up the whole tensor of one layer or expert, in order.
        offset: of the slice in it: row, then column if there are columns.
    """

    parts: tuple[Rows, ...]
    offset: tuple[int, ...]

    def heights(self) -> dict[str, int]:
        """How many rows each Hugging Face tensor has that is part of this one."""
        heights: dict[str, int] = {}
        for part in self.parts:
            if part.name is not None:
                heights[part.name] = max(part.stop, heights.get(part.name, 0))
        return heights

    def overlaps(self, length: int) -> Iterator[tuple[int, Rows]]:
        """The rows that `length` rows from the offset on are made of.

        Yields:
            Where they start in the slice, and the rows.
        """
        first, last, at = self.offset[0], self.offset[0] + length, 0
        for part in self.parts:
            start, stop = max(first, at), min(last, at + len(part))
            if start < stop:
                shift = part.start - at
                yield start - first, Rows(part.name, start + shift, stop + shift)
            at += len(part)


@dataclass(frozen=True)
class Counterpart:
    """Where a Hugging Face tensor is in a checkpoint of Megatron-Core.

    Attributes:
        key: of the Megatron-Core tensor.
        index: in its leading axes: layer and expert, where they are stacked.
        height: rows of that layer's or expert's tensor.
        pieces: where in it the Hugging Face tensor's rows start, in these rows' order.
    """

    key: str
    index: tuple[int, ...]
    height: int
    pieces: tuple[tuple[int, Rows], ...]


class WeightMap:
    """The weights of one model by both names."""

    def __init__(self, shape: ModelShape) -> None:
        """Put the rules together.

        Raises:
            UserError: no Hugging Face model has this architecture.
        """
        shape.check_fits_hugging_face()
        self._num_layers = shape.num_layers
        self._num_experts = shape.architecture.num_experts or 0
        self._table: Table = {}
        for rule in rules(shape):
            self._table |= rule(shape)

    def locate(self, key: str, global_offset: Sequence[int]) -> Located:
        """Find the place of a slice.

        Args:
            key: of Megatron-Core's `ShardedTensor`.
            global_offset: of it: layer and expert first, where they are stacked.

        Raises:
            UserError: Hugging Face's model of this family has no such tensor.
        """
        offset = list(global_offset)
        name, layer, expert = key, 0, 0
        if key.startswith(LAYERS):
            name = key.removeprefix(LAYERS)
            number = _NUMBER.match(name)  # layers that differ are not stacked
            layer = int(number[1]) if number else offset.pop(0)
            name = LAYERS + (name[number.end() :] if number else name)
        if name not in self._table:
            raise UserError(f"the family has no counterpart of Megatron-Core's {key}")
        parts = self._table[name]
        if _is_expert(parts):
            expert = offset.pop(0)
        return Located(_numbered(parts, layer, expert), tuple(offset))

    def names(self) -> set[str]:
        """Every tensor of the Hugging Face model."""
        return set(self.counterparts(()))

    def counterparts(self, keys: Container[str]) -> dict[str, Counterpart]:
        """Every tensor of the Hugging Face model, layer by layer.

        Args:
            keys: of the checkpoint; layers that differ are not stacked in it.
        """
        found: dict[str, Counterpart] = {}
        for layer in range(self._num_layers):
            for name, parts in self._table.items():
                is_layer = name.startswith(LAYERS)
                if not is_layer and layer > 0:
                    continue
                alone = f"{LAYERS}{layer}.{name.removeprefix(LAYERS)}"
                is_alone = is_layer and alone in keys
                for expert in range(self._num_experts if _is_expert(parts) else 1):
                    index = (layer,) if is_layer and not is_alone else ()
                    if _is_expert(parts):
                        index = (*index, expert)
                    pieces = _by_name(_numbered(parts, layer, expert))
                    height = sum(len(part) for part in parts)
                    key = alone if is_alone else name
                    found |= {
                        theirs: Counterpart(key, index, height, of_it)
                        for theirs, of_it in pieces.items()
                    }
        return found


def _is_expert(parts: tuple[Rows, ...]) -> bool:
    return any("{expert}" in (part.name or "") for part in parts)


def _by_name(parts: tuple[Rows, ...]) -> dict[str, tuple[tuple[int, Rows], ...]]:
    """The parts of each Hugging Face tensor in the order of its rows, and where they start."""
    pieces: dict[str, list[tuple[int, Rows]]] = {}
    at = 0
    for part in parts:
        if part.name is not None:
            pieces.setdefault(part.name, []).append((at, part))
        at += len(part)
    return {
        name: tuple(sorted(found, key=lambda piece: piece[1].start))
        for name, found in pieces.items()
    }


def _numbered(parts: tuple[Rows, ...], layer: int, expert: int) -> tuple[Rows, ...]:
    return tuple(
        Rows(part.name and part.name.format(layer=layer, expert=expert), part.start, part.stop)
        for part in parts
    )
