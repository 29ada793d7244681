"""Random first weights that are the same on every layout.

Megatron-Core draws what a rank holds, so that another layout draws another model. Here every weight
that it drew is drawn again as a part of the whole: block after block of a tensor's rows, each from
a seed of its own, of which a rank keeps its slice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.models.gpt import GPTModel
from torch.overrides import TorchFunctionMode

from flagscale.checkpoint.weights import sharded_weights

_ROWS = 256  # of a block; another number gives other weights
_NORMAL = (torch.nn.init.normal_, torch.Tensor.normal_)


def with_random_weights(build: Callable[[], GPTModel], seed: int) -> GPTModel:
    """The model that `build` makes, its weights drawn anew from `seed`. All ranks call it.

    What is drawn from a normal distribution is; constants, and whatever a layer of one's own draws
    otherwise, stay as they are built.

    Args:
        build: makes this rank's part.
        seed: of the weights.
    """
    with _NormalDraws() as drawn:
        model = build()
    parameters = dict(model.named_parameters())
    for name, tensor in sharded_weights(model).items():
        draw = drawn.of(parameters.get(name))
        if draw is not None:
            # Of gate and up, which are one tensor here, the whole model's are apart.
            is_factory = isinstance(tensor, ShardedTensorFactory)
            for part in tensor.build() if is_factory else [tensor]:
                _fill(part, draw, seed)
    return model


class _NormalDraws(TorchFunctionMode):
    """Notes each parameter that is filled from a normal distribution, and with which."""

    def __init__(self) -> None:
        super().__init__()
        # With the parameter itself, so that no other can take its id.
        self._drawn: dict[int, tuple[torch.Tensor, tuple[float, float]]] = {}

    def of(self, parameter: torch.Tensor | None) -> tuple[float, float] | None:
        """Mean and standard deviation, if it was drawn so."""
        noted = self._drawn.get(id(parameter))
        return None if noted is None else noted[1]

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,  # noqa: ANN401
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        kwargs = kwargs or {}
        if func in _NORMAL:
            given = dict(zip(("tensor", "mean", "std"), args, strict=False)) | kwargs
            tensor = given["tensor"]
            self._drawn[id(tensor)] = tensor, (given.get("mean", 0.0), given.get("std", 1.0))
        return func(*args, **kwargs)


def _fill(part: ShardedTensor, draw: tuple[float, float], seed: int) -> None:
    """Give a rank's slice of a tensor its values."""
    axes = part.prepend_axis_num
    stack, (first, *offsets) = part.global_offset[:axes], part.global_offset[axes:]
    rows, *others = part.local_shape
    whole_rows, *whole_others = part.global_shape[axes:]
    columns = tuple(slice(at, at + size) for at, size in zip(offsets, others, strict=True))
    for block in range(first // _ROWS, (first + rows - 1) // _ROWS + 1):
        start, stop = block * _ROWS, min((block + 1) * _ROWS, whole_rows)
        name = f"{seed} {part.key} {stack} {block}".encode()
        number = int.from_bytes(hashlib.sha256(name).digest()[:8], signed=True)
        generator = torch.Generator("cpu").manual_seed(number)
        values = torch.empty(stop - start, *whole_others, device="cpu")
        values.normal_(*draw, generator=generator)
        here = slice(max(start, first), min(stop, first + rows))
        mine = values[(slice(here.start - start, here.stop - start), *columns)]
        part.data.detach()[here.start - first : here.stop - first].copy_(mine)
