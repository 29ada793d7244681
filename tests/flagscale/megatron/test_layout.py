"""A recipe's layouts against both its models, before any step."""

from dataclasses import replace

import pytest

from flagscale.errors import UserError
from flagscale.megatron.layout import check_layouts
from flagscale.megatron.shape import ModelShape
from flagscale.recipe import ArchitectureRecipe, Recipe

TEACHER = ModelShape(
    model_type="llama",
    num_layers=12,
    hidden_size=96,
    ffn_hidden_size=192,
    num_attention_heads=12,
    num_query_groups=4,
    kv_channels=8,
    vocab_size=120,
    padded_vocab_size=128,
    max_position_embeddings=64,
    norm_epsilon=1e-5,
    rotary_base=1e4,
)
STUDENT = replace(TEACHER, num_layers=8)
EXPERTS = ArchitectureRecipe(num_experts=4)
TENSOR, PIPELINE = "tensor_model_parallel_size", "pipeline_model_parallel_size"
EXPERT = "expert_model_parallel_size"
# Narrower attention in its second layer.
BLOCKS = ArchitectureRecipe(
    heterogeneous_layers_config={
        "block_configs": [
            {"attention": {"num_query_groups": 4}, "mlp": {"ffn_hidden_size": 192}},
            {"attention": {"num_query_groups": 3}, "mlp": {"ffn_hidden_size": 190}},
        ]
    }
)


def recipe(models=None, training=None, **sections) -> Recipe:
    values = {
        "name": "layouts",
        "teacher": {"source": "t"},
        "student": {"num_layers": 8},
        "data": {"seq_length": 64},
        "training": {"train_iters": 10, "lr": 1e-3, "parallelism": training or {}},
        "models": {"parallelism": models},
    }
    return Recipe.model_validate(values | sections)


@pytest.mark.parametrize(
    ("given", "shapes", "message"),
    [
        (
            {"models": {TENSOR: 8}},
            {},
            r"models\.parallelism: num_attention_heads=12 \(of the student\) is not divisible by "
            r"tensor_model_parallel_size=8; it can be 1, 2 or 4$",
        ),
        (
            {"models": {PIPELINE: 8}},
            {},
            r"models\.parallelism: num_layers=12 \(of the teacher\) .* can be 1, 2, 3, 4, 6 or 12$",
        ),
        ({"models": {PIPELINE: 3}}, {}, r"models\..*num_layers=8 \(of the student\)"),
        (
            {"models": {EXPERT: 2}},
            {},
            r"models\.parallelism\.expert_model_parallel_size=2: neither .* has experts",
        ),
        (
            {"models": {EXPERT: 3}},
            {"teacher": EXPERTS},
            r"models\.parallelism: architecture\.num_experts=4 \(of the teacher\) .* be 1, 2 or 4$",
        ),
        (
            {"models": {TENSOR: 2}},
            {"teacher": EXPERTS},
            r"models\.parallelism: .* and expert_model_parallel_size=1: .* above 1$",
        ),
        (
            {"models": {TENSOR: 4, EXPERT: 2}, "data": {"seq_length": 62}},
            {"teacher": EXPERTS},
            r"models\.parallelism: data\.seq_length=62 .* the 4 tensor .* choose a multiple of 4$",
        ),
        ({"training": {PIPELINE: 8}}, {}, r"training\..*num_layers=12 \(of the teacher\)"),
        ({"training": {TENSOR: 5}}, {}, r"training\..*num_attention_heads=12 \(of the student\)"),
        (
            {"training": {"context_parallel_size": 3}},
            {},
            r"training\.parallelism: data\.seq_length=64 is .*=6; choose a multiple of 6$",
        ),
        (
            {"training": {EXPERT: 2}},
            {"teacher": EXPERTS},
            r"training\.parallelism\.expert_model_parallel_size=2 with .*num_experts=None",
        ),
        (
            {"training": {TENSOR: 2, "sequence_parallel": True}},
            {"student": EXPERTS},
            r"training\.parallelism: .*=4 \(of the student\) with tensor_.* above 1",
        ),
        (
            {"models": {TENSOR: 2}},
            {"student": BLOCKS},
            r"num_query_groups=3 \(of the student\) is neither .* it can be 1$",
        ),
        (
            {"models": {TENSOR: 4}},
            {"student": BLOCKS},
            r"ffn_hidden_size of heterogeneous_layers_config, layer 2=190 \(of the student\)",
        ),
        (
            {
                "distillation": {
                    "intermediate_layer_pairs": [["decoder.layers.7", "decoder.layers.12"]]
                }
            },
            {},
            "of the teacher: it has layers 0 to 11",
        ),
    ],
)
def test_a_layout_that_a_model_is_not_divisible_by(given, shapes, message) -> None:
    shape = {
        who: replace(whole, architecture=shapes.get(who, whole.architecture))
        for who, whole in (("teacher", TEACHER), ("student", STUDENT))
    }
    with pytest.raises(UserError, match=message):
        check_layouts(recipe(**given), shape["teacher"], shape["student"])


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"models": {TENSOR: 4, PIPELINE: 4}, "training": {TENSOR: 2, PIPELINE: 2}},
        # Without a teacher in the training its layers need no stages.
        {"training": {PIPELINE: 8}, "distillation": {"loss": "none"}},
    ],
)
def test_one_that_both_are_divisible_by(given) -> None:
    check_layouts(recipe(**given), TEACHER, STUDENT)


@pytest.mark.parametrize("models", [{EXPERT: 2}, {EXPERT: 2, TENSOR: 2}])
def test_experts_of_one_of_the_two_are_spread(models) -> None:
    given = recipe(models=models, training={EXPERT: 2})
    check_layouts(given, TEACHER, replace(STUDENT, architecture=EXPERTS))
