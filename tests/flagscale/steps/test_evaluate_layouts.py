"""The step on ranks: the figures and continuations of one process."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from evaluated_students import write_student

from flagscale.artifacts import open_artifact
from flagscale.errors import UserError
from flagscale.evaluation import METRICS, PER_DOCUMENT
from flagscale.recipe import ArchitectureRecipe, EvaluationRecipe, LayoutRecipe, ModelsRecipe
from flagscale.steps.evaluate import evaluate

RECIPE = EvaluationRecipe(
    max_documents=5,
    max_document_tokens=90,
    bootstrap_samples=200,
    prompts=("The <script>", "A class", "In the beginning of a longer text, there is"),
    max_new_tokens=8,
)


def run(folder: Path, output: Path, **sizes: int) -> Path:
    names = ("teacher", "student", "distilled", "dataset")
    models = ModelsRecipe(parallelism=LayoutRecipe(**sizes))
    evaluate(RECIPE, *(folder / name for name in names), output, models)
    return output


def rows(evaluation: Path) -> list[dict]:
    return [json.loads(line) for line in (evaluation / PER_DOCUMENT).read_text().splitlines()]


@pytest.fixture(scope="module")
def dense(
    dataset: Path, teacher: Path, student: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    for name, artifact in (("dataset", dataset), ("teacher", teacher), ("student", student)):
        (folder / name).symlink_to(artifact)
    write_student(folder / "distilled", folder, (0, 1))
    run(folder, folder / "alone")
    return folder


@pytest.fixture(scope="module")
def experts(dataset: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experts")
    for name, artifact in (("dataset", dataset), ("teacher", teacher)):
        (folder / name).symlink_to(artifact)
    write_student(folder / "student", folder, architecture=ArchitectureRecipe(num_experts=4))
    latent = ArchitectureRecipe(num_experts=2, multi_latent_attention=True, mtp_num_layers=1)
    write_student(folder / "distilled", folder, architecture=latent)
    run(folder, folder / "alone")
    return folder


def check_same(found: Path, expected: Path, processes: int) -> None:
    for row, alone in zip(rows(found), rows(expected), strict=True):
        assert row["document"] == alone["document"]
        for model in ("teacher", "student", "distilled"):
            np.testing.assert_allclose(
                list(row[model].values()), list(alone[model].values()), rtol=1e-5, atol=1e-9
            )
    manifest, alone = (open_artifact(folder, "evaluation") for folder in (found, expected))
    assert manifest.facts["generations"] == alone.facts["generations"]
    metrics = json.loads((found / METRICS).read_text())
    assert metrics["parameters"] == json.loads((expected / METRICS).read_text())["parameters"]
    assert len(manifest.peak_memory["host"]) == processes


@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (1, 2), (2, 2)])
def test_tensor_and_pipeline_parallel(
    dense: Path, tmp_path: Path, tensor: int, pipeline: int
) -> None:
    sizes = {"tensor_model_parallel_size": tensor, "pipeline_model_parallel_size": pipeline}
    check_same(run(dense, tmp_path / "e", **sizes), dense / "alone", tensor * pipeline)


@pytest.mark.parametrize(("expert", "tensor"), [(2, 1), (2, 2)])
def test_expert_parallel(experts: Path, tmp_path: Path, expert: int, tensor: int) -> None:
    sizes = {"expert_model_parallel_size": expert, "tensor_model_parallel_size": tensor}
    check_same(run(experts, tmp_path / "e", **sizes), experts / "alone", 2)


def test_a_rank_that_fails_says_why(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"num_attention_heads=4 .* is not divisible"):
        run(dense, tmp_path / "e", tensor_model_parallel_size=3)
    assert not (tmp_path / "e").exists()
