"""What a quantised student cannot be trained with, or exported in."""

from __future__ import annotations

from flagscale.recipe.combinations import TrainingOptions
from flagscale.recipe.quantization import FORMATS, QuantizationRecipe


def check_quantization(
    quantization: QuantizationRecipe, training: TrainingOptions, export_format: str
) -> None:
    """Refuse what a quantised student could not be trained with, or exported in.

    Args:
        quantization: the student's.
        training: the recipe's section.
        export_format: `export.format`.

    Raises:
        ValueError: the fields with their values, and what would be right.
    """
    if export_format == "huggingface" and not FORMATS[quantization.recipe].huggingface:
        can = " and ".join(name for name, one in FORMATS.items() if one.huggingface)
        raise ValueError(
            f"student.quantization.recipe={quantization.recipe} with export.format=huggingface: of "
            f"quantised students {can} alone can be exported so; set export.format=megatron, or "
            "another recipe"
        )
    check_quantized_training(quantization.recipe, training)


def check_quantized_training(quantization: str, training: TrainingOptions) -> None:
    """Refuse how a quantised student cannot be trained.

    Args:
        quantization: name of its recipe.
        training: the recipe's section, or a run's arguments.

    Raises:
        ValueError: both fields with their values, and what would be right.
    """
    chunks = training.parallelism.virtual_pipeline_model_parallel_size
    for option, value, remedy in (
        ("fp8", training.fp8, "none"),
        ("transformer_impl", training.transformer_impl, "local"),
        ("parallelism.virtual_pipeline_model_parallel_size", chunks, "null"),
    ):
        if value not in (None, "none", "auto", "local"):
            raise ValueError(
                f"student.quantization.recipe={quantization} with training.{option}={value}: "
                "quantised layers are Megatron-Core's local ones with ModelOpt's arithmetic, in "
                f"one chunk a rank; set it to {remedy}"
            )


def check_quantized_on_cpu(quantization: QuantizationRecipe) -> None:
    """Refuse what ModelOpt computes on a GPU alone.

    Raises:
        ValueError: the field with its value.
    """
    if FORMATS[quantization.recipe].needs_gpu:
        raise ValueError(
            f"student.quantization.recipe={quantization.recipe}: ModelOpt computes it on a GPU "
            "alone, and there is none; choose another recipe, or give the pods accelerators"
        )
