"""Values that do not go together are refused, and both are named."""

from typing import Any

import pytest

from flagscale.errors import UserError
from flagscale.recipe import Recipe, parse_section
from tests.flagscale.minimal_recipe import MINIMAL, recipe_with

CONTRADICTIONS = [
    (
        "student",
        {"hidden_size": 64},
        "hidden_size=64 needs init=width or depth_and_width or scratch, but init=depth",
    ),
    ("student", {"num_layers": None}, "init=depth needs num_layers, keep_layers or a target"),
    ("student", {"init": "pretrained", "num_layers": None}, "init=pretrained needs source"),
    ("student", {"init": "pretrained", "source": "a/b"}, "init=pretrained keeps every layer"),
    ("student", {"source": "a/b"}, "source=a/b needs init=pretrained, but init=depth"),
    ("student", {"max_validation_loss": 9}, "max_validation_loss=9.0 needs init=pretrained"),
    (
        "student",
        {"init": "pretrained", "source": "a/b", "num_layers": None, "hidden_size": 64},
        "hidden_size=64 needs init=width or depth_and_width or scratch, but init=pretrained",
    ),
    ("student", {"init": "width", "num_layers": None}, "init=width needs hidden_size, ffn_hidden"),
    ("student", {"init": "width", "hidden_size": 64}, "num_layers=10 needs init=depth or depth_an"),
    (
        "student",
        {"init": "depth_and_width", "hidden_size": 64, "num_query_groups": 1},
        "ModelOpt's mcore_minitron cannot prune key/value groups",
    ),
    (
        "student",
        {"init": "scratch", "num_experts": 4},
        "num_experts=4 needs init=width or depth_and_width, but init=scratch: from scratch it",
    ),
    ("student", {"init": "scratch", "target_parameters": 1e6}, "target_parameters=1000000.0 needs"),
    ("student", {"target_memory": 1}, "target_memory needs target_platform: H100-80GB, cpu"),
    (
        "student",
        {"target_speed": 1, "target_platform": "cpu"},
        "target_speed=1 with target_platform=cpu: the planner knows the speed of accelerators",
    ),
    ("student", {"target_platform": "cpu"}, "target_platform=cpu has no effect without target_mem"),
    ("student", {"max_depth_pruning": 0.1}, "max_depth_pruning=0.1 has no effect without a target"),
    ("student", {"calibration_tokens": 64}, "calibration_tokens=64 has no effect with"),
    ("student", {"init": "same"}, "init=same keeps every layer"),
    (
        "student",
        {"init": "same", "num_layers": None, "layer_importance": "kl"},
        "layer_importance=kl needs init=depth or depth_and_width, but init=same",
    ),
    (
        "student",
        {"num_layers": None, "keep_layers": [0, 1], "layer_importance": "kl"},
        "layer_importance=kl has no effect with keep_layers=[0, 1]",
    ),
    (
        "student",
        {"calibration_tokens": 512},
        "calibration_tokens=512 has no effect with layer_importance=even",
    ),
    (
        "student",
        {"init": "scratch", "reconstruction": {}},
        "reconstruction needs init=depth, but init=scratch",
    ),
    ("student", {"init": "prune"}, "init='prune': is called depth now"),
    ("student", {"init": "copy"}, "init='copy': is called same now"),
    ("student", {"init": "scratch", "keep_layers": [0]}, "keep_layers=(0,) needs init=depth"),
    ("student", {"num_layers": None, "keep_layers": [3, 1]}, "keep_layers=[3, 1] must rise"),
    ("student", {"num_layers": None, "keep_layers": [1, 1]}, "keep_layers=[1, 1] must rise"),
    ("student", {"num_layers": None, "keep_layers": []}, "keep_layers=[] must rise"),
    ("student", {"num_layers": 3, "keep_layers": [0, 1]}, "num_layers=3 but keep_layers names 2"),
    (
        "student",
        {"init": "scratch", "num_attention_heads": 9, "num_query_groups": 2},
        "num_attention_heads=9 is not divisible by num_query_groups=2",
    ),
    (
        "student",
        {"init": "scratch", "num_attention_heads": 6, "hidden_size": 64},
        "hidden_size=64 is not divisible by num_attention_heads=6",
    ),
    ("data", {"validation_fraction": 0}, "validation_fraction=0 leaves nothing"),
    ("data", {"test_fraction": 0}, "test_fraction=0 leaves nothing"),
    (
        "data",
        {"validation_fraction": 0.5, "test_fraction": 0.5},
        "validation_fraction=0.5 and test_fraction=0.5 leave no training documents",
    ),
    (
        "distillation",
        {"kd_loss_scale": 0.5},
        "kd_loss_scale=0.5 has no effect with skip_lm_loss=true",
    ),
    (
        "distillation",
        {"beta": 0.4},
        "beta=0.4 has no effect with divergence=forward_kl: it is of jensen_shannon",
    ),
    (
        "distillation",
        {"divergence": "skew_kl", "top_k": 8},
        "top_k=8 has no effect with divergence=skew_kl: it is of top_k_kl",
    ),
    (
        "distillation",
        {"divergence": "jensen_shannon", "alpha": 0.3},
        "alpha=0.3 has no effect with divergence=jensen_shannon: it is of skew_kl",
    ),
    (
        "distillation",
        {"divergence": "logits_mse", "temperature": 2},
        "temperature=2.0 has no effect with divergence=logits_mse",
    ),
    (
        "distillation",
        {"loss": "none", "divergence": "reverse_kl"},
        "divergence=reverse_kl has no effect with loss=none",
    ),
    (
        "distillation",
        {"loss": "none", "intermediate_layer_pairs": [["a", "b"]]},
        "intermediate_layer_pairs need loss=logits",
    ),
    (
        "distillation",
        {"intermediate_layer_pairs": [["a", "b", "l1"]]},
        "intermediate loss 'l1': must be cosine or mse",
    ),
    ("teacher_outputs", {"draws": 9}, "draws=9 has no effect with codec=hidden: it is of sampled"),
    (
        "teacher_outputs",
        {"codec": "sampled", "dtype": "bf16"},
        "dtype=bf16 has no effect with codec=sampled: it is of hidden",
    ),
    (
        "teacher_outputs",
        {"codec": "sampled", "top_k": 8},
        "top_k=8 has no effect with codec=sampled: it is of topk",
    ),
    (
        "training",
        {"global_batch_size": 3, "micro_batch_size": 2},
        "global_batch_size=3 is not a multiple of micro_batch_size=2",
    ),
    ("training", {"min_lr": 1.0}, "min_lr=1.0 is above lr=0.001"),
    ("training", {"lr_warmup_iters": 10}, "lr_warmup_iters=10 must be below train_iters=10"),
    (
        "training",
        {"keep_weights": "best", "eval_interval": 4, "save_interval": 6},
        "save_interval=6 is not a multiple of eval_interval=4",
    ),
    ("training", {"lr_decay_style": "WSD"}, "WSD needs it and nothing else takes it"),
    ("training", {"lr_wsd_decay_iters": 2}, "WSD needs it and nothing else takes it"),
    (
        "training",
        {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 10**6},
        "lr_wsd_decay_iters=1000000 is more than the",
    ),
    ("training", {"fp8_recipe": "mxfp8"}, "fp8_recipe=mxfp8 has no effect with fp8=none"),
    (
        "training",
        {"parallelism": {"sequence_parallel": True}},
        "sequence_parallel=true needs tensor_model_parallel_size above 1",
    ),
    (
        "training",
        {"parallelism": {"virtual_pipeline_model_parallel_size": 2}},
        "virtual_pipeline_model_parallel_size=2 needs to be above 1, and pipeline_model_parallel",
    ),
]


@pytest.mark.parametrize(("section", "fields", "message"), CONTRADICTIONS)
def test_contradictions_are_refused_with_both_values(
    section: str, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as error:
        recipe_with(section, **fields)
    assert message in str(error.value)
    assert f"  {section}" in str(error.value)


INTERLEAVED = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}


@pytest.mark.parametrize(
    ("parallelism", "batch", "resources", "message"),
    [
        (
            {"tensor_model_parallel_size": 2, "processes": 3},
            4,
            {},
            "training.parallelism: tensor x pipeline x context = 2 x 1 x 1 does not divide the 3",
        ),
        (
            {"processes": 2},
            3,
            {},
            "training.global_batch_size=3 is not a multiple of micro_batch_size=1 x 2 data",
        ),
        ({"processes": 2}, 6, {"nodes": 2}, "micro_batch_size=1 x 4 data-parallel ranks"),
        ({"processes": 2, **INTERLEAVED}, 3, {}, "makes 3 micro-batches a rank"),
    ],
)
def test_processes_that_cannot_share_the_training(parallelism, batch, resources, message) -> None:
    training = {"micro_batch_size": 1, "global_batch_size": batch, "parallelism": parallelism}
    values = {
        **MINIMAL,
        "training": {**MINIMAL["training"], **training},
        "distillation": {"loss": "none"},
        "resources": resources,
    }
    with pytest.raises(UserError, match=message):
        parse_section(Recipe, values, where="recipe")


@pytest.mark.parametrize(
    ("parallelism", "message"),
    [
        ({"processes": 4}, "processes=4 with accelerator_count=2"),
        (
            {"tensor_model_parallel_size": 4},
            r"4 x 1 x 1 does not divide the 2 processes \(resources.nodes=1, 2 each\)",
        ),
    ],
)
def test_processes_that_a_pod_has_no_accelerators_for(parallelism, message) -> None:
    training = {**MINIMAL["training"], "global_batch_size": 4, "parallelism": parallelism}
    recipe = parse_section(Recipe, {**MINIMAL, "training": training}, where="recipe")
    with pytest.raises(ValueError, match=message):
        recipe.check_accelerators(2)


def test_a_model_may_be_larger_than_a_node() -> None:
    parallelism = {"processes": 2, "pipeline_model_parallel_size": 4}
    training = {**MINIMAL["training"], "parallelism": parallelism}
    values = {**MINIMAL, "training": training, "resources": {"nodes": 2}}
    assert parse_section(Recipe, values, where="recipe").resources.nodes == 2


def test_a_balance_loss_that_masked_tokens_would_make_heavier() -> None:
    student = {
        "init": "scratch",
        "architecture": {"num_experts": 4, "moe_aux_loss_coeff": 0.01},
    }
    values = {**MINIMAL, "student": student, "export": {"format": "megatron"}}
    parse_section(Recipe, values, where="recipe")
    chat = {**values, "data": {"source": "chats.jsonl", "format": "chat"}}
    with pytest.raises(UserError, match=r"moe_aux_loss_coeff=0\.01 with data\.format=chat"):
        parse_section(Recipe, chat, where="recipe")
