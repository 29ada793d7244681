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
from flagscale.models.hf_rules import LAYERS, Rows, Stack, Table, rules

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
        shape: of the Hugging Face tensor.
    """

    key: str
    index: tuple[int, ...]
    height: int
    pieces: tuple[tuple[int, Rows], ...]
    shape: tuple[int, ...]


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
        stack = self._table[name]
        if stack.is_expert:
            expert = offset.pop(0)
        return Located(stack.numbered(layer, expert).parts, tuple(offset))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the Hugging Face model, layer by layer."""
        return {name: counterpart.shape for name, counterpart in self.counterparts(()).items()}

    def counterparts(self, keys: Container[str]) -> dict[str, Counterpart]:
        """Every tensor of the Hugging Face model, layer by layer.

        Args:
            keys: of the checkpoint; layers that differ are not stacked in it.
        """
        found: dict[str, Counterpart] = {}
        for layer in range(self._num_layers):
            for name, stack in self._table.items():
                is_layer = name.startswith(LAYERS)
                if not is_layer and layer > 0:
                    continue
                alone = f"{LAYERS}{layer}.{name.removeprefix(LAYERS)}"
                is_alone = is_layer and alone in keys
                for expert in range(self._num_experts if stack.is_expert else 1):
                    index = (layer,) if is_layer and not is_alone else ()
                    if stack.is_expert:
                        index = (*index, expert)
                    key = alone if is_alone else name
                    for theirs, pieces in _by_name(stack.numbered(layer, expert)).items():
                        rows = pieces[-1][1].stop
                        shape = (rows,) if stack.columns is None else (rows, stack.columns)
                        found[theirs] = Counterpart(key, index, len(stack), pieces, shape)
        return found


def _by_name(stack: Stack) -> dict[str, tuple[tuple[int, Rows], ...]]:
    """The parts of each Hugging Face tensor in the order of its rows, and where they start."""
    pieces: dict[str, list[tuple[int, Rows]]] = {}
    at = 0
    for part in stack.parts:
        if part.name is not None:
            pieces.setdefault(part.name, []).append((at, part))
        at += len(part)
    return {
        name: tuple(sorted(found, key=lambda piece: piece[1].start))
        for name, found in pieces.items()
    }
