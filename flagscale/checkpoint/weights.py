"""A model's weights alone, in a form that every layout and layer implementation reads."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.utils import extract_sharded_base
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.utils import unwrap_model

from flagscale.checkpoint.reading import load
from flagscale.checkpoint.writing import save


def save_weights(
    chunks: GPTModel | Sequence[GPTModel], folder: Path, dtype: torch.dtype | None = None
) -> None:
    """Write a model's weights as a distributed checkpoint. All ranks call it.

    Args:
        chunks: this rank's part of the model, wrapped or not.
        folder: is made.
        dtype: that they are stored in; default: their own.

    Raises:
        UserError: a rank cannot write, e.g. because the disk is full.
    """

    def stored(chunk: GPTModel) -> dict[str, Any]:
        return {name: _in_dtype(tensor, dtype) for name, tensor in sharded_weights(chunk).items()}

    save(by_chunk(chunks, stored), folder)


def load_weights(chunks: GPTModel | Sequence[GPTModel], folder: Path) -> None:
    """Read weights that `save_weights` wrote, on any layout, into a model of the same shape.

    All ranks call it.

    Raises:
        UserError: there is no checkpoint, or it has other tensors or shapes than the model.
    """
    # Not in the state's own form: Megatron-Core would put gate and up together in new memory.
    _read_into(
        {
            f"{name} {number}": tensor
            for name, chunk in named_chunks(chunks).items()
            for number, tensor in enumerate(local_weights(unwrap_model(chunk)))
        },
        folder,
    )


def load_output_layer(layer: ColumnParallelLinear | None, folder: Path, *, tied: bool) -> None:
    """Read the output layer, and nothing else, of a model that `save_weights` wrote.

    All ranks call it.

    Args:
        layer: of the model's size; None on a rank that has none.
        folder: of the checkpoint.
        tied: the model's output layer is its embedding.

    Raises:
        UserError: there is no checkpoint, or its output layer has another shape.
    """
    asked: dict[str, ShardedTensor] = {}
    if layer is not None:
        copies = parallel_state.get_data_parallel_group(with_context_parallel=True)
        prefix = "embedding.word_embeddings." if tied else "output_layer."
        state = layer.sharded_state_dict(prefix, metadata={"dp_cp_group": copies})
        asked["output layer"] = state[f"{prefix}weight"]
    _read_into(asked, folder, may_lack=lambda name: True)


def _read_into(
    asked: dict[str, ShardedTensor],
    folder: Path,
    may_lack: Callable[[str], bool] = lambda name: False,
) -> None:
    """Read tensors where their data is."""
    places = {name: tensor.data.detach() for name, tensor in asked.items()}
    loaded = load(asked, folder, may_lack)
    for name, place in places.items():
        if loaded[name].data_ptr() != place.data_ptr():  # one that another rank has read
            place.copy_(loaded[name])


def count_parameters(folder: Path) -> int:
    """How many numbers `save_weights` wrote: of the whole model, shared ones once.

    Args:
        folder: of a checkpoint that `load_weights` has read.
    """
    tensors = dist_checkpointing.load_tensors_metadata(str(folder)).values()
    return sum(math.prod(tensor.global_shape) for tensor in tensors)


def local_weights(model: GPTModel) -> list[ShardedTensor]:
    """This rank's tensors as a checkpoint has them; their data is the model's own memory.

    Args:
        model: one chunk, not wrapped.
    """
    sharded, _ = extract_sharded_base(load_preprocess(sharded_weights(model))[0])
    tensors = list(nested_values(sharded))
    own = itertools.chain(model.parameters(), model.buffers())
    owned = {tensor.untyped_storage().data_ptr() for tensor in own}
    for tensor in tensors:
        if tensor.data.untyped_storage().data_ptr() not in owned:
            raise RuntimeError(f"Megatron-Core's {tensor.key} is a copy of the model's weights")
    return tensors


def by_chunk(
    chunks: GPTModel | Sequence[GPTModel], state_of: Callable[[GPTModel], dict[str, Any]]
) -> dict[str, Any]:
    """State of every chunk under the chunk's name."""
    return {name: state_of(unwrap_model(chunk)) for name, chunk in named_chunks(chunks).items()}


def load_chunks(
    chunks: GPTModel | Sequence[GPTModel], state: dict[str, Any], *, strict: bool
) -> None:
    """Put a loaded state, by chunk, into the model."""
    for name, chunk in named_chunks(chunks).items():
        unwrap_model(chunk).load_state_dict(state[name], strict=strict)


def named_chunks(chunks: GPTModel | Sequence[GPTModel]) -> dict[str, GPTModel]:
    """Chunks under the names that Megatron gives them in a checkpoint."""
    if not isinstance(chunks, Sequence):
        return {"model": chunks}
    if len(chunks) == 1:
        return {"model": chunks[0]}
    return {f"model{index}": chunk for index, chunk in enumerate(chunks)}


def sharded_model(model: GPTModel) -> dict[str, Any]:
    """The sharded tensors of one chunk."""
    # Megatron-Core looks the group up itself, except for multi-token prediction in a pipeline.
    copies = parallel_state.get_data_parallel_group(with_context_parallel=True)
    state: dict[str, Any] = model.sharded_state_dict(metadata={"dp_cp_group": copies})
    return state


def sharded_weights(model: GPTModel) -> dict[str, Any]:
    """The sharded tensors that are the model, whatever its layers are implemented with.

    Without transformer-engine's extra states (FP8 scales), which a model of local layers lacks, and
    without a distillation model's projections, which are trained but are no part of the student.
    """
    return {
        name: tensor
        for name, tensor in sharded_model(model).items()
        # Experts in one kernel number theirs: `_extra_state`, `_extra_state1`, ...
        if "_extra_state" not in name and not name.startswith("_loss_modules.")
    }


def _in_dtype(
    tensor: ShardedTensor | ShardedTensorFactory, dtype: torch.dtype | None
) -> ShardedTensor | ShardedTensorFactory:
    if dtype is None or tensor.data.dtype == dtype:
        return tensor
    data = tensor.data.detach().to(dtype)
    if isinstance(tensor, ShardedTensorFactory):
        return replace(tensor, data=data)
    return replace(tensor, data=data, dtype=dtype)
