"""Random tiny models of every family, in what variants it has: what its tests are made from."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VARIANTS: dict[str, dict[str, Any]] = {
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
    "mistral untied, wide heads": {
        "model_type": "mistral",
        "tie_word_embeddings": False,
        "sliding_window": None,
        "head_dim": 32,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
    "mistral tied": {"model_type": "mistral", "tie_word_embeddings": True, "sliding_window": None},
    "qwen3_moe untied, rescaled shares": {
        "model_type": "qwen3_moe",
        "tie_word_embeddings": False,
        "head_dim": 32,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
    "qwen3_moe tied, shares of all experts": {
        "model_type": "qwen3_moe",
        "tie_word_embeddings": True,
        "head_dim": 16,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "norm_topk_prob": False,
    },
    "qwen3_moe, one expert a token": {
        "model_type": "qwen3_moe",
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 48,
        "norm_topk_prob": False,
    },
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
    } | VARIANTS[family]
    values |= changes
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases are 1 and 0 otherwise
            if parameter.dim() == 1:
                parameter += 0.2 * torch.randn_like(parameter)
    return model
