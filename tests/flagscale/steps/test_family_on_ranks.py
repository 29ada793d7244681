"""A teacher with experts through all steps, alone and on two ranks.

Of the steps that hold models these share each expert's layer and each other tensor; in training
they share experts alone.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

from flagscale.artifacts import open_artifact
from flagscale.errors import UserError
from flagscale.megatron import platform
from flagscale.megatron.shape import ModelShape
from flagscale.models.megatron import load_model, logits
from flagscale.recipe import (
    DistillationRecipe,
    EvaluationRecipe,
    ExportRecipe,
    LayoutRecipe,
    ModelsRecipe,
    ParallelismRecipe,
    StudentRecipe,
    TeacherRecipe,
    TrainingRecipe,
)
from flagscale.steps.convert_student import convert_student
from flagscale.steps.distil_student import distil_student
from flagscale.steps.evaluate import evaluate
from flagscale.steps.export_student import export_student
from flagscale.steps.prepare_teacher import prepare_teacher

EXPERT = {"expert_model_parallel_size": 2}
LAYOUTS = {"alone": {}, "TP2 x EP2": {"tensor_model_parallel_size": 2, **EXPERT}}
# It has learnt nothing: guessing costs ln(1000) = 6.9.
LIMIT = 7.5
TOKENS = torch.arange(64)[None]
TRAINING = {
    "train_iters": 3,
    "micro_batch_size": 2,
    "global_batch_size": 4,
    "lr": 1e-3,
    "lr_warmup_iters": 1,
    "eval_interval": 3,
    "eval_iters": 1,
}


@dataclass(frozen=True)
class Run:
    """What the steps made, and said of it."""

    folder: Path
    figures: dict[str, dict[str, float]]


@pytest.fixture(scope="module")
def source(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3-MoE as the Hub has them, experts one by one, in several shards."""
    folder = tmp_path_factory.mktemp("qwen3-moe")
    config = Qwen3MoeConfig(
        vocab_size=1000,
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=32,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        initializer_range=0.05,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    torch.manual_seed(5)
    Qwen3MoeForCausalLM(config).save_pretrained(folder, max_shard_size="400KB")
    AutoTokenizer.from_pretrained(tiny_teacher).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def runs(source: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    found = {}
    for name, layout in LAYOUTS.items():
        folder = tmp_path_factory.mktemp("run")
        models = ModelsRecipe(parallelism=LayoutRecipe(**layout))
        training = TrainingRecipe(
            **TRAINING, parallelism=ParallelismRecipe(**(EXPERT if layout else {}))
        )
        teacher, student, distilled = (folder / n for n in ("teacher", "student", "distilled"))
        recipe = TeacherRecipe(source=str(source), max_validation_loss=LIMIT)
        figures = {
            "teacher": prepare_teacher(recipe, dataset, teacher, models),
            "student": convert_student(
                StudentRecipe(num_layers=2), teacher, dataset, student, models
            ),
            "distilled": distil_student(
                DistillationRecipe(), training, teacher, student, dataset, folder / "c", distilled
            ),
            "evaluation": evaluate(
                EvaluationRecipe(
                    max_documents=4,
                    max_document_tokens=128,
                    bootstrap_samples=100,
                    prompts=("The",),
                ),
                *(teacher, student, distilled, dataset, folder / "evaluation"),
                models,
            ),
            "export": export_student(
                ExportRecipe(), distilled, folder / "evaluation", folder / "export", models
            ),
        }
        found[name] = Run(folder, figures)
    return found


def test_every_step_is_proven(runs: dict[str, Run]) -> None:
    for run in runs.values():
        assert run.figures["teacher"]["max_logit_difference"] <= 1e-5
        assert run.figures["teacher"]["max_layer_difference"] <= 1e-5
        assert run.figures["student"]["kd_loss_when_equal"] == 0
        assert run.figures["student"]["kd_loss_at_start"] > 0
        assert run.figures["export"]["max_logit_difference"] <= 1e-5
        shape = ModelShape.load(run.folder / "distilled")
        assert (shape.num_layers, shape.architecture.num_experts) == (2, 8)
        assert shape == ModelShape.load(run.folder / "student")
        open_artifact(run.folder / "export", "export")


def test_the_student_learns(runs: dict[str, Run]) -> None:
    lines = (runs["alone"].folder / "distilled" / "validation.jsonl").read_text().splitlines()
    losses = [json.loads(line)["logits distillation loss"] for line in lines]
    assert losses[-1] < losses[0]


def assert_same_weights(ours: Path, theirs: Path, tolerance: float = 0.0) -> None:
    with platform.runtime():
        expected = dict(load_model(theirs, 64).named_parameters())
        found = dict(load_model(ours, 64).named_parameters())
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=tolerance, rtol=0)


def test_two_ranks_make_the_same(runs: dict[str, Run]) -> None:
    alone, ranks = runs["alone"], runs["TP2 x EP2"]
    for artifact, tolerance in (("teacher", 0.0), ("student", 0.0), ("distilled", 1e-5)):
        assert_same_weights(ranks.folder / artifact, alone.folder / artifact, tolerance)
    for step, figures in alone.figures.items():
        same = {
            name: value
            for name, value in figures.items()
            if "difference" not in name and "per second" not in name
        }
        assert {name: ranks.figures[step][name] for name in same} == pytest.approx(
            same, rel=1e-4, abs=1e-6
        )


def test_import_into_a_pipeline(
    runs: dict[str, Run], source: Path, dataset: Path, tmp_path: Path
) -> None:
    models = ModelsRecipe(parallelism=LayoutRecipe(pipeline_model_parallel_size=2))
    recipe = TeacherRecipe(source=str(source), max_validation_loss=LIMIT)
    prepare_teacher(recipe, dataset, tmp_path / "teacher", models)
    assert_same_weights(tmp_path / "teacher", runs["alone"].folder / "teacher")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_transformers_loads_the_export(runs: dict[str, Run], layout: str) -> None:
    folder = runs[layout].folder
    model, report = AutoModelForCausalLM.from_pretrained(
        folder / "export", output_loading_info=True
    )
    assert not any(report.values())
    assert isinstance(model, Qwen3MoeForCausalLM)
    assert model.config.num_hidden_layers == 2
    with torch.no_grad(), platform.runtime():
        expected = model(TOKENS, use_cache=False).logits
        found = logits(load_model(folder / "distilled", 64), TOKENS)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    card = (folder / "export" / "README.md").read_text()
    assert "qwen3_moe (8 experts, 2 a token)" in card


def test_tensor_parallel_experts_are_refused_before_any_process(
    source: Path, dataset: Path, tmp_path: Path
) -> None:
    models = ModelsRecipe(parallelism=LayoutRecipe(tensor_model_parallel_size=2))
    with pytest.raises(UserError, match=r"num_experts=8 .* and expert_model_parallel"):
        prepare_teacher(TeacherRecipe(source=str(source)), dataset, tmp_path / "teacher", models)
    assert list(tmp_path.iterdir()) == []
