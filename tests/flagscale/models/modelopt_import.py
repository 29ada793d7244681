"""ModelOpt's importer: other people's code that does what `hf_import` does, for comparison."""

import contextlib
import io
import tempfile
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from megatron.core.models.gpt import GPTModel
from modelopt.torch.export import import_mcore_gpt_from_hf
from modelopt.torch.export.plugins.mcore_common import all_mcore_hf_import_mapping
from safetensors.torch import load_file
from transformers import PreTrainedModel

from flagscale.megatron.families import Family
from flagscale.megatron.shape import ModelShape, hf_config_for
from flagscale.models.megatron import build_model


def knows(family: Family) -> bool:
    """Whether ModelOpt has rules for it."""
    return family.causal_lm in all_mcore_hf_import_mapping


def imported_by_modelopt(hf_model: PreTrainedModel, shape: ModelShape) -> GPTModel:
    """The Megatron-Core model in float32; call within the runtime."""
    model = build_model(shape, 128)
    padding = shape.padded_vocab_size - shape.vocab_size
    with tempfile.TemporaryDirectory() as name:
        hf_model.save_pretrained(name)  # experts one by one, a tied output layer left out
        state = load_file(Path(name) / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in state:  # it wants the tables as tall as the model's
            state[name] = torch.cat(
                [state[name], state[name].new_zeros(padding, shape.hidden_size)]
            )
    with tempfile.TemporaryDirectory() as name:
        hf_config_for(shape, hf_model.config).save_pretrained(name)
        save_torch_state_dict(state, name)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            import_mcore_gpt_from_hf(model, name, dtype=torch.float32)
    return model.eval()
