"""Whether trainings run the teacher, or read what it was asked once: `teacher_outputs: auto`.

A live teacher runs forward on every sample that a training takes, beside the student. Kept outputs
cost that once for each sample, a step's start, and bytes that are written and read again. So they
pay where several trainings take the same samples, or one takes them several times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flagscale.recipe import ParallelismRecipe, Recipe
from flagscale.recipe.teacher_outputs import decided, met_by, unserved
from flagscale.sizes.codecs import bytes_per_token
from flagscale.sizes.job import Job
from flagscale.sizes.machine import Machine
from flagscale.sizes.outputs import asked_tokens, cache_step, read_tokens
from flagscale.sizes.steps import STORAGE_RATE, TRAINING_EFFICIENCY, gb
from flagscale.sizes.work import forward_flops

# Where no accelerator's speed is known: of a few CPU cores, or of an accelerator of some years ago.
_CPU_FLOPS, _SOME_ACCELERATOR = 1e11, 1e14
_START_SECONDS = 30.0  # of one more step: a pod, the teacher's weights
_WORTH_WHILE = 0.9  # of the live teacher's time: plans are no measurements


@dataclass(frozen=True)
class Choice:
    """What was decided.

    Attributes:
        cached: whether outputs are kept and read.
        why: for people.
    """

    cached: bool
    why: str

    def __str__(self) -> str:
        return f"{'cached' if self.cached else 'live'}: {self.why}"


def chosen(
    recipe: Recipe, jobs: Sequence[Job], choose: Callable[[Job], ParallelismRecipe | None]
) -> Choice:
    """What the recipe says, or where it leaves that to the plan, what is faster.

    Args:
        recipe: with its sweep or search.
        jobs: of its trainings.
        choose: gives the layout of a job's model steps.
    """
    asking = [job for job in jobs if job.recipe.distillation.loss != "none"]
    settings = {job.recipe.distillation.teacher_outputs for job in asking}
    if not asking:
        return Choice(False, "no training asks the teacher")
    if settings != {"auto"}:
        cached = "cached" in settings
        return Choice(cached, "distillation.teacher_outputs says so")
    reason = _impossible(recipe, asking)
    return Choice(False, reason) if reason else _faster(recipe, asking, choose)


def with_choice(recipe: Recipe, choice: Choice) -> Recipe:
    """The recipe, its sweep's variants included, with `auto` decided."""
    if recipe.distillation.teacher_outputs != "auto":
        return recipe
    choices = {"teacher_outputs": "cached" if choice.cached else "live"}
    distillation = recipe.distillation.model_copy(update=choices)
    return recipe.model_copy(update={"distillation": distillation})


def _impossible(recipe: Recipe, asking: Sequence[Job]) -> str | None:
    for job in asking:
        reason = unserved(job.recipe.distillation, job.recipe.teacher_outputs)
        if reason is not None:
            return reason
    try:
        met_by([decided(job.recipe, cached=True) for job in asking], recipe.teacher_outputs)
    except ValueError as error:
        return str(error)
    return None


def _faster(
    recipe: Recipe, asking: Sequence[Job], choose: Callable[[Job], ParallelismRecipe | None]
) -> Choice:
    """By the plan's arithmetic."""
    recipes = [decided(job.recipe, cached=True) for job in asking]
    first = asking[0]
    share = trained_share(recipe)
    tokens, asked = int(share * sum(map(read_tokens, recipes))), asked_tokens(recipes)
    live = share * sum(_forward(job, read_tokens(job.recipe)) for job in asking)
    shape, size = first.teacher.shape, first.training_setup.computation.dtype_bytes
    seq_length = first.recipe.data.seq_length
    a_token = bytes_per_token(first.recipe.teacher_outputs, shape, size, seq_length)
    step = cache_step(first, first.model_sizes(choose(first)), recipes)
    peak = step.layout.ranks * _flops(first.models)
    # On a CPU the same products take as long in one step as in another.
    share = step.efficiency if first.models.accelerators else TRAINING_EFFICIENCY
    once = step.flops / (peak * share) + step.moved / STORAGE_RATE + _START_SECONDS
    again = tokens * a_token / STORAGE_RATE
    if first.recipe.teacher_outputs.codec == "hidden":
        head = 2.0 * shape.padded_vocab_size * shape.hidden_size / forward_flops(shape, 1, 1)
        again += live * head
    cached = once + again
    told = (
        f"{_count(len(asking), 'training')} would ask the teacher for {_tokens(tokens)} tokens, "
        f"{_time(live)}; asked once for {_tokens(asked)}, kept ({_bytes(a_token * asked)}) and "
        f"read it takes {_time(cached)}"
    )
    return Choice(cached < _WORTH_WHILE * live, told)


def trained_share(recipe: Recipe) -> float:
    """The part of all trainings that is trained: a search stops most of them."""
    search = recipe.search
    if search is None:
        return 1.0
    whole = search.count * recipe.training.train_iters
    return search.steps_of(search.count, recipe.training.train_iters) / whole


def _forward(job: Job, tokens: int) -> float:
    """Seconds of the live teacher on all ranks of a training."""
    flops = forward_flops(job.teacher.shape, tokens, job.recipe.data.seq_length)
    ranks = job.training_layout.ranks
    return flops / (ranks * _flops(job.training) * TRAINING_EFFICIENCY)


def _flops(machine: Machine) -> float:
    known = machine.accelerator.flops if machine.accelerator else None
    return known or (_SOME_ACCELERATOR if machine.accelerators else _CPU_FLOPS)


def _count(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def _tokens(count: float) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(int(count))


def _bytes(count: float) -> str:
    return gb(count) if count >= 1e8 else f"{count / 1e6:.0f} MB"


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
