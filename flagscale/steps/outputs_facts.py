"""What teacher outputs are of, by the recipe, the artifacts and the machine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from flagscale.artifacts import Manifest
from flagscale.megatron import platform
from flagscale.megatron.shape import ModelShape
from flagscale.recipe import MetRecipe, TeacherOutputsRecipe
from flagscale.teacher_outputs import OutputsFacts

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_DRAWS_SEED = 0  # of no run


def outputs_facts(
    outputs: TeacherOutputsRecipe, met: MetRecipe, teacher: Path, parents: Mapping[str, Manifest]
) -> OutputsFacts:
    """Who is asked what, and how it is kept, on this machine.

    Args:
        outputs: the recipe's section.
        met: how trainings run the teacher.
        teacher: its artifact.
        parents: manifests of `teacher` and `dataset`.
    """
    shape = ModelShape.load(teacher)
    params_dtype = _NAMES[platform.training_dtype(met.precision)]
    return OutputsFacts(
        codec=_codec(outputs, met, shape, params_dtype),
        teacher=parents["teacher"].digest,
        dataset=parents["dataset"].digest,
        tokenizer=parents["dataset"].tokenizer_hash,
        seq_length=int(parents["dataset"].facts["seq_length"]),
        reset_attention_mask=met.reset_attention_mask,
        params_dtype=params_dtype,
        vocab_size=shape.vocab_size,
    )


def _codec(
    outputs: TeacherOutputsRecipe, met: MetRecipe, shape: ModelShape, params_dtype: str
) -> dict[str, Any]:
    """Name and options, as `codec_of` takes them."""
    if outputs.codec == "hidden":
        dtype = params_dtype if outputs.dtype == "auto" else outputs.dtype
        return {"name": "hidden", "dtype": dtype, "hidden_size": shape.hidden_size}
    options = {"draws": outputs.draws, "seed": _DRAWS_SEED}
    if outputs.codec == "topk":
        options = {"top_k": outputs.top_k}
    return {"name": outputs.codec, "temperature": met.temperature, **options}
