"""Tiny models as llama.cpp's converter writes them."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from transformers import PreTrainedModel

from flagscale.models.rotary import inverse_frequencies

ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "qwen3_moe": "qwen3moe"}


def as_gguf(model: PreTrainedModel) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Keys and tensors of its file."""
    config = model.config
    name = ARCHITECTURES[config.model_type]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    keys = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": config.rope_parameters["rope_theta"],
        "rope.dimension_count": head_dim,
        "vocab_size": config.vocab_size,
    }
    if name == "qwen3moe":
        keys |= {
            "expert_count": config.num_experts,
            "expert_used_count": config.num_experts_per_tok,
            "expert_feed_forward_length": config.moe_intermediate_size,
        }
    tensors = _tensors(model, name)
    if config.rope_parameters["rope_type"] == "llama3":
        base, factor = (config.rope_parameters[key] for key in ("rope_theta", "factor"))
        factors = inverse_frequencies(head_dim, base) / inverse_frequencies(head_dim, base, factor)
        tensors["rope_freqs.weight"] = factors.numpy()
    ids = {f"tokenizer.ggml.{kind}_token_id": 0 for kind in ("bos", "eos", "padding")}
    described = {"general.architecture": name, "general.type": "model", "general.name": "tiny"}
    return described | {f"{name}.{key}": value for key, value in keys.items()} | ids, tensors


def _tensors(model: PreTrainedModel, architecture: str) -> dict[str, np.ndarray]:
    config = model.config
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    heads = {
        "q_proj.weight": config.num_attention_heads,
        "k_proj.weight": config.num_key_value_heads,
    }
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if name.endswith("experts.gate_up_proj"):
            layer = name.split(".")[2]
            for part, half in zip(("gate", "up"), tensor.chunk(2, dim=1), strict=True):
                tensors[f"blk.{layer}.ffn_{part}_exps.weight"] = half.contiguous().numpy()
            continue
        if name.endswith("experts.down_proj"):
            name += ".weight"
        for part, count in heads.items():
            if architecture == "llama" and name.endswith(part):
                # llama.cpp interleaves the halves that RoPE pairs
                rows, columns = tensor.shape
                tensor = tensor.view(count, 2, rows // count // 2, columns)
                tensor = tensor.transpose(1, 2).reshape(rows, columns)
        tensors[names.get_name(name, (".weight", ".bias"))] = tensor.numpy()
    return tensors


def write(path: Path, keys: dict[str, Any], tensors: dict[str, np.ndarray]) -> Path:
    """Matrices of type Q8_0 where they are bytes."""
    writer = gguf.GGUFWriter(path, keys["general.architecture"])
    adders = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    for key, value in keys.items():
        if key != "general.architecture":
            adders[type(value)](key, value)
    for name, tensor in tensors.items():
        kind = gguf.GGMLQuantizationType.Q8_0 if tensor.dtype == np.uint8 else None
        writer.add_tensor(name, tensor, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
