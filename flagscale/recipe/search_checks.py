"""Searches that their trainings could not hold, or whose ranking task nobody could be asked."""

from __future__ import annotations

from flagscale.recipe.distillation import DistillationRecipe
from flagscale.recipe.search import LOSSES, RungsRecipe
from flagscale.recipe.tasks import HELDOUT_TASKS, TasksRecipe, task_name
from flagscale.recipe.training import TrainingRecipe

_OF_NO_EXAMPLE = {"perplexity"}


def check_search(
    search: RungsRecipe,
    count: int,
    distillation: DistillationRecipe,
    training: TrainingRecipe,
    seq_length: int,
    tasks: TasksRecipe,
) -> None:
    """Refuse a search that its training could not hold.

    Args:
        search: the recipe's section.
        count: of its candidates.
        distillation: the recipe's section.
        training: the recipe's section.
        seq_length: tokens a sample.
        tasks: the recipe's section.

    Raises:
        ValueError: both values, and what would be right.
    """
    last = search.rungs[-1].end
    if last >= training.train_iters:
        raise ValueError(
            f"search.rungs: the last ends after steps={last}, but training.train_iters="
            f"{training.train_iters}: the winner is trained on to train_iters, which must be more"
        )
    if search.metric == "distillation_loss" and distillation.loss == "none":
        raise ValueError(
            "search.metric=distillation_loss with distillation.loss=none: nothing is distilled; "
            "set search.metric=lm_loss"
        )
    if search.task is not None:
        _check_task(search, tasks, training)
    shares = training.global_batch_size // training.micro_batch_size
    if search.samples % shares:
        raise ValueError(
            f"search.samples={search.samples} is not a multiple of the {shares} micro-batches of a "
            "training step, which data-parallel ranks share; take the next multiple"
        )
    slots = list(search.slots_of(count))
    tokens = search.steps_of(count, training.train_iters) * training.global_batch_size * seq_length
    if search.budget_tokens is not None and tokens > search.budget_tokens:
        raise ValueError(
            f"search.budget_tokens={search.budget_tokens:g}, but rungs of {slots} "
            f"candidates, and the winner's training to train_iters={training.train_iters}, are "
            f"{tokens:,} tokens; lower search.rungs' steps or keep, or have fewer candidates"
        )


def _check_task(search: RungsRecipe, tasks: TasksRecipe, training: TrainingRecipe) -> None:
    """Refuse a task that is not the recipe's, or that the training's ranks cannot be asked."""
    known = [*tasks.names, *map(task_name, tasks.own)]
    if search.task not in known:
        raise ValueError(
            f"search.metric={search.metric}: must be {', '.join(LOSSES)}, or a task of "
            f"tasks.names or tasks.own, which are {[*map(str, known)]}"
        )
    task, _, own = search.metric.partition(":")
    wanted = HELDOUT_TASKS.get(task)
    if wanted is not None and own and own not in {*wanted} - _OF_NO_EXAMPLE:
        raise ValueError(
            f"search.metric={search.metric}: its metrics are {', '.join(wanted)}, and of "
            f"{', '.join(_OF_NO_EXAMPLE)} there is no value for each example to rank by"
        )
    sizes = training.parallelism
    if sizes.context_parallel_size > 1 or sizes.virtual_pipeline_model_parallel_size:
        raise ValueError(
            f"search.metric={search.metric}: a task is asked on the training's ranks, and with "
            "training.parallelism.context_parallel_size or virtual_pipeline_model_parallel_size it "
            "cannot be; rank by distillation_loss, or leave these out"
        )
