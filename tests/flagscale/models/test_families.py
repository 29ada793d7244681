"""What every family of `flagscale.megatron.families` must do, made from its table.

The other tests over `VARIANTS` belong to it: import and logits in test_hf_import.py, the byte-equal
round trip in test_hf_export.py.
"""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from variants import VARIANTS

from flagscale.checkpoint import load_layers, save_weights
from flagscale.errors import UserError
from flagscale.megatron.families import FAMILIES, Family
from flagscale.megatron.shape import ModelShape, from_hf_config, hf_config_for
from flagscale.models.megatron import build_model, logits
from flagscale.models.student_shape import layers_to_keep, student_shape
from flagscale.recipe import ArchitectureRecipe, StudentRecipe
from flagscale.sizes.parameters import parameters
from flagscale.sizes.teacher import shape_of

DOCS = Path(__file__).parents[3] / "docs" / "models.md"
TOKENS = torch.randint(300, (2, 128), generator=torch.Generator().manual_seed(0))
PRUNED = StudentRecipe(num_layers=2)  # of 3: the first and the last
EXPERTS = [name for name, values in VARIANTS.items() if "num_experts" in values]

# A value of each field that is refused.
REFUSED = {
    "attention_bias": True,
    "mlp_bias": True,
    "hidden_act": "gelu",
    "attention_dropout": 0.1,
    "decoder_sparse_step": 2,
    "mlp_only_layers": [1],
}


def row(model_type: str, family: Family) -> str:
    has = ["norm on query and key heads"] * family.qk_layernorm
    has += ["bias on query, key and value"] * family.add_qkv_bias
    has += ["experts in every layer"] * family.has_experts
    only = [f"`{name}` = {allowed[0]}" for name, allowed in family.further.items()]
    cells = (
        f"`{model_type}`",
        family.models,
        f"`{family.causal_lm}`",
        ", ".join(has) or "-",
        ", ".join(only) or "-",
    )
    return "| " + " | ".join(cells) + " |"


def test_the_documentation_lists_every_family() -> None:
    text = DOCS.read_text(encoding="utf-8")
    lines = text.splitlines()
    first = lines.index("|---|---|---|---|---|") + 1
    last = next(n for n in range(first, len(lines)) if not lines[n].startswith("|"))
    rows = [row(*entry) for entry in FAMILIES.items()]
    if "RENEW_TABLE" in os.environ:
        DOCS.write_text("\n".join([*lines[:first], *rows, *lines[last:], ""]), encoding="utf-8")
    else:
        assert lines[first:last] == rows, "renew it: make docs"


def test_every_family_has_variants() -> None:
    assert {values["model_type"] for values in VARIANTS.values()} == set(FAMILIES)


@pytest.mark.parametrize("variant", VARIANTS)
def test_configuration_round_trip(
    make_model: Callable[..., PreTrainedModel], variant: str, tmp_path: Path
) -> None:
    """What a shape does not hold stays; what it holds comes back."""
    template = make_model(variant).config
    shape = from_hf_config(template)
    assert shape.fits_hugging_face
    shape.save(tmp_path)
    assert ModelShape.load(tmp_path) == shape
    config = hf_config_for(shape, template)
    assert from_hf_config(config) == shape
    family = FAMILIES[template.model_type]
    assert config.architectures == [family.causal_lm]
    ignored = {"_name_or_path", "architectures", "head_dim", "layer_types", "max_window_layers"}
    before, after = template.to_dict(), config.to_dict()
    changed = {name for name in before | after if before.get(name) != after.get(name)}
    assert changed <= ignored
    assert type(AutoModelForCausalLM.from_config(config)).__name__ == family.causal_lm


@pytest.mark.parametrize("variant", VARIANTS)
def test_plans_count_its_weights(make_model: Callable[..., PreTrainedModel], variant: str) -> None:
    """From the same configuration, read without transformers; without padding, which is ours."""
    hf_model = make_model(variant)
    shape = shape_of(hf_model.config.to_dict())
    assert parameters(shape) == parameters(from_hf_config(hf_model.config))
    assert parameters(replace(shape, padded_vocab_size=300)).total == hf_model.num_parameters()


@pytest.mark.usefixtures("runtime")
@pytest.mark.parametrize("variant", VARIANTS)
def test_pruned_layers_are_transformers_without_the_others(
    make_model: Callable[..., PreTrainedModel],
    imported: Callable[[Path], GPTModel],
    exported: Callable[..., PreTrainedModel],
    tmp_path: Path,
    variant: str,
) -> None:
    """Cut out of the checkpoint, and written for transformers: the same logits three times."""
    hf_model = make_model(variant)
    hf_model.save_pretrained(tmp_path / "source")
    save_weights(imported(tmp_path / "source"), tmp_path / "teacher")
    teacher = from_hf_config(hf_model.config)
    shape, kept = student_shape(teacher, PRUNED), layers_to_keep(3, PRUNED)
    assert shape.architecture == teacher.architecture
    student = build_model(shape, TOKENS.size(1))
    load_layers(student, tmp_path / "teacher", kept, 3)
    del hf_model.model.layers[1]
    hf_model.config.num_hidden_layers = 2
    with torch.no_grad():
        expected = hf_model(TOKENS, use_cache=False).logits
        ours = logits(student, TOKENS)
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)
        written = exported(student, shape, hf_model.config)
        assert torch.equal(written(TOKENS, use_cache=False).logits, expected)


@pytest.mark.usefixtures("runtime")
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_float64(
    make_model: Callable[..., PreTrainedModel],
    imported: Callable[[Path], GPTModel],
    tmp_path: Path,
    variant: str,
) -> None:
    hf_model = make_model(variant)
    hf_model.save_pretrained(tmp_path)
    ours = logits(imported(tmp_path), TOKENS)
    with torch.no_grad():
        hf_model.set_experts_implementation("eager")  # the other ones are not for float64
        expected = hf_model.double()(TOKENS, use_cache=False).logits
    assert expected.dtype == torch.float64
    torch.testing.assert_close(ours.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.usefixtures("runtime")
@pytest.mark.parametrize("variant", EXPERTS)
def test_router_in_float64(
    make_model: Callable[..., PreTrainedModel],
    imported: Callable[[Path], GPTModel],
    tmp_path: Path,
    variant: str,
) -> None:
    """The chosen experts and their weights, written out; where the choice is a tie, left out."""
    hf_model = make_model(variant)
    hf_model.save_pretrained(tmp_path)
    config, router = hf_model.config, imported(tmp_path).decoder.layers[1].mlp.router
    hidden_sbh = torch.randn(500, 2, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        shares, chosen = router(hidden_sbh)
    weight = hf_model.state_dict()["model.layers.1.mlp.gate.weight"].double()
    scores = (hidden_sbh.double().flatten(0, 1) @ weight.T).exp()
    scores /= scores.sum(-1, keepdim=True)
    ordered = scores.sort(-1, descending=True)
    count = config.num_experts_per_tok
    clear = ordered.values[:, count - 1] - ordered.values[:, count] > 1e-6
    assert clear.sum() > 900
    expected = torch.zeros_like(scores)
    top = ordered.values[:, :count]
    if config.norm_topk_prob:
        top = top / top.sum(-1, keepdim=True)
    expected.scatter_(1, ordered.indices[:, :count], top)
    assert torch.equal(chosen[clear], expected[clear] > 0)
    torch.testing.assert_close(shares[clear].double(), expected[clear], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("model_type", "name"),
    [(model_type, name) for model_type, entry in FAMILIES.items() for name in entry.expected],
)
def test_what_a_family_does_not_honour_is_refused(model_type: str, name: str) -> None:
    config = AutoConfig.for_model(model_type, sliding_window=None)
    setattr(config, name, REFUSED[name])
    with pytest.raises(UserError, match=rf"{model_type} teacher: {name}=.* is not supported"):
        from_hf_config(config)


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"logit_scale": 0.5}, "1 fields of its configuration are unknown.*: logit_scale=0.5"),
        (
            {"final_logit_softcapping": 30.0},
            "softcapping=30.0.*name them in teacher.ignored_config",
        ),
        (
            {"attention_multiplier": 0.1, "of_tomorrow": [1]},
            "2 fields .*: attention_multiplier=0.1",
        ),
        ({"no_rope_layers": [1, 0]}, r"no_rope_layers=\[1, 0\]"),
        ({"transformers_weights": "other.safetensors"}, "transformers_weights='other.safetensors'"),
        ({"quantization": {"bits": 4}}, r"quantization=\{'bits': 4\}"),
        ({"attention_chunk_size": 64}, "attention_chunk_size=64"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder=True"),
        ({"is_causal": False}, "is_causal=False is not supported, True is"),
        ({"quantization_config": {"quant_method": "fp8"}}, "weights quantised with 'fp8'"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised with 'gptq'"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantised with 'bitsandb"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "with 'compressed-t"),
        ({"auto_map": {"AutoModelForCausalLM": "m.M"}}, "auto_map=.* code that comes with a model"),
        ({"architectures": ["MySequenceClassifier"]}, r"architectures=\['MySeq.* is not supported"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type='yarn' is not supp"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [2]}}, "mrope.* is not supported"),
        ({"rope_scaling": {"rope_type": "default", "factor": 4.0}}, "factor=4.0 of a rotary"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
    ],
)
def test_fields_that_may_change_what_is_computed_are_refused(
    model_type: str, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=rf"{model_type} teacher: .*{message}"):
        from_hf_config(AutoConfig.for_model(model_type, sliding_window=None, **fields))


# Fields of config.json as it is on the Hub, beside sizes.
OF_LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "pretraining_tp": 1}
OF_LLAMA |= {"attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu"}
OF_QWEN = {"attention_dropout": 0.0, "use_sliding_window": False, "rope_theta": 1000000.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
PUBLISHED: dict[str, dict[str, Any]] = {
    "SmolLM2-135M-Instruct": {
        **OF_LLAMA,
        "is_llama_config": True,
        "rope_interleaved": False,
        "rope_scaling": None,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
    },
    "Llama-3.1-8B-Instruct": {
        **OF_LLAMA,
        "eos_token_id": [128001, 128008, 128009],
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "rope_scaling": LLAMA3 | {"original_max_position_embeddings": 8192},
        "rope_theta": 500000.0,
    },
    "Mistral-7B-v0.3": {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "rope_theta": 1000000.0,
        "sliding_window": None,
    },
    "Qwen2.5-0.5B": {
        **OF_QWEN,
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "max_window_layers": 24,
        "sliding_window": 32768,
        "use_mrope": False,
    },
    "Qwen3-8B": {
        **OF_QWEN,
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "head_dim": 128,
        "max_window_layers": 36,
        "rope_scaling": None,
        "sliding_window": None,
    },
    "Qwen3-30B-A3B": {
        **OF_QWEN,
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "decoder_sparse_step": 1,
        "head_dim": 128,
        "max_window_layers": 48,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "num_experts": 128,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_are_read(name: str) -> None:
    shape = from_hf_config(AutoConfig.for_model(**PUBLISHED[name]))
    assert shape.use_rope_scaling == ("Llama-3.1" in name)
    assert shape.rotary_base == PUBLISHED[name]["rope_theta"]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_fields_without_effect_are_passed_over(model_type: str) -> None:
    plain = from_hf_config(AutoConfig.for_model(model_type, sliding_window=None))
    besides = {
        "unsloth_version": "2025.1",
        "use_mrope": False,
        "logit_scale": None,
        "torch_dtype": "bfloat16",
        "auto_map": {"AutoTokenizer": ["t.T", None]},
        "initializer_range": 0.1,
        "of_tomorrow": [1],
    }
    config = AutoConfig.for_model(model_type, sliding_window=None, **besides)
    assert from_hf_config(config, ignored=["of_tomorrow"]) == plain


def test_plans_refuse_other_families() -> None:
    with pytest.raises(UserError, match="model_type='gemma' is not supported; supported: llama, "):
        shape_of({"model_type": "gemma", "hidden_size": 8, "num_attention_heads": 2})


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_sliding_window_is_refused(model_type: str) -> None:
    config: Any = AutoConfig.for_model(model_type)
    config.sliding_window, config.use_sliding_window = 64, True
    with pytest.raises(UserError, match=r"sliding-window attention \(sliding_window=64\)"):
        from_hf_config(config)


def test_mistral_s_default_is_a_sliding_window() -> None:
    with pytest.raises(UserError, match=r"sliding_window=4096\) is not supported"):
        from_hf_config(AutoConfig.for_model("mistral"))


def test_a_router_that_megatron_core_lacks_is_refused() -> None:
    config = AutoConfig.for_model("qwen3_moe", num_experts_per_tok=1, norm_topk_prob=True)
    with pytest.raises(UserError, match="norm_topk_prob=True with num_experts_per_tok=1"):
        from_hf_config(config)
    config = AutoConfig.for_model("qwen3_moe", num_experts_per_tok=9, num_experts=8)
    with pytest.raises(UserError, match="moe_router_topk=9 is above num_experts=8"):
        from_hf_config(config)


def test_a_student_from_scratch_has_its_teacher_s_experts(
    make_model: Callable[..., PreTrainedModel],
) -> None:
    teacher = from_hf_config(make_model(EXPERTS[0]).config)
    shape = student_shape(teacher, StudentRecipe(init="scratch", hidden_size=32))
    assert shape.architecture == teacher.architecture
    assert shape.fits_hugging_face
    with pytest.raises(UserError, match=r"ffn_hidden_size=32 has no effect.*width 24"):
        student_shape(teacher, StudentRecipe(init="scratch", ffn_hidden_size=32))


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ({}, "no qwen3_moe configuration"),
        ({"num_experts": 4, "moe_layer_freq": 2}, "'moe_layer_freq': 2.*no qwen3_moe"),
        ({"num_experts": 4, "moe_shared_expert_intermediate_size": 8}, "no qwen3_moe"),
    ],
)
def test_a_student_that_its_family_does_not_hold_is_refused(
    make_model: Callable[..., PreTrainedModel], architecture: dict[str, Any], message: str
) -> None:
    teacher = from_hf_config(make_model(EXPERTS[0]).config)
    recipe = StudentRecipe(init="scratch", architecture=ArchitectureRecipe(**architecture))
    with pytest.raises(UserError, match=message):
        student_shape(teacher, recipe).check_fits_hugging_face()


def test_a_student_of_other_experts_is_written_as_what_it_is(
    make_model: Callable[..., PreTrainedModel],
) -> None:
    template = make_model(EXPERTS[0]).config
    experts = ArchitectureRecipe(num_experts=4, moe_router_topk=2, moe_aux_loss_coeff=0.1)
    recipe = StudentRecipe(init="scratch", ffn_hidden_size=40, architecture=experts)
    config = hf_config_for(student_shape(from_hf_config(template), recipe), template)
    found = (config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size)
    assert found == (4, 2, 40)
    assert config.norm_topk_prob is True
