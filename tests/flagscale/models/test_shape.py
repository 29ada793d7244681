import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from flagscale.errors import UserError
from flagscale.megatron.shape import (
    ModelShape,
    from_hf_config,
    hf_config_for,
    pad_vocab_size,
)
from flagscale.models.student_shape import layers_to_keep, student_shape
from flagscale.recipe import ArchitectureRecipe, StudentRecipe

TEACHER = ModelShape(
    model_type="llama",
    num_layers=30,
    hidden_size=576,
    ffn_hidden_size=1536,
    num_attention_heads=9,
    num_query_groups=3,
    kv_channels=64,
    vocab_size=49152,
    padded_vocab_size=49152,
    max_position_embeddings=8192,
    norm_epsilon=1e-5,
    rotary_base=100000.0,
)
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
}


@pytest.mark.parametrize(("size", "padded"), [(1, 128), (128, 128), (129, 256), (49152, 49152)])
def test_vocabulary_padding(size: int, padded: int) -> None:
    assert pad_vocab_size(size, 128) == padded


def test_families_differ_where_they_do(make_model: Callable[..., PreTrainedModel]) -> None:
    llama = from_hf_config(make_model("llama untied, llama3 rope").config)
    assert (llama.qk_layernorm, llama.add_qkv_bias) == (False, False)
    assert (llama.use_rope_scaling, llama.rope_scaling_factor) == (True, 32.0)
    assert llama.rotary_base == 500000.0
    assert llama.untie_embeddings_and_output_weights
    qwen2 = from_hf_config(make_model("qwen2 tied").config)
    assert (qwen2.qk_layernorm, qwen2.add_qkv_bias, qwen2.kv_channels) == (False, True, 16)
    assert not qwen2.untie_embeddings_and_output_weights
    qwen3 = from_hf_config(make_model("qwen3 tied, wide heads").config)
    assert (qwen3.qk_layernorm, qwen3.add_qkv_bias, qwen3.kv_channels) == (True, False, 32)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GPT2Config(), r"model_type='gpt2' is not supported; supported: llama, mistral, qwen2"),
        (LlamaConfig(attention_bias=True), "attention_bias=True is not supported"),
        (LlamaConfig(hidden_act="gelu"), "hidden_act='gelu' is not supported, 'silu' is"),
        (
            LlamaConfig(num_attention_heads=8, num_key_value_heads=3),
            "num_attention_heads=8 is not divisible by num_key_value_heads=3",
        ),
        (
            LlamaConfig(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}),
            "rope_type='yarn' is not supported; supported: default, llama3",
        ),
        (
            LlamaConfig(
                rope_parameters={
                    "rope_type": "llama3",
                    "rope_theta": 1e4,
                    "factor": 8.0,
                    "low_freq_factor": 2.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192,
                }
            ),
            r"low_freq_factor=2.0 is not supported; Megatron-Core's is 1.0",
        ),
        (
            AutoConfig.for_model(
                "qwen2", use_sliding_window=True, sliding_window=64, max_window_layers=0
            ),
            r"sliding-window attention \(sliding_window=64\) is not supported",
        ),
        (
            LlamaConfig(quantization_config={"quant_method": "awq"}),
            "quantised with 'awq' are not supported",
        ),
    ],
)
def test_what_would_be_silently_wrong_is_refused(config: PreTrainedConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_hf_config(config)


def test_model_json_round_trip(tmp_path: Path) -> None:
    TEACHER.save(tmp_path)
    assert ModelShape.load(tmp_path) == TEACHER
    (tmp_path / "model.json").write_text('{"num_layers": 3}')
    with pytest.raises(UserError, match="must hold exactly the fields"):
        ModelShape.load(tmp_path)
    (tmp_path / "model.json").unlink()
    with pytest.raises(UserError, match="cannot be read"):
        ModelShape.load(tmp_path)


def test_model_json_holds_the_architecture(tmp_path: Path) -> None:
    blocks = [{"attention": {"no_op": True}, "mlp": {"ffn_hidden_size": 8}}] * 30
    for recipe in (
        ArchitectureRecipe(num_experts=4, moe_aux_loss_coeff=0.01),
        ArchitectureRecipe(heterogeneous_layers_config={"block_configs": blocks}),
    ):
        shape = replace(TEACHER, architecture=recipe)
        shape.save(tmp_path)
        assert ModelShape.load(tmp_path) == shape
    values = json.loads((tmp_path / "model.json").read_text())
    values["architecture"]["num_expert"] = 3
    (tmp_path / "model.json").write_text(json.dumps(values))
    with pytest.raises(
        UserError, match=r"model\.json, architecture: .*\n.*num_expert.*num_experts"
    ):
        ModelShape.load(tmp_path)


def test_a_student_may_have_an_architecture_of_its_own() -> None:
    def made(**architecture: object) -> ModelShape:
        recipe = StudentRecipe(
            init="scratch", num_layers=2, architecture=ArchitectureRecipe(**architecture)
        )
        scaled = replace(TEACHER, use_rope_scaling=True, add_qkv_bias=True, qk_layernorm=True)
        return student_shape(scaled, recipe)

    experts = made(num_experts=4)
    assert experts.architecture.num_experts == 4
    assert (experts.num_query_groups, experts.qk_layernorm, experts.use_rope_scaling) == (3, 1, 1)
    latent = made(multi_latent_attention=True, qk_layernorm=False)
    assert (latent.num_query_groups, latent.qk_layernorm) == (9, False)
    assert (latent.use_rope_scaling, latent.add_qkv_bias) == (False, False)
    block = {"attention": {"no_op": True}, "mlp": {"no_op": True}}
    with pytest.raises(UserError, match="has 3 block_configs, but the student has 2 layers"):
        made(heterogeneous_layers_config={"block_configs": [block] * 3})
    assert student_shape(TEACHER, StudentRecipe(num_layers=2)).architecture.is_default


def test_no_hugging_face_configuration_for_an_architecture_of_its_own() -> None:
    shape = replace(TEACHER, architecture=ArchitectureRecipe(normalization="LayerNorm"))
    with pytest.raises(
        UserError, match=r"\{'normalization': 'LayerNorm'\}: no llama .*export.format=megatron"
    ):
        hf_config_for(shape, AutoConfig.for_model("llama", **SMALL))


def test_kept_layers_are_spread_evenly_ends_included() -> None:
    assert layers_to_keep(30, StudentRecipe(num_layers=10)) == (0, 3, 6, 10, 13, 16, 19, 23, 26, 29)
    assert layers_to_keep(4, StudentRecipe(num_layers=2)) == (0, 3)
    assert layers_to_keep(4, StudentRecipe(num_layers=1)) == (0,)
    assert layers_to_keep(4, StudentRecipe(keep_layers=(1, 2))) == (1, 2)
    assert layers_to_keep(4, StudentRecipe(init="same")) == (0, 1, 2, 3)
    for count in range(1, 31):
        kept = layers_to_keep(30, StudentRecipe(num_layers=count))
        assert len(set(kept)) == count


@pytest.mark.parametrize(
    ("student", "message"),
    [
        (StudentRecipe(num_layers=31), "student.num_layers=31: the teacher has only 30 layers"),
        (StudentRecipe(init="scratch", num_layers=31), "the teacher has only 30 layers"),
        (
            StudentRecipe(keep_layers=(0, 30)),
            r"student.keep_layers=\[0, 30\]: the teacher's layers are 0 to 29",
        ),
        (
            StudentRecipe(init="scratch", num_attention_heads=8),
            "num_attention_heads=8 is not divisible by num_query_groups=3",
        ),
        (
            StudentRecipe(init="scratch", hidden_size=100),
            "student: hidden_size=100 is not divisible by num_attention_heads=9",
        ),
        (StudentRecipe(init="scratch", hidden_size=99), "heads of 11 channels"),
    ],
)
def test_impossible_students_are_refused(student: StudentRecipe, message: str) -> None:
    with pytest.raises(UserError, match=message):
        student_shape(TEACHER, student)


def test_student_shapes() -> None:
    assert student_shape(TEACHER, StudentRecipe(num_layers=10)) == replace(TEACHER, num_layers=10)
    assert student_shape(TEACHER, StudentRecipe(init="same")) == TEACHER
    scratch = StudentRecipe(
        init="scratch", hidden_size=256, num_attention_heads=8, num_query_groups=4
    )
    made = student_shape(TEACHER, scratch)
    assert (made.hidden_size, made.kv_channels, made.num_layers) == (256, 32, 30)
    wide_heads = replace(TEACHER, kv_channels=128)
    assert (
        student_shape(wide_heads, StudentRecipe(init="scratch", hidden_size=144)).kv_channels == 128
    )


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_hf_config_of_a_student(family: str) -> None:
    template = AutoConfig.for_model(family, **SMALL)
    teacher = from_hf_config(template)
    recipe = StudentRecipe(init="scratch", num_layers=2, hidden_size=32, ffn_hidden_size=48)
    shape = student_shape(teacher, recipe)
    config = hf_config_for(shape, template)
    assert from_hf_config(config) == shape
    assert template.num_hidden_layers == 3
    if family != "llama":
        assert config.layer_types == ["full_attention"] * 2
    model = AutoModelForCausalLM.from_config(config)
    assert len(model.model.layers) == 2
    assert sum(parameter.numel() for parameter in model.parameters()) > 0
