"""A GGUF file as the Hugging Face model that it is: its configuration, and its weights dequantised.

The file is read to the letter. A key of its architecture that is not known here, with whatever
value, and a tensor that the configuration does not ask for are refused: llama.cpp would honour
them. The keys and what their absence means are those of llama.cpp
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md); tokenizers have rules of their own.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader, get_tensor_name_map
from gguf.constants import GGML_QUANT_VERSION, MODEL_ARCH_NAMES
from gguf.quants import dequantize
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.torch import save_file
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from flagscale.artifacts import write_json
from flagscale.errors import UserError
from flagscale.megatron.config_fields import LLAMA3_ROPE
from flagscale.megatron.families import FAMILIES
from flagscale.megatron.shape import from_hf_config
from flagscale.models.hf_weights import WeightMap
from flagscale.models.rotary import inverse_frequencies

logger = logging.getLogger(__name__)

# llama.cpp's names of the families. A Mistral is a llama to it, which computes the same.
_MODEL_TYPES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "qwen3moe": "qwen3_moe"}
_KEYS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
    "vocab_size": "vocab_size",
}
_KEYS_OF_EXPERTS = {
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
_TOKENS = {
    "tokenizer.ggml.bos_token_id": "bos_token_id",
    "tokenizer.ggml.eos_token_id": "eos_token_id",
    "tokenizer.ggml.unknown_token_id": "unk_token_id",
    "tokenizer.ggml.padding_token_id": "pad_token_id",
}
# Keys that must say what the model does anyway.
_FIXED: dict[str, tuple[Any, ...]] = {
    "rope.scaling.type": ("none",),
    "rope.scaling.factor": (0.0, 1.0),
    "rope.scale_linear": (1.0,),
    "attention.causal": (True,),
    "attention.sliding_window": (0,),
    "use_parallel_residual": (False,),
    "pooling_type": (0,),
    "leading_dense_block_count": (0,),
    "expert_shared_count": (0,),
    "expert_weights_norm": (True,),
    "expert_weights_scale": (0.0, 1.0),
    "expert_gating_func": (1,),  # softmax
    # Both name the order of query and key rows that llama.cpp computes with.
    "tensor_data_layout": ("reference", "Meta AI original pth"),
}
# The only ones outside of the architecture's own that change what is computed.
_FIXED_ELSEWHERE: dict[str, tuple[Any, ...]] = {
    "general.type": ("model",),
    "general.quantization_version": (GGML_QUANT_VERSION,),
    "split.count": (0, 1),
}
# What llama.cpp computes without a key: see its defaults, and its models.
_OPTIONAL = {"attention.head_count_kv", "attention.key_length", "rope.freq_base", "vocab_size"}
_UNSAID: dict[str, dict[str, Any]] = {"qwen3moe": {"norm_topk_prob": True}}
_ROPE_FACTORS, _EMBEDDING, _OUTPUT = "rope_freqs.weight", "token_embd.weight", "output.weight"
_UNREADABLE = (
    *(OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, ArithmeticError),
    NotImplementedError,  # a way of quantising that the gguf package cannot undo
)
_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_MAX_SHARD_SIZE = "5GB"


class GGUFFile:
    """A GGUF file.

    Attributes:
        config: its model's configuration.
    """

    def __init__(self, path: Path, name: str | None = None) -> None:
        """Read all but the weights.

        Args:
            path: of the file.
            name: how the user knows it, for messages; default: the path.

        Raises:
            UserError: it cannot be read, or says something that is not supported.
        """
        self._name = name or str(path)
        with self._readable():
            reader = GGUFReader(path)
            if reader.byte_order != "I":
                raise ValueError("its byte order is not this machine's")
            self._tensors = {tensor.name: tensor for tensor in reader.tensors}
            self._values = {
                key: field.contents()
                for key, field in reader.fields.items()
                if not key.startswith("tokenizer.") or key in _TOKENS
            }
        self._architecture = str(self._values.get("general.architecture"))
        self._check_fixed()
        with self._readable():
            self.config = self._config()
        self._shapes = WeightMap(from_hf_config(self.config)).shapes()
        self._places = self._locate(self._shapes)

    def write(self, folder: Path) -> None:
        """Write the model as transformers would, in float32.

        No more than one file's weights, 5 GB, are in memory.

        Args:
            folder: existing folder to write into.

        Raises:
            UserError: its weights cannot be read.
        """
        self.config.save_pretrained(folder)
        split = split_state_dict_into_shards_factory(
            self._shapes,
            get_storage_size=lambda shape: torch.Size(shape).numel() * torch.float32.itemsize,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=_MAX_SHARD_SIZE,
        )
        for file_name, names in split.filename_to_tensors.items():
            state = {name: self._tensor(name) for name in names}
            save_file(state, folder / file_name, {"format": "pt"})
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            write_json(folder / SAFE_WEIGHTS_INDEX_NAME, index)
        logger.info("dequantised %d tensors of %s to float32", len(self._tensors), self._name)

    def _check_fixed(self) -> None:
        """Refuse what is no model of a known architecture, alone in its file."""
        if self._values.get("split.count", 0) > 1:
            raise self._refused(
                f"it is one of {self._values['split.count']} files; make them one with "
                "llama.cpp's llama-gguf-split --merge"
            )
        for key, allowed in _FIXED_ELSEWHERE.items():
            if self._values.get(key, allowed[0]) not in allowed:
                raise self._refused(f"{key}={self._values[key]!r}, {allowed[0]!r} is supported")
        if self._architecture not in _MODEL_TYPES:
            raise self._refused(
                f"general.architecture={self._architecture!r}; supported: {', '.join(_MODEL_TYPES)}"
            )

    def _config(self) -> PreTrainedConfig:
        """What the keys of the architecture say, each of which must be known."""
        family = FAMILIES[_MODEL_TYPES[self._architecture]]
        names = _KEYS | (_KEYS_OF_EXPERTS if family.has_experts else {})
        start = f"{self._architecture}."
        own = {k.removeprefix(start): v for k, v in self._values.items() if k.startswith(start)}
        lacking = sorted(names.keys() - own.keys() - _OPTIONAL)
        if lacking:
            raise self._refused(f"it has no {start}{lacking[0]}")
        for key in names.keys() & own.keys():
            if isinstance(own[key], list):
                raise self._refused(f"{start}{key} differs from layer to layer: {own[key]}")
        values = {names[key]: own[key] for key in names if key in own}
        values.setdefault("num_key_value_heads", values["num_attention_heads"])
        values.setdefault("head_dim", values["hidden_size"] // values["num_attention_heads"])
        fixed = dict(_FIXED)
        fixed |= dict.fromkeys(
            ("attention.value_length", "rope.dimension_count"), (values["head_dim"],)
        )
        if not family.has_experts:
            fixed |= dict.fromkeys(_KEYS_OF_EXPERTS, (0,))
        for key, value in own.items():
            allowed = fixed.get(key, ())
            if key not in names and value not in allowed:
                right = f"{allowed[0]!r} is supported" if allowed else "unknown here"
                raise self._refused(f"{start}{key}={value!r}: {right}")
        base = float(values.pop("rope_theta", 10000.0))
        values["rope_parameters"] = self._rope(values["head_dim"], base)
        values |= {name: self._values.get(key) for key, name in _TOKENS.items()}
        values["tie_word_embeddings"] = _OUTPUT not in self._tensors
        values.setdefault("vocab_size", int(self._tensors[_EMBEDDING].shape[-1]))
        values |= _UNSAID.get(self._architecture, {})
        config: PreTrainedConfig = AutoConfig.for_model(
            _MODEL_TYPES[self._architecture], architectures=[family.causal_lm], **values
        )
        return config

    def _rope(self, width: int, base: float) -> dict[str, Any]:
        """The scaling of Llama 3 is a tensor, of what each frequency is divided by."""
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": base}
        if _ROPE_FACTORS not in self._tensors:
            return rope
        found = self._dequantised(_ROPE_FACTORS)
        factor = found.max().item()
        plain = inverse_frequencies(width, base)
        for scaling in (0.0, factor):
            factors = plain / inverse_frequencies(width, base, scaling)
            if found.shape == factors.shape and torch.allclose(found, factors, rtol=1e-4):
                scaled = {"rope_type": "llama3", "factor": scaling, **LLAMA3_ROPE}
                return rope | (scaled if scaling else {})
        raise self._refused(
            f"{_ROPE_FACTORS} is another scaling of the rotary embedding than Llama 3's, which "
            f"divides by up to {factor:g}"
        )

    def _locate(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[str, int | None]]:
        """Where each tensor of the model is: in which of the file's, and of which expert.

        Raises:
            UserError: the file's tensors are not those of the configuration.
        """
        arch = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == self._architecture)
        names = get_tensor_name_map(arch, self.config.num_hidden_layers)
        places: dict[str, tuple[str, int | None]] = {}
        wanted: dict[str, tuple[int, ...]] = {}
        for name, size in shapes.items():
            expert = _EXPERT.search(name)
            whole = _EXPERT.sub(".experts.", name)
            theirs = names.get_name(whole, (".weight", ".bias"))
            if theirs is None:
                raise RuntimeError(f"llama.cpp has no name for {whole}")
            places[name] = theirs, int(expert[1]) if expert else None
            wanted[theirs] = (self.config.num_experts, *size) if expert else size
        given = {name: tuple(tensor.shape.tolist()[::-1]) for name, tensor in self._tensors.items()}
        given.pop(_ROPE_FACTORS, None)
        for what, differing in (
            ("missing", wanted.keys() - given.keys()),
            ("left over", given.keys() - wanted.keys()),
        ):
            if differing:
                raise self._refused(f"{len(differing)} tensors are {what}, first {min(differing)}")
        others = sorted(name for name in wanted if given[name] != wanted[name])
        if others:
            raise self._refused(
                f"{len(others)} tensors have another shape, first {others[0]}: {given[others[0]]}, "
                f"but its keys make it {wanted[others[0]]}"
            )
        return places

    def _tensor(self, name: str) -> torch.Tensor:
        """A tensor of the Hugging Face model."""
        weight = self._dequantised(*self._places[name])
        if self._architecture == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            # llama.cpp interleaves the two halves of a head whose channels RoPE turns in pairs.
            pairs = weight.view(-1, self.config.head_dim // 2, 2, weight.size(1))
            weight = pairs.transpose(1, 2).reshape(weight.shape)
        return weight

    def _dequantised(self, name: str, expert: int | None = None) -> torch.Tensor:
        """A tensor of the file, or an expert's part of it, in float32."""
        tensor = self._tensors[name]
        data = tensor.data if expert is None else tensor.data[expert]
        with self._readable():
            return torch.from_numpy(dequantize(data, tensor.tensor_type).copy())

    def _refused(self, why: str) -> UserError:
        return UserError(f"model {self._name}: {why}")

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except _UNREADABLE as error:
            reason = (str(error) or type(error).__name__).strip().splitlines()[0]
            raise UserError(f"model of {self._name} cannot be read: {reason}") from error
