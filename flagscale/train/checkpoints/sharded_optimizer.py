"""A distributed optimiser's state in a checkpoint: every rank's share, readable on any layout.

Megatron-Core 0.16.1 has two formats. `dp_reshardable` stores the buckets, which another tensor or
pipeline layout cannot read. `fully_reshardable` stores what a plain optimiser would, each moment in
the shape of its parameter, but gathers all of it on every rank first: 8 bytes a parameter more of
the GPU's memory at every save, 12 of the host's; and with several buckets whose ends are padded it
puts the moments in the wrong places (it cuts them out by their places in the padded buffer).

Here is the content of the second with the cost of the first. A rank's share of a parameter is a
range of its elements in memory; cut where rows begin and end, that is a few boxes, and a
distributed checkpoint takes boxes. Nothing is gathered or copied, to save or to read, and any
layout reads what any other wrote, with a distributed optimiser or a plain one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

_STATE = "param_state"
_PREFIX, _MAIN = "optimizer.state", "fp32_param"  # as a plain optimiser names them
Box = tuple[tuple[int, ...], tuple[int, ...]]


def sharded_state(
    optimizer: MegatronOptimizer, weights: dict[str, Any], *, is_loading: bool = False
) -> list[dict[str, Any]]:
    """The state of each optimiser inside: of dense parameters, and of experts over EP ranks.

    Args:
        optimizer: of the whole model.
        weights: the model's sharded tensors, whose data are its parameters.
        is_loading: the state will be read into; it is made where there is none yet.
    """
    ones = inside(optimizer)
    if len(ones) > 1:
        optimizer._synchronize_steps()
    return [_state(one, weights, is_loading) for one in ones]


def load(optimizer: MegatronOptimizer, states: list[dict[str, Any]]) -> None:
    """Take over a state that was read into what `sharded_state` gave.

    Args:
        optimizer: of the whole model.
        states: one for each optimiser inside; changed.
    """
    for one, state in zip(inside(optimizer), states, strict=True):
        if isinstance(one, DistributedOptimizer):
            _copy_back(one, state.pop(_STATE))
    optimizer.load_state_dict(states[0] if len(states) == 1 else dict(enumerate(states)))


def boxes(shape: tuple[int, ...], start: int, end: int) -> Iterator[Box]:
    """A range of a tensor's elements, in memory's order, as boxes: offsets and sizes.

    Args:
        shape: of the tensor.
        start: first element.
        end: after the last.
    """
    if start >= end:
        return
    if len(shape) <= 1:
        yield ((start,), (end - start,)) if shape else ((), ())
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), end // row  # whole rows
    if first > last:  # all inside one row
        yield from _in_row(shape, first - 1, start, end, row)
        return
    yield from _in_row(shape, first - 1, start, first * row, row)
    if first < last:
        zeros = (0,) * (len(shape) - 1)
        yield (first, *zeros), (last - first, *shape[1:])
    yield from _in_row(shape, last, last * row, end, row)


def _in_row(shape: tuple[int, ...], index: int, start: int, end: int, row: int) -> Iterator[Box]:
    for offsets, sizes in boxes(shape[1:], start - index * row, end - index * row):
        yield (index, *offsets), (1, *sizes)


def inside(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """The optimisers that one is made of."""
    if isinstance(optimizer, ChainedOptimizer):
        return list(optimizer.chained_optimizers)
    return [optimizer]


def _state(one: MegatronOptimizer, weights: dict[str, Any], is_loading: bool) -> dict[str, Any]:
    if not isinstance(one, DistributedOptimizer):
        state: dict[str, Any] = one.sharded_state_dict(weights, is_loading)
        return state
    if is_loading:
        one.load_state_dict(one.state_dict())  # makes the tensors
    places = {one.data: one for one in nested_values(weights) if _is_of_parameter(one)}
    tensors = {
        f"{number}": _boxes_of_share(places[parameter], start, share)
        for number, (parameter, start, share) in enumerate(_shares(one))
    }
    return {**one.state_dict(), _STATE: tensors}


def _is_of_parameter(value: object) -> bool:
    return isinstance(value, ShardedTensor | ShardedTensorFactory)


def _shares(
    one: DistributedOptimizer,
) -> Iterator[tuple[torch.nn.Parameter, int, dict[str, torch.Tensor]]]:
    """Parameters that this rank has a share of, where it begins, and the share: flat tensors."""
    for buffer in one.gbuf_ranges:
        for buckets in buffer.values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    share = one._get_main_param_and_optimizer_states(parameter)
                    share.pop("step", None)  # of torch's Adam; see `torch_adam`
                    main = share.pop("param")
                    if main.untyped_storage().data_ptr() != parameter.untyped_storage().data_ptr():
                        share[_MAIN] = main  # else it is the weight, which is saved anyway
                    yield parameter, ranges["param"].start, share


def _boxes_of_share(
    place: ShardedTensor | ShardedTensorFactory, start: int, share: dict[str, torch.Tensor]
) -> dict[str, list[ShardedTensor]]:
    """The share's tensors, by name, as parts of the whole model's."""
    size = next(iter(share.values())).numel()
    found: dict[str, list[ShardedTensor]] = {name: [] for name in share}
    for part in _parts(place):
        # Where the part lies in the parameter: gate and up projection are halves of one.
        first = part.data.storage_offset() - place.data.storage_offset()
        low, high = max(start, first), min(start + size, first + part.data.numel())
        for offsets, sizes in boxes(tuple(part.local_shape), low - first, high - first):
            at = low - start
            low += math.prod(sizes)
            for name, tensor in share.items():
                data = tensor.detach().view(-1)[at : at + math.prod(sizes)]
                found[name].append(_part_of(part, offsets, sizes, name, data))
    return found


def _parts(place: ShardedTensor | ShardedTensorFactory) -> list[ShardedTensor]:
    """The tensors of the whole model that a parameter is one of, or several in memory's order."""
    if isinstance(place, ShardedTensor):
        return [place]
    parts = list(nested_values({"": place.build()}))
    storage = place.data.untyped_storage().data_ptr()
    for part in parts:
        if part.data.untyped_storage().data_ptr() != storage or not part.data.is_contiguous():
            raise RuntimeError(f"{part.key}: is no range of its parameter in memory")
    return parts


def _part_of(
    part: ShardedTensor,
    offsets: tuple[int, ...],
    sizes: tuple[int, ...],
    name: str,
    data: torch.Tensor,
) -> ShardedTensor:
    """A box of what a parameter's tensor is in the whole model, for one of its moments."""
    ahead = part.prepend_axis_num
    inner = zip(part.global_offset[ahead:], offsets, strict=True)
    shape = (*(1,) * ahead, *sizes)
    return ShardedTensor(
        key=f"{_PREFIX}.{name}.{part.key}",
        data=data.view(shape),
        dtype=data.dtype,
        local_shape=shape,
        global_shape=part.global_shape,
        global_offset=(*part.global_offset[:ahead], *(a + b for a, b in inner)),
        axis_fragmentations=None,  # boxes of many sizes
        # Of the data-parallel ranks each has its own; tensor-parallel ones may have the same.
        replica_id=(*part.replica_id[:2], 0),
        allow_shape_mismatch=part.allow_shape_mismatch,
    )


def _copy_back(one: DistributedOptimizer, read: dict[str, Any]) -> None:
    """What was not read into place: tensors that another rank handed on."""
    for number, (_, _, share) in enumerate(_shares(one)):
        for name, tensor in share.items():
            at = 0
            for box in read[f"{number}"][name]:
                target = tensor.detach().view(-1)[at : at + box.numel()]
                at += box.numel()
                if target.data_ptr() != box.data_ptr():
                    target.copy_(box.reshape(-1))
