"""evaluate-tasks: lm-eval's tasks, asked of the teacher and the exported student.

The teacher is asked with the weights that the student was distilled from, the student as it is
shipped. Both are asked in the same way: in the format `huggingface` as transformers' models, in
this process; in the format `megatron` as Megatron-Core's, on the ranks of the model steps.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from flagscale.artifacts import Manifest, Staging, new_artifact, open_artifact, write_json
from flagscale.errors import UserError
from flagscale.evaluation import REPORT, SUMMARY
from flagscale.evaluation.fidelity import TEACHER
from flagscale.evaluation.figures import AFTER
from flagscale.evaluation.generation.speed import Speed
from flagscale.evaluation.report.data import ReportData
from flagscale.evaluation.report.page import render
from flagscale.evaluation.report.summary import summary_markdown
from flagscale.evaluation.report.verdict import verdict
from flagscale.evaluation.tasks.figures import score_figures, speed_figures
from flagscale.evaluation.tasks.finding import Tasks, check_installed, load_tasks, tasks_folder
from flagscale.evaluation.tasks.harness import scores
from flagscale.evaluation.tasks.heldout_passages import heldout_passages
from flagscale.evaluation.tasks.heldout_tasks import MOST_QUESTIONS, write_heldout_tasks
from flagscale.evaluation.tasks.models import Questions, ask_folder, ask_megatron
from flagscale.evaluation.tasks.scores import (
    KIND,
    PER_EXAMPLE,
    TASKS,
    TaskScores,
    save_scores,
)
from flagscale.execution.launch import call_on_ranks, is_first_rank
from flagscale.megatron import platform
from flagscale.megatron.peak_memory import own_peak_memory
from flagscale.megatron.plain_fp32 import plain_fp32
from flagscale.megatron.shape import ModelShape
from flagscale.models.hf_artifact import write_hf_folder
from flagscale.models.tokenizers import load_tokenizer
from flagscale.recipe import ModelsRecipe, ParallelismRecipe, TasksRecipe
from flagscale.recipe.tasks import HELDOUT_TASKS
from flagscale.steps.on_ranks import tracked, written
from flagscale.steps.recording import show_models
from flagscale.tracking import Split, StepRun

logger = logging.getLogger(__name__)

GENERATION = "generation.json"
_HELDOUT = "heldout"  # folder of the tasks that were made of the test split
_KINDS = {
    "teacher": "teacher",
    "dataset": "dataset",
    "evaluation": "evaluation",
    "exported": "export",
}
_PARENTS = {"evaluation": ("teacher", "dataset"), "exported": ("evaluation",)}


class Paths(NamedTuple):
    """The arguments of `evaluate_tasks` that are places, and one for what is needed meanwhile."""

    teacher: Path
    dataset: Path
    evaluation: Path
    exported: Path
    output: Path
    scratch: Path


def evaluate_tasks(
    tasks: TasksRecipe,
    teacher: Path,
    dataset: Path,
    evaluation: Path,
    exported: Path,
    output: Path,
    models: ModelsRecipe = ModelsRecipe(),
) -> dict[str, float]:
    """Ask the teacher and the exported student all tasks, and measure how fast they generate.

    Args:
        tasks: the recipe's section.
        teacher: a `teacher` artifact.
        dataset: the `dataset` artifact, of whose test split the held-out tasks are made.
        evaluation: the `evaluation` artifact of the student.
        exported: the `export` artifact of it.
        output: folder of the `task-evaluation` artifact: tasks.json and per_example.jsonl, which
            `flagscale.evaluation.tasks.scores.load_scores` reads, generation.json, evaluate's
            report with all that, and `heldout/`, which lm-eval's own command line can ask too.
        models: how the model steps are spread over processes.

    Returns:
        `<model>/<task>` for a task's first metric, `<model>/<task>:<metric>` for the others, of
        the tasks that were asked for by name; and for each model `prefill_tokens_per_second`,
        `decode_tokens_per_second` and `generation_peak_memory`, bytes.

    Raises:
        UserError: the artifacts do not belong together, lm-eval is not installed, a task is not
            known, or its data cannot be had.
    """
    check_installed()
    with tempfile.TemporaryDirectory(prefix="flagscale-tasks-") as scratch:
        paths = Paths(teacher, dataset, evaluation, exported, output, Path(scratch))
        is_megatron = _is_megatron(_open(paths, check_files=False))
        ReportData.load(evaluation)
        _check_length(tasks, paths)
        return call_on_ranks(
            "evaluate-tasks",
            evaluate_tasks_on_rank,
            models.processes if is_megatron else 1,
            tasks=tasks,
            paths=paths,
            models=models,
        )


def evaluate_tasks_on_rank(
    tasks: TasksRecipe, paths: Paths, models: ModelsRecipe
) -> dict[str, float]:
    """The work of one rank, or of the only process; see `evaluate_tasks`."""
    parents = _open(paths, check_files=is_first_rank())
    recipe = {"tasks": tasks.model_dump(mode="json")}
    sizes = models.sizes if _is_megatron(parents) else None
    figures: dict[str, float] = {}
    with (
        tracked("evaluate-tasks", recipe, parents=parents) as run,
        _written(paths.output, recipe, parents, run, sizes) as staging,
    ):
        if set(tasks.names) & HELDOUT_TASKS.keys():
            run.log_inputs([Split.of(parents["dataset"], "test")], ["tasks"])
        asked = _load(tasks, paths)
        found, speeds = _ask_models(tasks, asked, paths, sizes)
        if is_first_rank():
            figures = score_figures(found, asked.asked) | speed_figures(speeds)
            save_scores(staging.path, found)
            rows = {model: [asdict(speed) for speed in row] for model, row in speeds.items()}
            write_json(staging.path / GENERATION, rows)
            _write_report(staging.path, paths.evaluation, found, speeds)
            if set(tasks.names) & HELDOUT_TASKS.keys():
                shutil.copytree(
                    paths.scratch / _HELDOUT,
                    staging.path / _HELDOUT,
                    ignore=shutil.ignore_patterns("cache"),
                )
            staging.tokenizer_hash = parents["dataset"].tokenizer_hash
            staging.facts = {
                "figures": figures,
                "generation": rows,
                "lm_eval": version("lm-eval"),
                "versions": {name: task.VERSION for name, task in asked.tasks.items()},
            }
            points = run.log_metrics(score_figures(found) | speed_figures(speeds))
            show_models(run, points, {TEACHER: parents["teacher"], AFTER: parents["exported"]})
            for name in (TASKS, PER_EXAMPLE, GENERATION, REPORT):
                run.log_artifact(staging.path / name)
    return figures


@contextmanager
def _written(
    output: Path,
    recipe: dict[str, Any],
    parents: dict[str, Manifest],
    run: StepRun,
    sizes: ParallelismRecipe | None,
) -> Iterator[Staging]:
    """The artifact; with Megatron-Core's runtime where its models are asked.

    transformers' models need none, and on a CPU its adapter would make each of their operations
    slower: their speed is measured.
    """
    if sizes is not None:
        with (
            platform.runtime(parallelism=sizes),
            written(output, KIND, recipe, parents, run) as staging,
        ):
            yield staging
        return
    with plain_fp32(), new_artifact(output, KIND, recipe, parents, run.log_manifest) as staging:
        yield staging
        staging.peak_memory = {place: [held] for place, held in own_peak_memory().items()}


def _open(paths: Paths, *, check_files: bool) -> dict[str, Manifest]:
    """Check that the artifacts were made from one another, and that they are whole."""
    manifests = {
        name: open_artifact(getattr(paths, name), kind, check_files)
        for name, kind in _KINDS.items()
    }
    for name, parents in _PARENTS.items():
        for parent in parents:
            if manifests[name].parents.get(parent) != manifests[parent].digest:
                raise UserError(
                    f"{getattr(paths, name)}: was made from another {parent} than "
                    f"{getattr(paths, parent)}; give the artifacts of one run"
                )
    return manifests


def _is_megatron(manifests: Mapping[str, Manifest]) -> bool:
    return bool(manifests["exported"].facts["format"] == "megatron")


def _check_length(tasks: TasksRecipe, paths: Paths) -> None:
    longest = ModelShape.load(paths.teacher).max_position_embeddings
    if tasks.prompt_tokens + tasks.new_tokens > longest:
        raise UserError(
            f"tasks.prompt_tokens={tasks.prompt_tokens} and new_tokens={tasks.new_tokens}: the "
            f"models see {longest} tokens; set them lower"
        )


def _load(tasks: TasksRecipe, paths: Paths) -> Tasks:
    """All tasks with their data: before a model is loaded, for that may fail."""
    heldout = paths.scratch / _HELDOUT
    if is_first_rank():
        heldout.mkdir()
        if set(tasks.names) & HELDOUT_TASKS.keys():
            tokenizer = load_tokenizer(paths.dataset / "tokenizer")
            count = min(tasks.limit or MOST_QUESTIONS, MOST_QUESTIONS)
            passages = heldout_passages(paths.dataset, tokenizer, MOST_QUESTIONS)
            write_heldout_tasks(passages, heldout)
            logger.info("%d of %d held-out passages are asked", count, len(passages))
        tasks_folder(tasks, paths.scratch)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    return load_tasks(tasks, tasks_folder(tasks, paths.scratch), heldout)


def _ask_models(
    tasks: TasksRecipe, asked: Tasks, paths: Paths, sizes: ParallelismRecipe | None
) -> tuple[tuple[TaskScores, ...], dict[str, list[Speed]]]:
    """One model after the other; the scores are the first rank's.

    Args:
        tasks: the recipe's section.
        asked: the tasks.
        paths: of the models.
        sizes: of Megatron-Core's models; None: transformers' are asked.
    """
    questions = Questions(tasks, asked, paths.dataset)
    results: dict[str, dict[str, Any]] = {}
    speeds: dict[str, list[Speed]] = {}
    for name, artifact in ((TEACHER, paths.teacher), (AFTER, paths.exported)):
        logger.info("asking the %s model %s", name, ", ".join(asked.asked))
        if sizes is not None:
            results[name], speeds[name] = ask_megatron(questions, artifact, sizes)
        else:
            folder = artifact if name == AFTER else _teacher_folder(paths)
            results[name], speeds[name] = ask_folder(questions, folder)
    return (scores(asked, results) if is_first_rank() else ()), speeds


def _teacher_folder(paths: Paths) -> Path:
    """The teacher as a Hugging Face folder, with the very weights that the student learnt from."""
    folder = paths.scratch / "teacher"
    folder.mkdir()
    write_hf_folder(paths.teacher, folder)
    return folder


def _write_report(
    folder: Path, evaluation: Path, found: Sequence[TaskScores], speeds: Mapping[str, list[Speed]]
) -> None:
    """Evaluate's page again, with what is known now."""
    data = replace(ReportData.load(evaluation), generation=speeds)
    (folder / REPORT).write_text(render(data, found), encoding="utf-8")
    (folder / SUMMARY).write_text(summary_markdown(data, found), encoding="utf-8")
    logger.info("%s", verdict(data, found))
