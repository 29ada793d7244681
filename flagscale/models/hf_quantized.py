"""A quantised student in ModelOpt's unified Hugging Face format, which inference servers read.

In FP8 a linear layer has `weight` (float8_e4m3fn), `weight_scale` and `input_scale` (float32): the
numbers that a weight of 1 and an input of 1 stand for. `hf_quant_config.json` says so, and
`quantization_config` in `config.json`. The scales are those that ModelOpt's fake quantisation
multiplies by: dequantised weights are to the last bit those that the student was trained with.

ModelOpt's own exporter of Megatron-Core models writes the same for one rank's whole model; this one
writes from the checkpoint, tensor by tensor.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from flagscale.artifacts import write_json
from flagscale.errors import UserError
from flagscale.megatron.shape import QUANTIZERS
from flagscale.models.hf_weights import Counterpart

FP8 = torch.float8_e4m3fn
HF_QUANT_CONFIG = "hf_quant_config.json"
_LARGEST = 448.0  # in FP8
_LAYERS = re.compile(r"^decoder\.layers\.(?!\d)")
_NOT_QUANTIZED = ["lm_head"]


@dataclass(frozen=True)
class Fp8Layer:
    """What the quantisers of a Hugging Face layer know.

    Attributes:
        name: of the layer.
        weight_amax: the largest weight, float32 0-dim.
        input_amax: the largest input, ditto.
    """

    name: str
    weight_amax: torch.Tensor
    input_amax: torch.Tensor

    def quantized(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight in FP8, by the arithmetic of ModelOpt's fake quantisation."""
        scaled = weight.float() * (_LARGEST / self.weight_amax)
        return scaled.clamp(-_LARGEST, _LARGEST).to(FP8)

    def scales(self) -> dict[str, torch.Tensor]:
        """By name in the file."""
        return {
            f"{self.name}.{kind}_scale": 1 / (_LARGEST / amax)
            for kind, amax in (("weight", self.weight_amax), ("input", self.input_amax))
        }


class Fp8Scales:
    """What the quantisers of an artifact know."""

    def __init__(self, artifact: Path) -> None:
        """Read them.

        Raises:
            UserError: the file is missing or damaged.
        """
        self._path = artifact / QUANTIZERS
        try:
            self._values = load_file(self._path)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{self._path}: cannot be read: {error}") from error

    def by_name(self, counterparts: Mapping[str, Counterpart]) -> dict[str, Fp8Layer]:
        """Every weight that is quantised, by its name in Hugging Face's model.

        Raises:
            UserError: a quantiser's weight is none of the model's.
        """
        found, used = {}, set()
        for name, one in counterparts.items():
            layer = _LAYERS.sub(f"decoder.layers.{one.index[0] if one.index else 0}.", one.key)
            amaxes = [
                f"{layer.removesuffix('.weight')}.{kind}_quantizer.amax"
                for kind in ("weight", "input")
            ]
            if layer.endswith(".weight") and amaxes[0] in self._values:
                used |= {*amaxes}
                weight, inputs = (self._values[amax].reshape(()) for amax in amaxes)
                found[name] = Fp8Layer(name.removesuffix(".weight"), weight, inputs)
        if used != self._values.keys():
            raise UserError(
                f"{self._path}: is of another model: it has {min(used ^ self._values.keys())}"
            )
        return found


def write_quant_config(folder: Path) -> dict[str, Any]:
    """Write `hf_quant_config.json`.

    Returns:
        `quantization_config` for `config.json`.
    """
    producer = {"name": "modelopt", "version": version("nvidia-modelopt")}
    write_json(
        folder / HF_QUANT_CONFIG,
        {
            "producer": producer,
            "quantization": {
                "quant_algo": "FP8",
                "kv_cache_quant_algo": None,
                "exclude_modules": _NOT_QUANTIZED,
            },
        },
    )
    eight_bits = {"dynamic": False, "num_bits": 8, "type": "float"}
    return {
        "quant_method": "modelopt",
        "quant_algo": "FP8",
        "config_groups": {
            "group_0": {
                "input_activations": eight_bits,
                "weights": eight_bits,
                "targets": ["Linear"],
            }
        },
        "ignore": _NOT_QUANTIZED,
        "producer": producer,
    }
