"""Products of layers in fp32 on a CPU, by oneDNN where autograd need not know of them.

That is where models are only run, and in the forward pass of Megatron-Core's own linear layers,
which make their gradients themselves.

torch gives these to MKL, which on AMD's processors takes 1.1 times as long as oneDNN for a layer,
1.4 times for an output layer, and 3 times for that of a few tokens. Both are exact to the rounding
of fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


def is_onednns(inputs: torch.Tensor, weight_oi: torch.Tensor) -> bool:
    """Whether oneDNN takes this product: in fp32, and unseen by autograd.

    Args:
        inputs: [..., i].
        weight_oi: as a layer keeps it.
    """
    return (
        not torch.is_grad_enabled()
        and torch.backends.mkldnn.is_available()
        and weight_oi.dim() == 2
        and weight_oi.is_contiguous()
        and inputs.dim() > 1
        and inputs.numel() > 0
        and inputs.device.type == weight_oi.device.type == "cpu"
        and inputs.dtype == weight_oi.dtype == torch.float32
    )


def product(
    inputs: torch.Tensor, weight_oi: torch.Tensor, bias_o: torch.Tensor | None = None
) -> torch.Tensor:
    """What a linear layer computes, [..., o]; see `is_onednns`."""
    rows = inputs.flatten(0, -2)
    found = torch.ops.mkldnn._linear_pointwise(rows, weight_oi, bias_o, "none", [], "")
    # As `torch.matmul` does it: a view that a custom Function returns could not be written to.
    shaped: torch.Tensor = torch.ops.aten._unsafe_view(found, [*inputs.shape[:-1], -1])
    return shaped


class OneDnnLayers(TorchFunctionMode):
    """Inside, linear layers are oneDNN's where they can be."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,  # noqa: ANN401
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        if func is torch.nn.functional.linear and not kwargs and is_onednns(*args[:2]):
            return product(*args)
        return func(*args, **(kwargs or {}))
