"""Quantised students: ModelOpt's quantisers in Megatron-Core's linear layers.

Fake quantisation (arXiv 1712.05877): a layer multiplies inputs and weights that were rounded to the
format's values, in the model's own precision; gradients pass the rounding unchanged. What a
quantiser knows is measured once and never changes: the largest value of its range, and for
SmoothQuant (arXiv 2211.10438) and AWQ (arXiv 2306.00978) a scale of every input channel. It is
therefore no part of a checkpoint: it lies in the student's artifact, one file for every layout, and
a resumed training reads it there again.

ModelOpt quantises decoder layers: embedding and output layer stay as they are.
"""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.parallel_state import get_tensor_model_parallel_group
from megatron.core.transformer.mlp import MLP

from flagscale.post_training.upstream import mtq, mtq_megatron, mtq_nn
from flagscale.recipe.quantization import FORMATS, QuantizationFormat

# ModelOpt would have checkpoints hold its quantisers, in a format of their own for all weights.
mtq_nn.QuantModuleRegistry.unregister(MLP)
mtq_megatron.CUSTOM_MODEL_PLUGINS.discard(mtq_megatron.megatron_replace_quant_module_hook)

_failed: list[str] = []


def insert_quantizers(model: GPTModel, quantization: str) -> None:
    """Replace the model's linear layers by quantised ones, whose quantisers know nothing yet.

    Args:
        model: this rank's part, not wrapped; in place.
        quantization: name of the recipe.

    Raises:
        RuntimeError: an earlier quantisation in this process failed.
    """
    _quantize(model, {**_config(quantization), "algorithm": None}, None)


def calibrate(
    model: GPTModel,
    quantization: str,
    forward_loop: Callable[[GPTModel], None],
    stored: torch.dtype = torch.float32,
) -> None:
    """Quantise a model, with ranges measured on what `forward_loop` runs. All ranks call it.

    SmoothQuant's and AWQ's scales go into the weights, which are rounded to `stored`. Ranges of
    weights are those of the rounded weights. All that a quantiser knows is rounded to bfloat16,
    ranges upwards: so it is the same in models of every precision.

    Args:
        model: this rank's part, not wrapped; in place.
        quantization: name of the recipe.
        forward_loop: runs the model, as often as it is called.
        stored: dtype that the weights will be stored in.

    Raises:
        RuntimeError: this or an earlier quantisation in this process failed.
    """
    _quantize(model, _config(quantization), forward_loop)
    with torch.no_grad():
        for linear in quantized_linears(model).values():
            _round_scale(linear)
            linear.weight.copy_(linear.weight.to(stored))
            _measure_weight(linear, FORMATS[quantization])
            if FORMATS[quantization].quantizes_inputs:
                know(linear.input_quantizer, "_amax", _rounded_up(linear.input_quantizer.amax))


def quantized_linears(model: torch.nn.Module) -> dict[str, Any]:
    """The linear layers whose weights are quantised, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, mtq_nn.QuantModule)
        and getattr(module, "weight_quantizer", None) is not None
        and module.weight_quantizer.is_enabled
    }


def know(quantizer: Any, name: str, value: torch.Tensor) -> None:  # noqa: ANN401 - ModelOpt's
    """Let a quantiser know something, in a way that neither casts nor state dicts reach.

    Args:
        quantizer: a `TensorQuantizer`.
        name: `_amax` or `_pre_quant_scale`.
        value: in the shape that ModelOpt has it.
    """
    quantizer._buffers.pop(name, None)
    quantizer.__dict__[name] = value


def _config(quantization: str) -> dict[str, Any]:
    one = FORMATS[quantization]
    config: dict[str, Any] = copy.deepcopy(getattr(mtq, one.modelopt))
    blocks = config["quant_cfg"]["*weight_quantizer"].get("block_sizes")
    if blocks is not None:
        blocks[-1] = one.block_size
    return config


def _quantize(
    model: GPTModel, config: dict[str, Any], forward_loop: Callable[[GPTModel], None] | None
) -> None:
    # A quantisation that fails half-way leaves ModelOpt's registries in a state in which a later
    # one works, and is wrong.
    if _failed:
        raise RuntimeError(f"an earlier quantisation in this process failed: {_failed[0]}")
    try:
        with contextlib.redirect_stdout(io.StringIO()), torch.no_grad():  # it prints its progress
            mtq.quantize(model, config, forward_loop)
    except BaseException as error:
        _failed.append(f"{type(error).__name__}: {error}")
        raise


def _round_scale(linear: Any) -> None:  # noqa: ANN401 - ModelOpt's
    """Round the scale of the input's channels, and let the weights, divided by it, follow."""
    scale_i = linear.input_quantizer.pre_quant_scale
    if scale_i is None:
        return
    rounded_i = scale_i.bfloat16().float()
    linear.weight.mul_(scale_i.float() / rounded_i)
    know(linear.input_quantizer, "_pre_quant_scale", rounded_i.to(linear.weight.dtype))


def _measure_weight(linear: Any, one: QuantizationFormat) -> None:  # noqa: ANN401 - ModelOpt's
    """The largest weight of each tensor, row or block, over all ranks that have a part of it."""
    weight_oi = linear.weight.float().abs()
    if one.per_tensor:
        amax = weight_oi.amax()
    elif one.block_size is None:
        amax = weight_oi.amax(1, keepdim=True)
    else:
        amax = weight_oi.view(-1, one.block_size).amax(1, keepdim=True)
    if one.per_tensor or (one.block_size is None and linear._is_row_parallel):
        group = get_tensor_model_parallel_group()
        torch.distributed.all_reduce(amax, torch.distributed.ReduceOp.MAX, group)
    before = linear.weight_quantizer.amax
    if amax.shape != before.shape:
        raise RuntimeError(f"ModelOpt's ranges have the shape {before.shape}, not {amax.shape}")
    know(linear.weight_quantizer, "_amax", _rounded_up(amax))


def _rounded_up(amax: torch.Tensor) -> torch.Tensor:
    """float32 that bfloat16 holds, no smaller: nothing is cut off."""
    rounded = amax.bfloat16()
    above = torch.nextafter(rounded, torch.full_like(rounded, torch.inf))
    return torch.where(rounded.float() < amax.float(), above, rounded).float()
