"""What a student's quantisers know, in one file of its artifact, whatever layout reads it.

`quantizers.safetensors` has, by the layer's name in the whole model:

    decoder.layers.3.mlp.linear_fc1.weight_quantizer.amax            [1, 1], [out, 1], [out, blocks]
    decoder.layers.3.mlp.linear_fc1.input_quantizer.amax             [1, 1]
    decoder.layers.3.mlp.linear_fc1.input_quantizer.pre_quant_scale  [1, in]

in float32, with the rows and columns of the whole layer: of a gated MLP all of gate, then of up.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from flagscale.checkpoint.agreement import is_first_rank, same_outcome
from flagscale.errors import UserError
from flagscale.megatron.shape import QUANTIZERS
from flagscale.post_training.quantization import insert_quantizers, know, quantized_linears
from flagscale.recipe.quantization import FORMATS


class _Place(NamedTuple):
    """Where one thing is that a quantiser knows.

    Attributes:
        linear: the quantised layer.
        quantizer: `weight_quantizer` or `input_quantizer`.
        attribute: of the quantiser.
        split: how tensor-parallel ranks share it: `rows`, `gated` rows, `columns`, or not.
        columns: of this rank's part.
    """

    linear: Any
    quantizer: str
    attribute: str
    split: str
    columns: int

    @property
    def known(self) -> torch.Tensor:
        """This rank's part, float32 [rows, columns]."""
        value: torch.Tensor = getattr(getattr(self.linear, self.quantizer), self.attribute)
        return value.float().reshape(-1, self.columns)

    def know(self, part: torch.Tensor) -> None:
        """Take this rank's part, in the shape that ModelOpt has it."""
        weight = self.linear.weight
        if self.attribute == "_pre_quant_scale":
            part = part.flatten().to(weight.dtype)
        else:
            part = part.reshape(-1, 1) if part.numel() > 1 else part.reshape(())
        know(getattr(self.linear, self.quantizer), self.attribute, part.to(weight.device))


def save_quantizers(model: GPTModel, quantization: str, artifact: Path) -> None:
    """Write what a calibrated model's quantisers know. All ranks call it.

    Args:
        model: this rank's part, not wrapped.
        quantization: name of the recipe.
        artifact: existing folder.

    Raises:
        UserError: the disk is full.
    """
    mine = {
        name: (place.split, place.known.cpu())
        for name, place in _places(model, quantization).items()
    }
    rank = parallel_state.get_tensor_model_parallel_rank()
    told: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(told, (rank, mine))
    with same_outcome(artifact, "could not be written"):
        if is_first_rank():
            parts: dict[str, dict[int, torch.Tensor]] = {}
            splits = {}
            for one, values in told:
                for name, (split, part) in values.items():
                    parts.setdefault(name, {})[one] = part
                    splits[name] = split
            whole = {name: _whole(splits[name], by) for name, by in parts.items()}
            save_file(whole, artifact / QUANTIZERS)


def load_quantizers(model: GPTModel, quantization: str, artifact: Path) -> None:
    """Quantise a model with what an artifact's quantisers know.

    Args:
        model: this rank's part, not wrapped; in place.
        quantization: name of the recipe.
        artifact: a quantised student's folder.

    Raises:
        UserError: the file is missing, damaged, or of another model.
    """
    path = artifact / QUANTIZERS
    try:
        whole = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    insert_quantizers(model, quantization)
    for name, place in _places(model, quantization).items():
        if name not in whole:
            raise UserError(f"{path}: is of another model: it lacks {name}")
        part = _part(place.split, whole[name])
        rows = place.linear.weight.size(0) if part.numel() > part.size(1) else part.size(0)
        if part.shape != (rows, place.columns):
            raise UserError(
                f"{path}: is of another model: {name} has the shape {tuple(whole[name].shape)}"
            )
        place.know(part)


def _places(model: GPTModel, quantization: str) -> dict[str, _Place]:
    """All that the quantisers of this rank know, by name in the whole model."""
    one, found = FORMATS[quantization], {}
    first = get_transformer_layer_offset(model.config)
    for local, linear in quantized_linears(model).items():
        name = re.sub(
            r"^decoder\.layers\.(\d+)",
            lambda match: f"decoder.layers.{int(match[1]) + first}",
            local,
        )
        width, is_row = linear.weight.size(1), linear._is_row_parallel
        by_columns = "columns" if is_row else "none"
        is_whole = one.per_tensor or one.block_size is None
        blocks = 1 if is_whole else width // (one.block_size or width)
        split = by_columns if blocks > 1 else "none"
        if not is_row and not one.per_tensor:
            is_gated = model.config.gated_linear_unit and local.endswith(".linear_fc1")
            split = "gated" if is_gated else "rows"
        found[f"{name}.weight_quantizer.amax"] = _Place(
            linear, "weight_quantizer", "_amax", split, blocks
        )
        if one.quantizes_inputs:
            found[f"{name}.input_quantizer.amax"] = _Place(
                linear, "input_quantizer", "_amax", "none", 1
            )
        if one.scales_inputs:
            found[f"{name}.input_quantizer.pre_quant_scale"] = _Place(
                linear,
                "input_quantizer",
                "_pre_quant_scale",
                "columns" if is_row else "none",
                width,
            )
    return found


def _part(split: str, whole: torch.Tensor) -> torch.Tensor:
    """This rank's part of [rows, columns]."""
    size = parallel_state.get_tensor_model_parallel_world_size()
    rank = parallel_state.get_tensor_model_parallel_rank()
    if split == "none" or size == 1:
        return whole
    if split == "gated":
        halves = whole.view(2, -1, whole.size(1))
        return halves.chunk(size, dim=1)[rank].reshape(-1, whole.size(1))
    return whole.chunk(size, dim=1 if split == "columns" else 0)[rank]


def _whole(split: str, parts: dict[int, torch.Tensor]) -> torch.Tensor:
    """The inverse: [rows, columns] from the parts of tensor-parallel ranks."""
    ordered = [parts[rank] for rank in sorted(parts)]
    if split == "none" or len(ordered) == 1:
        return ordered[0].contiguous()
    if split == "gated":
        halves = [part.view(2, -1, part.size(1)) for part in ordered]
        return torch.cat(halves, dim=1).reshape(-1, ordered[0].size(1))
    return torch.cat(ordered, dim=1 if split == "columns" else 0)
