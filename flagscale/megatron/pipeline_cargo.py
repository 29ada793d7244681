"""What travels with the tensors that pipeline stages pass on, for terms of a distillation loss.

A pair's two outputs meet on the later of their stages; the one that is earlier there travels, and
so does the term's loss, one number a token, from there to the last stage, where losses are masked,
added up and reported. Gradients come back the same way. So each term is where it can be, and none
needs the mask, the schedule's scale or a report of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flagscale.megatron.paired_layers import Pair, PairedLayer

# ("student" or "teacher", module, part) or ("loss", term, "")
Key = tuple[str, str, str]
FLOAT32 = 4


def key_of(who: str, layer: PairedLayer) -> Key:
    """Of what one side of a pair gives."""
    return who, layer.name, layer.part


@dataclass(frozen=True)
class Cargo:
    """Some columns of what a stage passes on.

    Attributes:
        key: what they are.
        first: stage that they come from.
        last: stage that they go to.
        columns: how many.
    """

    key: Key
    first: int
    last: int
    columns: int


def loss_columns(dtype_bytes: int) -> int:
    """Numbers of the pipeline's dtype that hold a float32: three in bf16, of 8 bits each."""
    return 1 if dtype_bytes == FLOAT32 else 3


def cargo_of(
    pairs: Sequence[Pair], stages: int, dtype_bytes: int, tensor: int, *, sequence_parallel: bool
) -> list[Cargo]:
    """All that travels, in one order that every stage knows.

    Args:
        pairs: of the recipe.
        stages: of the pipeline.
        dtype_bytes: of a number that stages pass on.
        tensor: tensor-parallel ranks; each passes on its channels of what is split over them.
        sequence_parallel: each has its share of the positions, with as many more columns.
    """
    outputs: dict[Key, Cargo] = {}
    for pair in pairs:
        for who, layer in pair.layers:
            key = key_of(who, layer)
            known = outputs.get(key)
            last = max(pair.stage, known.last if known else 0)  # one may be in several pairs
            ranks = tensor if layer.is_split and not sequence_parallel else 1
            outputs[key] = Cargo(key, layer.stage, last, layer.width // ranks)
    losses = [
        Cargo(("loss", pair.name, ""), pair.stage, stages - 1, loss_columns(dtype_bytes))
        for pair in pairs
    ]
    return [cargo for cargo in (*outputs.values(), *losses) if cargo.first < cargo.last]


def leaving(cargo: Sequence[Cargo], stage: int) -> list[Cargo]:
    """What a stage passes on to the next; of the last one nothing."""
    return [one for one in cargo if one.first <= stage < one.last]
