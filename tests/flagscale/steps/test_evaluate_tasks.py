"""evaluate-tasks: the figures are lm-eval's own, and belong to the models that were given."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from evaluated_students import write_student
from transformers import AutoModelForCausalLM, AutoTokenizer

from flagscale.artifacts import new_artifact, open_artifact
from flagscale.evaluation.tasks.scores import load_scores
from flagscale.recipe import EvaluationRecipe, LayoutRecipe, ModelsRecipe, TasksRecipe
from flagscale.steps.evaluate import evaluate
from flagscale.steps.evaluate_tasks import evaluate_tasks

LIMIT = 12
ANSWERS = """
task: count_on
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "{{context}}"
doc_to_target: "{{continuation}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 4}
num_fewshot: 1
fewshot_split: test
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""


@pytest.fixture(scope="module")
def evaluation(student: Path, artifacts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_student(folder / "distilled", artifacts, keep=(0, 3))
    evaluate(
        EvaluationRecipe(max_documents=3, max_document_tokens=32, bootstrap_samples=100),
        artifacts / "teacher",
        student,
        folder / "distilled",
        artifacts / "dataset",
        folder / "evaluation",
    )
    return folder / "evaluation"


@pytest.fixture(scope="module")
def exported(evaluation: Path, tiny_teacher: Path) -> Path:
    """The teacher without two of its layers."""
    parents = {"evaluation": open_artifact(evaluation, "evaluation")}
    with new_artifact(evaluation.parent / "export", "export", {}, parents) as staging:
        model = AutoModelForCausalLM.from_pretrained(tiny_teacher)
        model.model.layers = model.model.layers[:2]
        model.config.num_hidden_layers = 2
        model.save_pretrained(staging.path)
        AutoTokenizer.from_pretrained(tiny_teacher).save_pretrained(staging.path)
        staging.facts = {"format": "huggingface"}
    return evaluation.parent / "export"


@pytest.fixture(scope="module")
def own_task(evaluation: Path) -> str:
    data = evaluation.parent / "data.jsonl"
    rows = [{"context": f"{i} {i + 1}", "continuation": f" {i + 2}"} for i in range(10)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ANSWERS.replace("DATA", str(data))


@pytest.fixture(scope="module")
def tasks(own_task: str) -> TasksRecipe:
    return TasksRecipe(
        names=("heldout_cloze", "heldout_multiple_choice"),
        own=(own_task,),
        limit=LIMIT,
        batch_size=4,
        prompt_tokens=16,
        new_tokens=4,
    )


@pytest.fixture(scope="module")
def output(
    tasks: TasksRecipe, teacher: Path, dataset: Path, evaluation: Path, exported: Path
) -> Path:
    folder = evaluation.parent / "tasks"
    evaluate_tasks(tasks, teacher, dataset, evaluation, exported, folder)
    return folder


def command_line(
    model: Path, folder: Path, own: str, tmp_path: Path
) -> dict[str, dict[str, float]]:
    """The figures of lm-eval's own command line, asked for the same tasks."""
    include = tmp_path / "include"
    include.mkdir()
    (include / "own.yaml").write_text(own)
    for file in folder.iterdir():
        (include / file.name).write_text(file.read_text())
    subprocess.run(
        [
            *(sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu"),
            # Its cache of logits takes the wrong ones where two tasks ask of one text: a cloze of
            # the last word, and a choice whose right answer ends with it.
            *("--model_args", f"pretrained={model},dtype=float32,logits_cache=False"),
            *("--batch_size", "4"),
            *("--tasks", "heldout_cloze,heldout_multiple_choice,count_on"),
            *("--include_path", str(include), "--limit", str(LIMIT)),
            *("--output_path", str(tmp_path / "out.json")),
        ],
        cwd=include,
        env={**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"},
        check=True,
        capture_output=True,
    )
    (found,) = tmp_path.glob("out*.json")
    results: dict[str, dict[str, float]] = json.loads(found.read_text())["results"]
    return results


def test_figures_are_those_of_lm_evals_command_line(
    output: Path, exported: Path, own_task: str, tmp_path: Path
) -> None:
    expected = command_line(exported, output / "heldout", own_task, tmp_path)

    for score in load_scores(output):
        value, stderr = score.reported["distilled"]
        metric, _, filter_name = score.metric.partition(":")
        filter_name = filter_name or "none"
        assert math.isclose(value, expected[score.task][f"{metric},{filter_name}"], rel_tol=1e-6)
        if metric != "perplexity":  # resampled: by 1,000 draws here, by 100,000 there
            assert stderr == pytest.approx(expected[score.task][f"{metric}_stderr,{filter_name}"])
    assert {score.task for score in load_scores(output)} == set(expected)


def test_every_example_has_a_value_whose_mean_is_the_figure(output: Path) -> None:
    scores = load_scores(output)

    assert [(score.task, score.metric) for score in scores] == [
        ("heldout_cloze", "acc"),
        ("heldout_cloze", "perplexity"),
        ("heldout_multiple_choice", "acc"),
        ("heldout_multiple_choice", "acc_norm"),
        ("count_on", "exact_match"),
    ]
    for score in scores:
        if score.metric == "perplexity":
            assert not score.values
            continue
        for model, values_e in score.values.items():
            assert (
                len(values_e) == len(score.examples) == (10 if score.task == "count_on" else LIMIT)
            )
            assert np.isclose(values_e.mean(), score.reported[model][0])
    assert {model for score in scores for model in score.reported} == {"teacher", "distilled"}


def test_the_report_is_rendered_again_with_the_tasks(output: Path) -> None:
    page, short = ((output / name).read_text() for name in ("report.html", "summary.md"))
    assert "heldout_multiple_choice:acc_norm" in page
    assert "The student writes" in page
    assert "heldout\\_cloze" in short


def test_speed_and_memory_are_of_each_model(output: Path) -> None:
    found = json.loads((output / "generation.json").read_text())
    for model in ("teacher", "distilled"):
        (speed,) = found[model]
        assert (speed["engine"], speed["device"], speed["dtype"]) == (
            "transformers",
            "cpu",
            "float32",
        )
        assert speed["prefill_tokens_per_second"] > 0
        assert speed["decode_tokens_per_second"] > 0
        assert speed["peak_memory"] > 1e7
    held = open_artifact(output, "task-evaluation").peak_memory["host"][0]
    counted_late = 2**20  # bytes: each core tells the kernel of its pages some at a time
    assert held >= max(found[model][0]["peak_memory"] for model in found) - counted_late


def test_a_student_in_megatrons_format_is_asked_by_megatron_core(
    tasks: TasksRecipe, teacher: Path, dataset: Path, evaluation: Path, output: Path
) -> None:
    """The teacher itself, on two ranks: its answers are those that transformers gives."""
    parents = {"evaluation": open_artifact(evaluation, "evaluation")}
    folder = evaluation.parent / "megatron"
    with new_artifact(folder, "export", {}, parents) as staging:
        shutil.copytree(teacher, staging.path, dirs_exist_ok=True)
        (staging.path / "manifest.json").unlink()
        staging.facts = {"format": "megatron"}
    models = ModelsRecipe(parallelism=LayoutRecipe(tensor_model_parallel_size=2))
    again = evaluation.parent / "tasks of megatron"

    evaluate_tasks(tasks, teacher, dataset, evaluation, folder, again, models)

    for expected, found in zip(load_scores(output), load_scores(again), strict=True):
        assert found.examples == expected.examples
        value, _ = expected.reported["teacher"]
        assert found.reported["distilled"][0] == pytest.approx(value, rel=1e-4)
        assert found.reported["distilled"] == found.reported["teacher"]
        for values_e in found.values.values():
            assert values_e.tolist() == expected.values["teacher"].tolist()
