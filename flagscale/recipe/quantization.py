"""Section `student.quantization`: a student whose matrix products are quantised."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from flagscale.recipe.section import PositiveInt, Section

QuantizationName = Literal["fp8", "int8", "int8_sq", "int4_awq", "int4_awq_64", "nvfp4"]


@dataclass(frozen=True)
class QuantizationFormat:
    """What one of the recipes does to a linear layer.

    Attributes:
        modelopt: name of ModelOpt's configuration.
        weight_bits: of a weight.
        quantizes_inputs: whether activations are quantised too.
        scales_inputs: whether each input channel has a scale, which weights are divided by.
        per_tensor: whether all weights share what is measured of them; else those of a row do.
        block_size: weights of a row that share a scale; None: all of them.
        needs_gpu: ModelOpt has its arithmetic for CUDA alone.
        huggingface: whether it can be exported in ModelOpt's unified Hugging Face format.
    """

    modelopt: str
    weight_bits: int
    quantizes_inputs: bool = True
    scales_inputs: bool = False
    per_tensor: bool = False
    block_size: int | None = None
    needs_gpu: bool = False
    huggingface: bool = False


_INT4_AWQ = QuantizationFormat(
    "INT4_AWQ_CFG", 4, quantizes_inputs=False, scales_inputs=True, block_size=128
)
FORMATS: dict[str, QuantizationFormat] = {
    "fp8": QuantizationFormat("FP8_DEFAULT_CFG", 8, per_tensor=True, huggingface=True),
    "int8": QuantizationFormat("INT8_DEFAULT_CFG", 8),
    "int8_sq": QuantizationFormat("INT8_SMOOTHQUANT_CFG", 8, scales_inputs=True),
    "int4_awq": _INT4_AWQ,
    "int4_awq_64": replace(_INT4_AWQ, block_size=64),
    "nvfp4": QuantizationFormat(
        "NVFP4_DEFAULT_CFG", 4, per_tensor=True, block_size=16, needs_gpu=True
    ),
}


def _of_modelopt(value: object) -> object:
    """ModelOpt's own names lead to ours; quantised keys and values would have no effect."""
    text = str(value).lower()
    if value in FORMATS:
        return value
    if "kv" in text:
        raise ValueError(
            f"{value}: ModelOpt quantises keys and values of transformer-engine's attention alone, "
            "which quantised students do not have: it would have no effect; leave it out"
        )
    for name, one in FORMATS.items():
        if text in (one.modelopt.lower(), one.modelopt.lower().removesuffix("_cfg")):
            raise ValueError(f"{value}: is called {name} here")
    return value


class QuantizationRecipe(Section):
    """Quantised linear layers (post-training quantisation, then quantisation-aware distillation).

    Embedding, output layer, norms and the attention itself stay as they are.
    """

    recipe: Annotated[QuantizationName, BeforeValidator(_of_modelopt)] = Field(
        description="As in ModelOpt: fp8 and int8: weights and activations; int8_sq: with "
        "SmoothQuant; int4_awq, int4_awq_64: weights alone, in blocks of 128 or 64; nvfp4: both, "
        "on a GPU"
    )
    calibration_tokens: PositiveInt = Field(
        16384, description="Of the train split, evenly spread, that ranges are measured on"
    )
    when: Literal["always", "significant"] = Field(
        "always",
        description="Train always, or only where the LM loss of the quantised student is "
        "significantly worse than before; with init: same or pretrained",
    )
    documents: Annotated[PositiveInt, Field(ge=2)] = Field(
        64, description="Of the validation split, their first seq_length tokens, to compare on"
    )
