"""The step on real artifacts: figures against transformers, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from evaluated_students import write_student
from transformers import AutoModelForCausalLM

from flagscale.artifacts import open_artifact
from flagscale.data.loader import split_documents
from flagscale.errors import UserError
from flagscale.evaluation import METRICS, PER_DOCUMENT, REPORT, REPORT_DATA, SUMMARY
from flagscale.evaluation.compare import compare
from flagscale.recipe import DataRecipe, EvaluationRecipe, TeacherRecipe
from flagscale.steps.evaluate import evaluate
from flagscale.steps.prepare_data import prepare_data
from flagscale.steps.prepare_teacher import prepare_teacher
from flagscale.tracking.names import WORK_TAG

SEQ_LENGTH = 32
RECIPE = EvaluationRecipe(
    max_documents=6,
    max_document_tokens=50,
    bootstrap_samples=200,
    prompts=("The <script>", "A class"),
    max_new_tokens=5,
)


@pytest.fixture(scope="module")
def artifacts(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset, a teacher, and two students: one without the first and last layer, one with."""
    folder = tmp_path_factory.mktemp("artifacts")
    data = DataRecipe(
        tokenizer=str(tiny_teacher),
        seq_length=SEQ_LENGTH,
        max_documents=120,
        test_fraction=0.2,
        validation_fraction=0.2,
    )
    prepare_data(data, folder / "dataset")
    prepare_teacher(TeacherRecipe(source=str(tiny_teacher)), folder / "dataset", folder / "teacher")
    write_student(folder / "student", folder, (1, 2))
    write_student(folder / "distilled", folder, (0, 1, 3))
    return folder


def run(artifacts: Path, output: Path, recipe: EvaluationRecipe = RECIPE) -> dict[str, float]:
    names = ("teacher", "student", "distilled", "dataset")
    return evaluate(recipe, *(artifacts / name for name in names), output)


@pytest.fixture(scope="module")
def evaluation(artifacts: Path) -> tuple[Path, dict[str, float]]:
    return artifacts / "evaluation", run(artifacts, artifacts / "evaluation")


def test_writes_the_artifact(artifacts: Path, evaluation: tuple[Path, dict[str, float]]) -> None:
    folder, scalars = evaluation
    manifest = open_artifact(folder, "evaluation")
    assert set(manifest.files) == {REPORT, REPORT_DATA, SUMMARY, METRICS, PER_DOCUMENT}
    assert set(manifest.parents) == {"teacher", "student", "distilled", "dataset"}
    metrics = json.loads((folder / METRICS).read_text())
    assert metrics["documents"] == 6
    assert metrics["models"]["distilled"]["kl"]["value"] == scalars["distilled/kl"]
    assert scalars["kl_reduction"] == pytest.approx(
        1 - scalars["distilled/kl"] / scalars["student/kl"]
    )
    for figures in metrics["models"].values():
        for interval in figures.values():
            assert interval["low"] <= interval["value"] <= interval["high"]


@torch.no_grad()
def test_figures_equal_transformers_in_float64(
    artifacts: Path, evaluation: tuple[Path, dict[str, float]], tiny_teacher: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_teacher).eval()
    losses = {}
    for keep in (None, (1, 2), (0, 1, 3)):
        pruned = AutoModelForCausalLM.from_pretrained(tiny_teacher).eval()
        if keep:
            pruned.model.layers = torch.nn.ModuleList([pruned.model.layers[i] for i in keep])
        totals = np.zeros(5)
        for document in split_documents(artifacts / "dataset", "test", RECIPE.max_documents):
            ids = torch.from_numpy(document[:51])
            for start in range(0, len(ids) - 1, SEQ_LENGTH):
                window = ids[start : start + SEQ_LENGTH + 1]
                log_t, log_s = (
                    torch.log_softmax(m(window[None, :-1], use_cache=False).logits[0].double(), -1)
                    for m in (model, pruned)
                )
                totals += [
                    -log_s.gather(-1, window[1:, None]).sum().item(),
                    (log_t.exp() * (log_t - log_s)).sum().item(),
                    (log_t.argmax(-1) == log_s.argmax(-1)).sum().item(),
                    (log_s.argmax(-1) == window[1:]).sum().item(),
                    len(window) - 1,
                ]
        losses[keep] = totals[:4] / totals[4]
    scalars = evaluation[1]
    for name, keep in (("teacher", None), ("student", (1, 2)), ("distilled", (0, 1, 3))):
        found = [
            scalars[f"{name}/{figure}"]
            for figure in ("lm_loss", "kl", "top1_agreement", "accuracy")
        ]
        assert found == pytest.approx(losses[keep], rel=1e-5)
        assert scalars[f"{name}/perplexity"] == pytest.approx(np.exp(losses[keep][0]), rel=1e-4)


def test_generations_equal_transformers(
    evaluation: tuple[Path, dict[str, float]], tiny_teacher: Path
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_teacher)
    model = AutoModelForCausalLM.from_pretrained(tiny_teacher).eval()
    generations = open_artifact(evaluation[0], "evaluation").facts["generations"]
    for prompt, generation in zip(RECIPE.prompts, generations, strict=True):
        ids = torch.tensor([tokenizer(prompt, add_special_tokens=False)["input_ids"]])
        new = model.generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
        assert generation["prompt"] == prompt
        assert generation["teacher"] == tokenizer.decode(new, skip_special_tokens=True)


def test_the_same_inputs_give_the_same_report(
    artifacts: Path, evaluation: tuple[Path, dict[str, float]], tmp_path: Path
) -> None:
    assert run(artifacts, tmp_path / "again") == evaluation[1]
    for name in (REPORT, METRICS, PER_DOCUMENT):
        assert (tmp_path / "again" / name).read_bytes() == (evaluation[0] / name).read_bytes()
    assert compare(evaluation[0], tmp_path / "again").paired["kl"]["high"] == 0


def test_refuses_artifacts_of_different_runs(artifacts: Path, tmp_path: Path) -> None:
    shutil.copytree(artifacts / "student", tmp_path / "student")
    manifest = json.loads((tmp_path / "student/manifest.json").read_text())
    manifest["facts"]["note"] = "made again"
    (tmp_path / "student/manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="distilled: was made from another student than"):
        evaluate(
            RECIPE,
            artifacts / "teacher",
            tmp_path / "student",
            artifacts / "distilled",
            artifacts / "dataset",
            tmp_path / "evaluation",
        )
    assert not (tmp_path / "evaluation").exists()


def test_another_students_evaluation_is_other_work(
    artifacts: Path, empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the recipe's section is the same in all variants of a sweep."""
    client = mlflow.MlflowClient(f"sqlite:///{empty_store}")
    experiment = client.create_experiment("e", artifact_location=str(tmp_path / "store"))
    injected = client.create_run(experiment).info.run_id
    monkeypatch.setenv("MLFLOW_TRACKING_URI", client.tracking_uri)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", experiment)
    monkeypatch.setenv("MLFLOW_RUN_ID", injected)
    monkeypatch.setenv("KFP_RUN_ID", "a")
    for name in ("dataset", "teacher", "student"):
        (tmp_path / name).symlink_to(artifacts / name)
    shutil.copytree(artifacts / "distilled", tmp_path / "distilled")
    manifest = json.loads((tmp_path / "distilled/manifest.json").read_text())
    manifest["recipe"] = {"training": {"lr": 2.0}}
    (tmp_path / "distilled/manifest.json").write_text(json.dumps(manifest))
    for folder in (artifacts, tmp_path, artifacts):
        run(folder, tmp_path / "evaluation")
    query = f"tags.`mlflow.parentRunId` = '{injected}'"
    runs = client.search_runs([experiment], query, order_by=["attributes.start_time ASC"])
    first, other, again = (run.data.tags[WORK_TAG] for run in runs)
    assert first == again != other


def unchecked(**values: object) -> EvaluationRecipe:
    """What the recipe refuses already; a tokenizer, or a dataset, may still come to the same."""
    return EvaluationRecipe().model_copy(update=values)


def test_refuses_a_prompt_without_tokens(artifacts: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"evaluation.prompts: '' has no tokens"):
        run(artifacts, tmp_path / "evaluation", unchecked(prompts=("",)))
    assert not (tmp_path / "evaluation").exists()


def test_refuses_a_single_document(artifacts: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"1 document\(s\)"):
        run(artifacts, tmp_path / "evaluation", unchecked(max_documents=1))
    assert not (tmp_path / "evaluation").exists()


def test_a_student_that_is_its_teacher(artifacts: Path, tmp_path: Path) -> None:
    for name in ("dataset", "teacher"):
        (tmp_path / name).symlink_to(artifacts / name)
    everything = (0, 1, 2, 3)
    write_student(tmp_path / "student", tmp_path, everything)
    write_student(tmp_path / "distilled", tmp_path, everything)
    scalars = run(tmp_path, tmp_path / "evaluation")
    assert scalars["distilled/kl"] == 0
    assert scalars["distilled/top1_agreement"] == 1
    assert "kl_reduction" not in scalars
    report = (tmp_path / "evaluation" / REPORT).read_text()
    assert "KL to the teacher is 0.000, the same as before" in report
