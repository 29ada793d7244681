"""Which shapes can be quantised, and how they can be divided over ranks."""

from __future__ import annotations

from flagscale.errors import UserError
from flagscale.megatron.shape import ModelShape
from flagscale.recipe import ParallelismRecipe
from flagscale.recipe.quantization import FORMATS


def check_quantized(
    shape: ModelShape, quantization: str, sizes: ParallelismRecipe, *, calibrates: bool
) -> None:
    """Refuse a model that cannot be quantised so, or not on such ranks.

    Args:
        shape: of the model.
        quantization: name of the recipe.
        sizes: of the process groups.
        calibrates: whether the ranges are measured on these ranks, not read.

    Raises:
        UserError: what does not fit, and what would.
    """
    one, name = FORMATS[quantization], f"student.quantization.recipe={quantization}"
    changed = shape.architecture.model_dump(mode="json", exclude_defaults=True)
    if changed:
        raise UserError(
            f"{name}: the student has {changed}: plain layers of attention and MLP are quantised"
        )
    tensor = sizes.tensor_model_parallel_size
    if calibrates and one.scales_inputs and tensor > 1:
        raise UserError(
            f"{name} with models.parallelism.tensor_model_parallel_size={tensor}: the scales of "
            "input channels are found on whole layers alone; set it to 1 (training may have more)"
        )
    if one.block_size is None:
        return
    widths = {
        "hidden_size": shape.hidden_size,
        "num_attention_heads x kv_channels": shape.num_attention_heads
        * shape.kv_channels
        // tensor,
        "ffn_hidden_size": shape.ffn_hidden_size // tensor,
    }
    for what, width in widths.items():
        if width % one.block_size:
            over = f" on each of {tensor} tensor-parallel ranks" if tensor > 1 else ""
            raise UserError(
                f"{name}: the student's {what} is {width}{over}, and must be a multiple of "
                f"{one.block_size}, the weights that share a scale; choose another recipe"
            )
