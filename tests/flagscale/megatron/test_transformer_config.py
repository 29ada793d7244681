from dataclasses import replace

import pytest
import torch
from megatron.core.transformer.heterogeneous.heterogeneous_config import (
    HeterogeneousTransformerConfig,
)
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from flagscale.errors import UserError
from flagscale.megatron import platform
from flagscale.megatron.arguments import Arguments, model_arguments, training_arguments
from flagscale.megatron.fp8 import check_fp8_sizes
from flagscale.megatron.shape import ModelShape
from flagscale.megatron.transformer_config import transformer_config
from flagscale.recipe import ArchitectureRecipe, ParallelismRecipe, TrainingRecipe

SHAPE = ModelShape(
    model_type="llama",
    num_layers=8,
    hidden_size=64,
    ffn_hidden_size=128,
    num_attention_heads=8,
    num_query_groups=4,
    kv_channels=8,
    vocab_size=120,
    padded_vocab_size=128,
    max_position_embeddings=64,
    norm_epsilon=1e-5,
    rotary_base=1e4,
)
MLA = {"multi_latent_attention": True}
EXPERTS = {"num_experts": 4}
LINEAR = {
    "block_configs": [
        {"attention": {"replace_with_linear": True}, "mlp": {"ffn_hidden_size": 128}},
    ]
}
needs_no_gpu = pytest.mark.skipif(platform.HAS_GPU, reason="there is a GPU")


def arguments(
    architecture=None, parallelism=None, shape=None, seq_length=64, **changes
) -> Arguments:
    made = replace(SHAPE, architecture=ArchitectureRecipe(**architecture or {}), **shape or {})
    sizes = ParallelismRecipe(**parallelism or {})
    return Arguments(shape=made, seq_length=seq_length, parallelism=sizes, **changes)


TP2 = {"tensor_model_parallel_size": 2}
SP = {**TP2, "sequence_parallel": True}
LAYOUTS = [
    {},
    TP2,
    SP,
    {"tensor_model_parallel_size": 8},  # more than the groups
    {"pipeline_model_parallel_size": 4},
    {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 4},
    {"context_parallel_size": 4},
    {**SP, "pipeline_model_parallel_size": 2, "context_parallel_size": 2},
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sizes_reach_megatron_core(layout):
    config = transformer_config(arguments(parallelism=layout))
    assert type(config) is TransformerConfig
    for name in ParallelismRecipe.model_fields:
        if hasattr(config, name) and name != "processes":
            assert getattr(config, name) == getattr(ParallelismRecipe(**layout), name), name
    interleaved = "virtual_pipeline_model_parallel_size" in layout
    assert (config.overlap_p2p_comm, config.batch_p2p_comm) == (interleaved, not interleaved)
    assert config.pipeline_dtype == torch.float32
    assert config.calculate_per_token_loss


@pytest.mark.parametrize("layout", [{}, {**SP, "expert_model_parallel_size": 2}])
def test_experts(layout):
    recipe = {**EXPERTS, "moe_router_topk": 1, "moe_aux_loss_coeff": 0.01, "moe_layer_freq": 2}
    config = transformer_config(arguments(recipe, layout))
    assert (config.num_moe_experts, config.moe_router_topk, config.moe_layer_freq) == (4, 1, 2)
    assert config.moe_router_pre_softmax  # else the gate of a single expert has no gradient
    assert config.moe_router_load_balancing_type == "aux_loss"
    assert config.moe_ffn_hidden_size == 128
    assert config.expert_model_parallel_size == layout.get("expert_model_parallel_size", 1)
    assert transformer_config(arguments(EXPERTS)).moe_router_load_balancing_type == "none"


def test_other_classes_of_configuration():
    latent = transformer_config(arguments({**MLA, "v_head_dim": 6}))
    assert type(latent) is MLATransformerConfig
    assert (latent.v_head_dim, latent.rope_type, latent.q_lora_rank) == (6, "rope", None)
    block = {"attention": {"no_op": True}, "mlp": {"ffn_hidden_size": 32}}
    config = transformer_config(
        arguments({"heterogeneous_layers_config": {"block_configs": [block] * 8}})
    )
    assert type(config) is HeterogeneousTransformerConfig
    assert config.get_config_for_layer(3).ffn_hidden_size == 32
    assert config.per_block_parameters[2].attention.no_op


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"shape": {"hidden_size": 72}}, "hidden_size = 72 must be a multiple of 16"),
        ({"parallelism": {"tensor_model_parallel_size": 16}}, "ffn_hidden_size / TP = 8 must be"),
        ({"seq_length": 60}, "ranks that share it = 60 must be a multiple of 8"),
        (
            {"seq_length": 48, "fp8_recipe": "mxfp8"},
            "fp8_recipe=mxfp8: .* = 48 must be a multiple of 32",
        ),
    ],
)
def test_sizes_that_fp8_kernels_do_not_take(values, message):
    check_fp8_sizes(arguments(fp8="hybrid"))
    with pytest.raises(UserError, match=message):
        check_fp8_sizes(arguments(fp8="hybrid", **values))


@pytest.mark.parametrize("granularity", ["none", "selective", "full"])
def test_recompute(granularity):
    config = transformer_config(arguments(recompute_granularity=granularity))
    assert config.recompute_granularity == (None if granularity == "none" else granularity)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"parallelism": {"pipeline_model_parallel_size": 3}},
            "num_layers=8 .*is not divisible by the pipeline's 3 chunks .*can be 1, 2, 4 or 8",
        ),
        (
            {
                "parallelism": {
                    "pipeline_model_parallel_size": 2,
                    "virtual_pipeline_model_parallel_size": 3,
                }
            },
            "num_layers=8 .*is not divisible by the pipeline's 6 chunks .*on no number of stages",
        ),
        (
            {"parallelism": {"tensor_model_parallel_size": 3}},
            "num_attention_heads=8 .*by tensor_model_parallel_size=3; it can be 1, 2, 4 or 8",
        ),
        (
            {
                "parallelism": {"tensor_model_parallel_size": 3},
                "shape": {"num_attention_heads": 9, "num_query_groups": 9, "ffn_hidden_size": 96},
            },
            "padded_vocab_size=128 .*is not divisible by tensor_model_parallel_size=3",
        ),
        (
            {
                "parallelism": {"tensor_model_parallel_size": 4},
                "shape": {"num_attention_heads": 12, "num_query_groups": 6},
            },
            "num_query_groups=6 .*is neither a multiple nor a divisor of .* can be 1 or 2",
        ),
        (
            {"parallelism": {"context_parallel_size": 3}},
            "seq_length=64 is not divisible by 2 x context_parallel_size=6; choose a multiple of 6",
        ),
        (
            {
                "parallelism": {**SP, "context_parallel_size": 16},
                "shape": {"ffn_hidden_size": 128},
                "seq_length": 48,
            },
            "seq_length=48 .*is not divisible by",
        ),
        (
            {"parallelism": {"expert_model_parallel_size": 2}},
            r"expert_model_parallel_size=2.*the model has no experts",
        ),
        (
            {"architecture": EXPERTS, "parallelism": {"expert_model_parallel_size": 3}},
            "num_experts=4 .*is not divisible by expert_model_parallel_size=3; it can be 1, 2 or 4",
        ),
        (
            {"architecture": EXPERTS, "parallelism": {**TP2, "expert_model_parallel_size": 2}},
            "num_experts=4 .* with tensor_model_parallel_size=2.*sequence_parallel=true",
        ),
        (
            {"architecture": EXPERTS, "parallelism": SP},
            "num_experts=4 .* tensor_model_parallel_size=2.*expert_model_parallel_size above 1",
        ),
        (
            {
                "architecture": {"mtp_num_layers": 1},
                "parallelism": {"pipeline_model_parallel_size": 2},
            },
            r"mtp_num_layers=1 with .*\.pipeline_model_parallel_size=2 and tied embeddings",
        ),
        (
            {"architecture": MLA, "parallelism": SP},
            "multi_latent_attention=true with tensor_model_parallel_size=2.*transformer_engine",
        ),
        (
            {"architecture": MLA, "shape": {"use_rope_scaling": True}},
            "multi_latent_attention=true with use_rope_scaling=True",
        ),
        (
            {"architecture": {"heterogeneous_layers_config": LINEAR}, "parallelism": SP},
            "replace_with_linear in .*with sequence_parallel=true",
        ),
        pytest.param({"fp8": "hybrid"}, r"fp8=hybrid.*transformer_engine", marks=needs_no_gpu),
        pytest.param(
            {"fp8": "e4m3", "transformer_impl": "transformer_engine"},
            r"fp8=e4m3.*on a GPU",
            marks=needs_no_gpu,
        ),
        pytest.param(
            {"architecture": {**EXPERTS, "moe_grouped_gemm": True}},
            "moe_grouped_gemm=true needs training.transformer_impl=transformer_engine on a GPU",
            marks=needs_no_gpu,
        ),
    ],
)
def test_what_cannot_be_honoured_is_refused(values, message):
    args = arguments(**values)
    with pytest.raises(UserError, match=message):
        transformer_config(args)


def test_gradient_accumulation_fusion_is_for_training_alone(monkeypatch):
    monkeypatch.setattr(platform, "has_gradient_accumulation", lambda: True)
    training = training_arguments(SHAPE, 64, TrainingRecipe(train_iters=1, lr=1e-3))
    assert transformer_config(training).gradient_accumulation_fusion
    # Without Megatron-Core's wrapper there is nothing to add to: the backward pass would fail.
    assert not transformer_config(model_arguments(SHAPE, 64)).gradient_accumulation_fusion
