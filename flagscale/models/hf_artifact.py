"""A model artifact as a whole Hugging Face folder: weights, configuration, tokenizer, licences."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from flagscale.checkpoint.stored import StoredTensors
from flagscale.megatron.shape import ModelShape
from flagscale.models.hf_description import (
    write_config,
    write_generation_config,
    write_tokenizer,
)
from flagscale.models.hf_export import write_weights
from flagscale.models.hf_quantized import write_quant_config
from flagscale.models.hf_weights import WeightMap
from flagscale.models.megatron import WEIGHTS
from flagscale.models.origin import copy_licenses
from flagscale.models.source import load_hf_config
from flagscale.models.tokenizers import load_tokenizer


def describe(
    template: Path,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    dtype: torch.dtype,
    *,
    is_quantized: bool,
) -> None:
    """Write all but the weights: the model's own configuration, the tokenizer.

    Args:
        template: the artifact's `hf`.
        tokenizer: its.
        folder: existing, to write into.
        dtype: of the weights there.
        is_quantized: whether they are in FP8.
    """
    config = load_hf_config(template)
    config.dtype = dtype
    write_config(config, folder, write_quant_config(folder) if is_quantized else None)
    write_generation_config(template, config, folder)
    write_tokenizer(tokenizer, folder)
    copy_licenses(template, folder)


def write_hf_folder(artifact: Path, folder: Path) -> None:
    """Write an unquantised model as it is stored.

    Args:
        artifact: a `teacher`, or a student whose architecture a Hugging Face configuration holds.
        folder: existing, to write into.
    """
    stored = StoredTensors(artifact / WEIGHTS)
    dtype = next(iter(stored.tensors.values())).dtype
    write_weights(stored, WeightMap(ModelShape.load(artifact)), folder, dtype)
    template = artifact / "hf"
    describe(template, load_tokenizer(template), folder, dtype, is_quantized=False)
