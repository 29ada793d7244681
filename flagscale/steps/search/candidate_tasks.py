"""Part of distil-student: what a candidate of a search scores on the task that ranks."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from megatron.core.models.gpt import GPTModel

from flagscale.checkpoint import save_weights
from flagscale.errors import UserError
from flagscale.evaluation.tasks.finding import Tasks, load_tasks, tasks_folder
from flagscale.evaluation.tasks.harness import ask, scores
from flagscale.evaluation.tasks.heldout_passages import heldout_passages
from flagscale.evaluation.tasks.heldout_tasks import MOST_QUESTIONS, write_heldout_tasks
from flagscale.evaluation.tasks.scores import TaskScores, figure_names
from flagscale.execution.launch import is_first_rank
from flagscale.megatron.arguments import Arguments
from flagscale.megatron.shape import MODEL_JSON, QUANTIZERS, ModelShape
from flagscale.models.megatron import WEIGHTS, load_model
from flagscale.models.tokenizers import load_tokenizer
from flagscale.post_training.export import plain_student
from flagscale.recipe import TasksRecipe
from flagscale.recipe.tasks import HELDOUT_TASKS
from flagscale.train.sample_losses import SampleLosses

if TYPE_CHECKING:
    from lm_eval.api.model import LM


_CANDIDATE = "candidate"


def task_losses(
    tasks: TasksRecipe,
    chunks: Sequence[GPTModel],
    args: Arguments,
    dataset: Path,
    student: Path,
    folder: Path,
) -> SampleLosses:
    """Ask a candidate in training a task. All ranks call it, and nothing is trained after it.

    The task is asked of the weights as an artifact would have them, on the same ranks. Held-out
    tasks are made of the validation split: the test split is for the winner alone.

    Args:
        tasks: that are asked.
        chunks: of the model.
        args: that it was built with.
        dataset: a `dataset` artifact.
        student: the `student` artifact that it started from.
        folder: that all ranks see; what is needed meanwhile is made in it, and goes.

    Returns:
        Each metric of a task, as TASK:METRIC, the first one as TASK too -> number of the example ->
        what is missing of its score, and 1; where less is better, its score. Metrics without a
        value for each example are left out. Only on the first rank; elsewhere nothing.

    Raises:
        UserError: the task is not known, its data cannot be had, or it has no such metric.
    """
    scratch = folder / "asked"
    asked = _load(tasks, dataset, scratch)
    save_weights([plain_student(chunk) for chunk in chunks], scratch / WEIGHTS)
    if is_first_rank():
        for name in (MODEL_JSON, QUANTIZERS):
            if (student / name).exists():
                shutil.copy(student / name, scratch / name)
    torch.distributed.barrier()
    result = ask(_language_model(tasks, scratch, args, dataset), asked, tasks)
    torch.distributed.barrier()
    if not is_first_rank():
        return {}
    shutil.rmtree(scratch)
    found = scores(asked, {_CANDIDATE: result})
    losses: SampleLosses = {}
    for name, score in zip(figure_names(found), found, strict=True):
        if score.values:  # a task's first metric goes by both names
            losses |= dict.fromkeys((name, f"{score.task}:{score.metric}"), _losses(score))
    return losses


def _load(tasks: TasksRecipe, dataset: Path, scratch: Path) -> Tasks:
    heldout = scratch / "heldout"
    if is_first_rank():
        heldout.mkdir(parents=True)
        if set(tasks.names) & HELDOUT_TASKS.keys():
            tokenizer = load_tokenizer(dataset / "tokenizer")
            passages = heldout_passages(dataset, tokenizer, MOST_QUESTIONS, "validation")
            write_heldout_tasks(passages, heldout)
        tasks_folder(tasks, scratch)
    torch.distributed.barrier()
    return load_tasks(tasks, tasks_folder(tasks, scratch), heldout)


def _language_model(tasks: TasksRecipe, artifact: Path, args: Arguments, dataset: Path) -> LM:
    from flagscale.evaluation.tasks.language_models import MegatronLM

    shape = ModelShape.load(artifact)
    return MegatronLM(
        load_model(artifact, shape.max_position_embeddings, args.parallelism, args.params_dtype),
        load_tokenizer(dataset / "tokenizer"),
        max_length=shape.max_position_embeddings,
        batch_size=tasks.batch_size,
        can_cache=shape.architecture.spec is None,
    )


def _losses(score: TaskScores) -> dict[int, tuple[float, float]]:
    values = score.values[_CANDIDATE]
    missing = 1 - values if score.higher_is_better else values
    if len(missing) < 2:
        raise UserError(f"{score.task}: has {len(missing)} example(s), and a ranking needs 2")
    return {number: (float(value), 1.0) for number, value in enumerate(missing)}
