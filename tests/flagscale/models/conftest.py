"""Random tiny models of every family, and Megatron-Core's process state for them."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from flagscale.megatron import platform
from flagscale.megatron.shape import from_hf_config
from flagscale.models.hf_folder import HFFolder
from flagscale.models.hf_import import check_names, fill
from flagscale.models.hf_weights import WeightMap
from flagscale.models.megatron import build_model

FAMILIES: dict[str, dict[str, Any]] = {
    "llama tied": {"model_type": "llama", "tie_word_embeddings": True},
    "llama untied, llama3 rope": {
        "model_type": "llama",
        "tie_word_embeddings": False,
        "max_position_embeddings": 16384,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "qwen2 tied": {
        "model_type": "qwen2",
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
    "qwen2 untied": {"model_type": "qwen2", "tie_word_embeddings": False},
    "qwen3 tied, wide heads": {
        "model_type": "qwen3",
        "tie_word_embeddings": True,
        "head_dim": 32,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
    "qwen3 untied": {"model_type": "qwen3", "tie_word_embeddings": False, "head_dim": 16},
}


def random_model(family: str, **changes: object) -> PreTrainedModel:
    values = {
        "vocab_size": 300,  # padded to 384
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.1,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    } | FAMILIES[family]
    values |= changes
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases are 1 and 0 otherwise
            if parameter.dim() == 1:
                parameter += 0.2 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="session")
def make_model() -> Callable[..., PreTrainedModel]:
    return random_model


@pytest.fixture
def runtime() -> Iterator[None]:
    with platform.runtime():
        yield


@pytest.fixture
def imported() -> Callable[[Path], GPTModel]:
    """Reads the model of a Hugging Face folder, as prepare-teacher does; within the runtime."""

    def read(folder: Path) -> GPTModel:
        shape = from_hf_config(AutoConfig.from_pretrained(folder))
        source, weights = HFFolder(folder), WeightMap(shape)
        check_names(source, weights)
        model = build_model(shape, 128, params_dtype=source.dtype())
        fill(model, source, weights)
        return model

    return read
