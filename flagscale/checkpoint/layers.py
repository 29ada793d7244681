"""Cuts a model to some of its layers by what is read of its checkpoint.

A checkpoint holds a tensor of every layer under one key, with the layers as its first axis. A model
of fewer layers asks for its own tensors there, at the places of the layers that it keeps: on any
layout each rank reads what it needs and nothing else, and the deeper model is never built.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.models.gpt import GPTModel

from flagscale.checkpoint.reading import load
from flagscale.checkpoint.weights import by_chunk, load_chunks, sharded_weights

_LAYERS = "decoder.layers."
# Where layers differ from one another, each has keys of its own.
_NUMBERED = re.compile(r"decoder\.layers\.(\d+)\.(.+)")


def load_layers(
    chunks: GPTModel | Sequence[GPTModel], folder: Path, kept: Sequence[int], num_layers: int
) -> None:
    """Read some layers of a deeper model's weights, and all else that it has. All ranks call it.

    Args:
        chunks: this rank's part of a model of `len(kept)` layers of the deeper one's width.
        folder: of weights that `save_weights` wrote, on any layout, of the deeper model.
        kept: the deeper model's layers, from 0, that become the model's, in order.
        num_layers: of the deeper model.

    Raises:
        ValueError: `kept` does not fit the models.
        UserError: there is no checkpoint, or it has other tensors or shapes than the model.
    """
    model = chunks[0] if isinstance(chunks, Sequence) else chunks
    if len(kept) != model.config.num_layers or not set(kept) <= set(range(num_layers)):
        raise ValueError(
            f"kept={list(kept)}: must be {model.config.num_layers} layers, as many as the model "
            f"has, out of 0 to {num_layers - 1}"
        )

    def asked(chunk: GPTModel) -> dict[str, Any]:
        return {
            name: _elsewhere(tensor, kept, num_layers)
            for name, tensor in sharded_weights(chunk).items()
        }

    def may_lack(key: str) -> bool:
        layer = _NUMBERED.match(key)
        return layer is not None and int(layer[1]) not in kept

    state = load(by_chunk(chunks, asked), folder, may_lack)
    load_chunks(chunks, state, strict=False)  # see `load_weights`


def _elsewhere(
    tensor: ShardedTensor | ShardedTensorFactory, kept: Sequence[int], num_layers: int
) -> ShardedTensor | ShardedTensorFactory:
    """What fills the same memory from the layers that are kept."""
    numbered = _NUMBERED.match(tensor.key)
    if numbered:
        return replace(tensor, key=f"{_LAYERS}{kept[int(numbered[1])]}.{numbered[2]}")
    if not tensor.key.startswith(_LAYERS):
        return tensor

    # Of gate and up, which are one tensor here, the checkpoint's form has two parts.
    is_factory = isinstance(tensor, ShardedTensorFactory)
    parts: list[ShardedTensor] = tensor.build() if is_factory else [tensor]
    merge = tensor.merge_fn if is_factory else lambda loaded: loaded[0]
    axes = parts[0].prepend_axis_num
    return ShardedTensorFactory(
        tensor.key,
        tensor.data,
        build_fn=lambda *_: [_in_deeper(part, kept, num_layers) for part in parts],
        merge_fn=lambda loaded: merge([part[(0,) * axes] for part in loaded]),
        replica_id=tensor.replica_id,
    )


def _in_deeper(part: ShardedTensor, kept: Sequence[int], num_layers: int) -> ShardedTensor:
    """The place in the deeper model's tensor.

    Megatron-Core takes a tensor of whose regular grid a rank asks for some, and nobody for the
    rest, for a mistake: it is told of no grid. Then it wants the axis of the layers, and that of
    the experts, in the tensor itself.
    """
    axes = part.prepend_axis_num
    return replace(
        part,
        data=part.data[(None,) * axes],
        local_shape=(1,) * axes + part.local_shape,
        global_shape=(num_layers, *part.global_shape[1:]),
        global_offset=(kept[part.global_offset[0]], *part.global_offset[1:]),
        axis_fragmentations=None,
        prepend_axis_num=0,
    )
