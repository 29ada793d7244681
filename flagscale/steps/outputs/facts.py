"""What teacher outputs are of, by the recipe, the artifacts and the machine; and their room."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from flagscale.artifacts import Manifest
from flagscale.errors import UserError
from flagscale.megatron import platform
from flagscale.megatron.shape import ModelShape
from flagscale.recipe import MetRecipe, TeacherOutputsRecipe
from flagscale.sizes.codecs import bytes_per_token
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


def check_room(
    outputs: TeacherOutputsRecipe, facts: OutputsFacts, teacher: Path, folder: Path, tokens: int
) -> None:
    """Refuse what the disk does not hold, before hours of work.

    Args:
        outputs: the recipe's section.
        facts: of what is written.
        teacher: its artifact.
        folder: where to.
        tokens: that are missing there.

    Raises:
        UserError: how much is needed, how much is free, and what helps.
    """
    size, seq_length = DTYPES[facts.params_dtype].itemsize, facts.seq_length
    a_token = bytes_per_token(outputs, ModelShape.load(teacher), size, seq_length)
    needed, free = tokens * a_token, shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{folder}: the teacher's outputs of {tokens:,} tokens take {needed / 1e9:.1f} GB "
            f"({a_token:.0f} bytes a token), and {free / 1e9:.1f} GB are free: free some, or set "
            "teacher_outputs.codec=sampled, or distillation.teacher_outputs=live"
        )
