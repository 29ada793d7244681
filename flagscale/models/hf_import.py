"""Hugging Face weights -> Megatron-Core, by ModelOpt's importer."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from megatron.core.models.gpt import GPTModel
from modelopt.torch.export import import_mcore_gpt_from_hf
from transformers import PreTrainedModel

from flagscale.megatron.shape import ModelShape, hf_config_for
from flagscale.models.megatron import build_model

logger = logging.getLogger(__name__)

EMBEDDING = "model.embed_tokens.weight"
OUTPUT_LAYER = "lm_head.weight"


def import_from_hf(
    hf_model: PreTrainedModel, shape: ModelShape, seq_length: int, workspace: Path | None = None
) -> GPTModel:
    """Build the Megatron-Core model of `shape` with the weights of a transformers model.

    Call within `platform.runtime()`. The importer reads safetensors, and wants the embedding as
    tall as the model's: a padded copy goes through a temporary folder, so that every source
    (GGUF, shards, another dtype) takes the same road.

    Args:
        hf_model: of the family and shape that `shape` was read from.
        shape: of the model to build.
        seq_length: longest sequence that it will see, tokens.
        workspace: folder for the temporary one; default: the system's.

    Returns:
        The model in fp32, in evaluation mode.
    """
    model = build_model(shape, seq_length)
    with tempfile.TemporaryDirectory(prefix="flagscale-import-", dir=workspace) as name:
        folder = Path(name)
        hf_config_for(shape, hf_model.config).save_pretrained(folder)
        save_torch_state_dict(_padded_state(hf_model, shape), folder)
        # It prints, and draws a progress bar into whatever reads our stderr.
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            import_mcore_gpt_from_hf(model, name, dtype=torch.float32)
    logger.info("imported %d layers of a %s model", shape.num_layers, shape.model_type)
    return model.eval()


def _padded_state(hf_model: PreTrainedModel, shape: ModelShape) -> dict[str, torch.Tensor]:
    """The weights by name; vocabulary tables get zero rows up to the padded size."""
    state = dict(hf_model.state_dict())
    if not shape.untie_embeddings_and_output_weights:
        state.pop(OUTPUT_LAYER, None)
    missing_rows = shape.padded_vocab_size - shape.vocab_size
    for name in (EMBEDDING, OUTPUT_LAYER):
        if missing_rows and name in state:
            table = state[name]
            state[name] = torch.cat([table, table.new_zeros(missing_rows, table.size(1))])
    return state
