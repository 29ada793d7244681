"""The six steps, one after the other, on tiny models. Not yet run on a GPU.

`GPU_TESTS_ON_CPU=1` runs them on a machine without one (`gpu_machine.py`).
"""

import json
from pathlib import Path

import pytest
import torch
from gpu_machine import skip_without_gpus
from transformers import AutoModelForCausalLM, AutoTokenizer

from flagscale.artifacts import Manifest, open_artifact
from flagscale.megatron import platform
from flagscale.megatron.accelerators import check_accelerators
from flagscale.models.megatron import load_model, logits
from flagscale.recipe import (
    DistillationRecipe,
    EvaluationRecipe,
    ExportRecipe,
    ModelsRecipe,
    TrainingRecipe,
)
from flagscale.steps.distil_student import distil_student
from flagscale.steps.evaluate import evaluate
from flagscale.steps.export_student import export_student

pytestmark = pytest.mark.timeout(600)

TRAINING = TrainingRecipe(
    train_iters=20,
    micro_batch_size=2,
    global_batch_size=4 * max(1, torch.cuda.device_count()),
    lr=1e-3,
    lr_warmup_iters=1,
    eval_interval=10,
    eval_iters=1,
    save_interval=10,
)
EVALUATION = EvaluationRecipe(
    max_documents=6, bootstrap_samples=100, prompts=("The list type",), max_new_tokens=5
)
# TF32 keeps 10 bits of the factors: a logit of ten would be wrong by 0.01, and by 0.05 was found.
LOGITS = 1e-3


@torch.no_grad()
def of_transformers(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """fp32 logits [b, s, vocabulary] of a Hugging Face folder, on the CPU."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model(input_ids=tokens, use_cache=False).logits


class Run:
    """Folders of the artifacts, and each step's figures."""

    def __init__(self, folder: Path, **made: Path) -> None:
        self.folder = folder
        self.place = {**made, **{n: folder / n for n in ("distilled", "evaluation", "exported")}}
        self.figures: dict[str, dict[str, float]] = {}

    def manifest(self, name: str, kind: str) -> Manifest:
        return open_artifact(self.place[name], kind)


@pytest.fixture(scope="module")
def run(tmp_path_factory, dataset, teacher, student) -> Run:
    """prepare-data, prepare-teacher and convert-student are those of all tests (tests/conftest)."""
    run = Run(
        tmp_path_factory.mktemp("six-steps"), dataset=dataset, teacher=teacher, student=student
    )
    place = run.place
    run.figures["distil-student"] = distil_student(
        DistillationRecipe(),
        TRAINING,
        teacher,
        student,
        dataset,
        run.folder / "checkpoints",
        place["distilled"],
    )
    run.figures["evaluate"] = evaluate(
        EVALUATION, teacher, student, place["distilled"], dataset, place["evaluation"]
    )
    run.figures["export-student"] = export_student(
        ExportRecipe(), place["distilled"], place["evaluation"], place["exported"]
    )
    return run


def test_every_step_leaves_its_artifact_and_used_the_gpu(run):
    kinds = {
        "dataset": "dataset",
        "teacher": "teacher",
        "student": "student",
        "distilled": "distilled-student",
        "evaluation": "evaluation",
        "exported": "export",
    }
    for name, kind in kinds.items():
        peak = run.manifest(name, kind).peak_memory or {}
        if name == "dataset":
            continue  # no model, no GPU
        assert all(held > 0 for held in peak["host"])
        assert ("device" in peak) == platform.HAS_GPU, name
        assert all(held > 0 for held in peak.get("device", []))


def test_the_student_comes_closer_to_the_teacher(run):
    lines = (run.place["distilled"] / "validation.jsonl").read_text().splitlines()
    losses = [json.loads(line)["logits distillation loss"] for line in lines]
    assert losses[-1] < losses[0]


def test_the_exported_folder_is_the_distilled_student(run, tiny_teacher):
    """Its logits in transformers, on a CPU, are those of the Megatron model here, in fp32."""
    text = "The list type has methods that change the list in place, and none that copies it."
    tokens = torch.tensor([AutoTokenizer.from_pretrained(tiny_teacher)(text)["input_ids"]])
    theirs = of_transformers(run.place["exported"], tokens)
    with platform.runtime():
        model = load_model(run.place["distilled"], seq_length=tokens.shape[1])
        assert next(model.parameters()).dtype == torch.float32
        ours = logits(model, tokens.to(platform.device())).float().cpu()
    assert (ours - theirs).abs().max() < LOGITS


def test_the_teacher_is_transformers_own(run, tiny_teacher):
    """What would not hold with TF32: prepare-teacher has proven it, and here it is seen."""
    text = "A class definition is an executable statement."
    tokens = torch.tensor([AutoTokenizer.from_pretrained(tiny_teacher)(text)["input_ids"]])
    with platform.runtime():
        model = load_model(run.place["teacher"], seq_length=tokens.shape[1])
        ours = logits(model, tokens.to(platform.device())).float().cpu()
    assert (ours - of_transformers(tiny_teacher, tokens)).abs().max() < LOGITS


def test_the_evaluation_reports_on_both_students(run):
    figures = run.figures["evaluate"]
    assert figures
    assert (run.place["evaluation"] / "report.html").stat().st_size > 10_000


def test_a_pod_that_can_use_its_accelerators_goes_on(monkeypatch):
    monkeypatch.setenv("FLAGSCALE_ACCELERATOR_COUNT", str(torch.cuda.device_count()))
    check_accelerators()


def test_on_two_ranks_the_evaluation_is_the_same(run, tmp_path):
    skip_without_gpus(2)
    models = ModelsRecipe.model_validate({"parallelism": {"tensor_model_parallel_size": 2}})
    place = run.place
    inputs = (place["teacher"], place["student"], place["distilled"], place["dataset"])
    found = evaluate(EVALUATION, *inputs, tmp_path / "evaluation", models)
    expected = run.figures["evaluate"]
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-3, abs=1e-3), name
