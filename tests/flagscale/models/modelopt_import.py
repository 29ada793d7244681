"""ModelOpt's importer: other people's code that does what `hf_import` does, for comparison."""

import contextlib
import io
import tempfile

import torch
from huggingface_hub import save_torch_state_dict
from megatron.core.models.gpt import GPTModel
from modelopt.torch.export import import_mcore_gpt_from_hf
from transformers import PreTrainedModel

from flagscale.megatron.shape import ModelShape, hf_config_for
from flagscale.models.megatron import build_model


def imported_by_modelopt(hf_model: PreTrainedModel, shape: ModelShape) -> GPTModel:
    """The Megatron-Core model in float32; call within the runtime."""
    model = build_model(shape, 128)
    state = dict(hf_model.state_dict())
    if not shape.untie_embeddings_and_output_weights:
        state.pop("lm_head.weight")
    padding = shape.padded_vocab_size - shape.vocab_size
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
