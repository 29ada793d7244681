"""Each step with values at the borders of what a recipe accepts: it works, or refuses in words.

What no step is begun with, because a recipe, a platform or this machine does not take it, is in
test_bounds.py, test_combinations.py and test_preflight.py.

Minutes: `FLAGSCALE_EXTREMES=1 python -m pytest tests/flagscale/steps/test_extreme_values.py` runs
them all; without the variable one of each section is tried.
"""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from flagscale.errors import UserError
from flagscale.recipe import (
    DataRecipe,
    DistillationRecipe,
    EvaluationRecipe,
    StudentRecipe,
    TrainingRecipe,
)
from flagscale.steps.convert_student import convert_student
from flagscale.steps.distil_student import distil_student
from flagscale.steps.evaluate import evaluate
from flagscale.steps.prepare_data import prepare_data

MOST = 2**31 - 1
BASE = {"train_iters": 3, "global_batch_size": 2, "lr": 1e-3, "eval_interval": 2, "eval_iters": 1}
TRAINING: list[dict[str, Any]] = [
    {"seed": MOST},
    {"lr": 1.0},
    {"lr": 5e-324},
    {"lr": 1e-3, "min_lr": 1e-3, "lr_warmup_iters": 2},
    {"lr": 0.5, "weight_decay": 1.99},
    {"adam_beta1": 0.0, "adam_beta2": 0.0},
    {"adam_beta1": 0.9999999999999999, "adam_beta2": 0.9999999999999999},
    {"adam_eps": 1e-30},
    {"adam_eps": 1.0},
    {"clip_grad": 5e-324},
    {"clip_grad": 1e30},
    {"clip_grad": 0},
    {"eval_interval": MOST, "save_interval": MOST, "keep_checkpoints": MOST},
    {"save_interval_minutes": 5e-324},
    {"save_interval_minutes": 1e30},
    {"global_batch_size": 64, "micro_batch_size": 64},
    {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 3},
    {"lr_decay_style": "inverse-square-root", "lr_warmup_iters": 2},
    {"precision": "bf16", "recompute_granularity": "full", "timing_log_level": 2},
    {"reset_attention_mask": True, "async_save": True, "rerun_mode": "validate_results"},
    {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
    {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
    {"recompute_granularity": "selective", "recompute_modules": []},
    {"overlap_grad_reduce": True, "ddp_bucket_size": MOST},
    {"overlap_grad_reduce": True, "ddp_bucket_size": 1},
    {"bias_activation_fusion": True, "bias_dropout_fusion": True},
    {"parallelism": {"use_distributed_optimizer": True}},
    {"apply_rope_fusion": True},
    {"gradient_accumulation_fusion": True},
    {"log_straggler": True},
    {"record_memory_history": True},
]
DISTILLATION: list[dict[str, Any]] = [
    {"temperature": 0.01},
    {"temperature": 1000.0},
    {"skip_lm_loss": False, "kd_loss_scale": 1e6},
    {"skip_lm_loss": False, "kd_loss_scale": 1e-6},
    {
        "intermediate_layer_pairs": [["decoder.layers.0", "decoder.layers.0"]],
        "intermediate_loss_scale": 1e6,
    },
]
EVALUATION: list[dict[str, Any]] = [
    {"max_documents": 2, "max_document_tokens": 1, "bootstrap_samples": 100, "micro_batch_size": 1},
    {"micro_batch_size": MOST, "max_documents": 3, "confidence": 0.9999999999999999},
    {"confidence": 5e-324, "max_documents": MOST, "max_document_tokens": 5},
    {"prompts": ["\u200b", "a\nb", "$$ {{x}}", "x " * 300], "max_documents": 2},
    {"prompts": ["a"], "max_new_tokens": 300, "max_documents": 2},
]
SCRATCH = {"init": "scratch"}
STUDENT: list[dict[str, Any]] = [
    {"num_layers": 1, "seed": MOST},
    {**SCRATCH, "hidden_size": 8, "num_attention_heads": 4, "num_query_groups": 1},
    {**SCRATCH, "hidden_size": 4, "num_attention_heads": 1, "num_query_groups": 1, "num_layers": 1},
    {**SCRATCH, "ffn_hidden_size": 1},
    {**SCRATCH, "hidden_size": 2, "num_attention_heads": 1, "num_query_groups": 1},
    {**SCRATCH, "architecture": {"num_experts": 1, "moe_router_topk": 1}},
    {**SCRATCH, "architecture": {"num_experts": 2, "moe_layer_freq": 2**24}},
    {**SCRATCH, "architecture": {"num_experts": 2, "moe_aux_loss_coeff": 1e6}},
    {**SCRATCH, "architecture": {"num_experts": 2, "moe_ffn_hidden_size": 1}},
    {**SCRATCH, "architecture": {"multi_latent_attention": True, "q_lora_rank": 1}},
    {**SCRATCH, "architecture": {"spec": "no.such:thing"}},
    {**SCRATCH, "architecture": {"spec": "os:getcwd"}},
    {**SCRATCH, "architecture": {"normalization": "LayerNorm", "qk_layernorm": True}},
]
DATA: list[dict[str, Any]] = [
    {"workers": 1024, "max_documents": 40},
    {"seq_length": 8, "max_documents": 40},
    {"seq_length": 2**24, "max_documents": 40},
    {"max_documents": 4},
    {"validation_fraction": 1e-9},
    {"text_field": "y"},
    {"split": "no such", "subset": "$(HOME)"},
    {"eod_token": "no such"},
    {"revision": "7e2", "max_documents": 40},
]
ALL = bool(os.environ.get("FLAGSCALE_EXTREMES"))


def some(values: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return values if ALL else values[:1]


@pytest.fixture(scope="module")
def distilled(
    teacher: Path, student: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("distilled")
    training = TrainingRecipe(**BASE)
    places = (teacher, student, dataset, folder / "checkpoints", folder / "distilled")
    distil_student(DistillationRecipe(), training, *places)
    return folder / "distilled"


@pytest.mark.parametrize("values", some(TRAINING), ids=str)
def test_training(
    values: dict[str, Any], teacher: Path, student: Path, dataset: Path, tmp_path: Path
) -> None:
    training = TrainingRecipe(**{**BASE, **values})
    places = (teacher, student, dataset, tmp_path / "checkpoints", tmp_path / "out")
    works_or_refuses(lambda: distil_student(DistillationRecipe(), training, *places))


@pytest.mark.parametrize("values", some(DISTILLATION), ids=str)
def test_distillation(
    values: dict[str, Any], teacher: Path, student: Path, dataset: Path, tmp_path: Path
) -> None:
    places = (teacher, student, dataset, tmp_path / "checkpoints", tmp_path / "out")
    distillation, training = DistillationRecipe(**values), TrainingRecipe(**BASE)
    works_or_refuses(lambda: distil_student(distillation, training, *places))


@pytest.mark.parametrize("values", some(STUDENT), ids=str)
def test_student(values: dict[str, Any], teacher: Path, dataset: Path, tmp_path: Path) -> None:
    recipe = StudentRecipe(**values)
    works_or_refuses(lambda: convert_student(recipe, teacher, dataset, tmp_path / "out"))


@pytest.mark.parametrize("values", some(EVALUATION), ids=str)
def test_evaluation(
    values: dict[str, Any],
    teacher: Path,
    student: Path,
    distilled: Path,
    dataset: Path,
    tmp_path: Path,
) -> None:
    few = {"max_documents": 4, "max_document_tokens": 50, "bootstrap_samples": 100}
    recipe = EvaluationRecipe(**{**few, **values})
    places = (teacher, student, distilled, dataset, tmp_path / "out")
    works_or_refuses(lambda: evaluate(recipe, *places))


@pytest.mark.parametrize("values", some(DATA), ids=str)
def test_data(values: dict[str, Any], tiny_teacher: Path, tmp_path: Path) -> None:
    recipe = DataRecipe(**{"tokenizer": str(tiny_teacher), "seq_length": 16, **values})
    works_or_refuses(lambda: prepare_data(recipe, tmp_path / "out"))


def works_or_refuses(step: Callable[[], dict[str, float]]) -> None:
    with suppress(UserError):
        assert step()
