"""Section `search`: which students are candidates, and how they are narrowed down to one.

Successive halving (Jamieson and Talwalkar, arXiv 1502.07943): all candidates are trained a little,
the worse ones are dropped, the rest go on. A candidate's training is one training with one learning
rate schedule, `training`, which is stopped at the end of each rung and goes on in the next.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from flagscale.recipe.section import (
    NUMBER,
    Line,
    NonNegative,
    NonNegativeInt,
    Positive,
    PositiveInt,
    Ranks,
    Section,
)
from flagscale.recipe.sweep import check_vary
from flagscale.recipe.tasks import HELDOUT_TASKS, TasksRecipe, task_name

MOST_CANDIDATES = 64
_MOST_RUNGS = 8

LOSSES = {"distillation_loss": "logits distillation loss", "lm_loss": "lm loss"}  # as reported
Metric = Annotated[str, Field(max_length=200, pattern=r"^[^\s*?\[\]/]+$")]


class CandidatesRecipe(Section):
    """Students that differ in some fields."""

    name: Line | None = Field(None, description="What they are called; default: what they vary")
    vary: dict[str, tuple[Any, ...]] = Field(
        description="student.field: [values]; every combination is a candidate"
    )

    @model_validator(mode="after")
    def _check(self) -> CandidatesRecipe:
        check_vary(self.vary, ("student",))
        return self

    @property
    def count(self) -> int:
        """How many they are."""
        return math.prod(len(values) for values in self.vary.values())


class RungRecipe(Section):
    """How long candidates are trained before they are ranked, and how many of them go on."""

    steps: PositiveInt | None = Field(
        None, description="Optimiser steps since the beginning of the training"
    )
    tokens: Annotated[Positive, Field(ge=1, le=1e15)] | None = Field(
        None,
        description="Instead of steps: tokens, in as many steps of training.global_batch_size x "
        "data.seq_length as hold them",
    )
    keep: Annotated[float, Field(gt=0, le=1), NUMBER] = Field(
        0.5, description="Share of this rung's candidates that goes on, at most; rounded up"
    )

    @property
    def end(self) -> int:
        """The step at which it ends."""
        assert self.steps is not None, "the recipe says tokens in steps (`in_steps`)"
        return self.steps

    @model_validator(mode="after")
    def _check(self) -> RungRecipe:
        if (self.steps is None) == (self.tokens is None):
            raise ValueError(
                f"steps={self.steps} and tokens={self.tokens}: a rung has one of the two"
            )
        return self


class RungsRecipe(Section):
    """How candidates, whichever they are, are narrowed down to one."""

    rungs: tuple[RungRecipe, ...] = Field(description="Of rising steps; after the last one is left")
    metric: Metric = Field(
        "distillation_loss",
        description="What ranks, held out: distillation_loss: the recipe's divergence from the "
        "teacher, by default the KL; lm_loss: of the text; or a task of tasks.names, as TASK or "
        "TASK:METRIC, which heldout tasks ask of the validation split",
        examples=["heldout_multiple_choice"],
    )
    samples: Annotated[PositiveInt, Field(ge=2)] = Field(
        64,
        description="Samples of the validation split that candidates are ranked on; a task has its "
        "own examples, tasks.limit of them",
    )
    bootstrap_samples: Annotated[PositiveInt, Field(ge=100, le=10**6)] = Field(
        1000, description="Resamples of them for the intervals"
    )
    confidence: Annotated[Positive, Field(lt=1)] = Field(0.95, description="Mass of the intervals")
    margin: NonNegative = Field(
        0.5,
        description="A candidate is dropped, though there is room, if it is surely worse than the "
        "best by more than this share of the best's loss: what training may still make up for",
    )
    parallelism: Ranks = Field(
        2, description="Candidates at a time, on a cluster; this machine takes one after another"
    )
    budget_tokens: Annotated[Positive, Field(ge=1, le=1e15)] | None = Field(
        None, description="Most tokens that all trainings together may see; default: no limit"
    )
    budget_gpu_hours: Positive | None = Field(
        None, description="Most hours of accelerators, by the planner's estimate; default: no limit"
    )

    @property
    def task(self) -> str | None:
        """The task that ranks; None where a loss does."""
        return None if self.metric in LOSSES else self.metric.partition(":")[0]

    def slots_of(self, count: int) -> tuple[int, ...]:
        """How many of so many candidates each rung trains, at most."""
        found = [count]
        for rung in self.rungs[:-1]:
            found.append(max(1, math.ceil(round(rung.keep * found[-1], 9))))
        return tuple(found)

    def in_steps(self, tokens_a_step: int) -> Self:
        """The same with every rung's end in steps.

        Args:
            tokens_a_step: of the training.
        """
        if all(rung.tokens is None for rung in self.rungs):
            return self
        rungs = [
            {
                "steps": rung.steps or math.ceil((rung.tokens or 0) / tokens_a_step),
                "keep": rung.keep,
            }
            for rung in self.rungs
        ]
        return self.model_validate({**self.model_dump(), "rungs": rungs})

    def steps_of(self, count: int, train_iters: int) -> int:
        """Optimiser steps of all trainings together, at most: of the rungs and of the winner."""
        ends = [rung.end for rung in self.rungs]
        lengths = [end - start for start, end in zip((0, *ends), ends, strict=False)]
        slots = self.slots_of(count)
        trained = sum(n * length for n, length in zip(slots, lengths, strict=True))
        return trained + train_iters - ends[-1]

    @model_validator(mode="after")
    def _check_rungs(self) -> RungsRecipe:
        if not self.rungs:
            raise ValueError("rungs=[]: needs at least one")
        for unit in ("steps", "tokens"):
            ends = [getattr(rung, unit) for rung in self.rungs]
            given = [end for end in ends if end is not None]
            if given and len(given) < len(ends):
                raise ValueError(f"rungs: {unit}={ends}: all end after steps, or all after tokens")
            if given != sorted(set(given)) or len(ends) > _MOST_RUNGS:
                raise ValueError(
                    f"rungs: {unit}={given} must rise from rung to rung, in at most {_MOST_RUNGS} "
                    "rungs"
                )
        if self.rungs[-1].keep != RungRecipe.model_fields["keep"].default:
            raise ValueError(
                f"rungs: the last has keep={self.rungs[-1].keep}, which has no effect: one "
                "candidate is left after it; leave it out"
            )
        return self


class SearchRecipe(RungsRecipe):
    """Candidates, rungs, and what decides between them."""

    candidates: tuple[CandidatesRecipe, ...] = Field(description="Students to choose from")

    @property
    def count(self) -> int:
        """How many candidates there are."""
        return sum(candidates.count for candidates in self.candidates)

    @model_validator(mode="after")
    def _check_candidates(self) -> SearchRecipe:
        if not 2 <= self.count <= MOST_CANDIDATES:
            raise ValueError(
                f"candidates: make {self.count}; a search needs at least 2 and at most "
                f"{MOST_CANDIDATES}"
            )
        return self


class RankingRecipe(Section):
    """What decides at the end of one rung; rank-candidates is given it."""

    rung: PositiveInt = Field(description="From 1")
    slots: PositiveInt = Field(description="How many candidates go on at most")
    next_step: NonNegativeInt = Field(
        0, description="Optimiser steps at the end of the next rung; 0: this is the last one"
    )
    bootstrap_samples: PositiveInt = Field(description="As in `search`")
    confidence: Positive = Field(description="As in `search`")
    margin: NonNegative = Field(description="As in `search`")


class OfManyRecipe(Section):
    """What the training of one of many students is given besides; by default it is the only one."""

    record_failure: bool = Field(
        False, description="A failure is written into the output, and does not end the run"
    )
    until_step: NonNegativeInt = Field(0, description="Of a search: its rung's end; 0: train_iters")
    samples: NonNegativeInt = Field(0, description="Of a search: held-out ones to measure on")
    tasks: TasksRecipe = Field(
        TasksRecipe(), description="Of a search that a task ranks: what is asked at a rung's end"
    )


def ranking_metrics(search: RungsRecipe) -> tuple[str, ...]:
    """What its candidates are measured by, whichever of them ranks."""
    return tuple(dict.fromkeys((*LOSSES, search.metric)))


def ranking_tasks(search: RungsRecipe, tasks: TasksRecipe) -> TasksRecipe:
    """What is asked at the end of a rung: the task that ranks, as the recipe asks it.

    Args:
        search: the recipe's section.
        tasks: the recipe's section.
    """
    if search.task is None:
        return TasksRecipe()
    own = tuple(text for text in tasks.own if task_name(text) == search.task)
    names = () if own else (search.task,)
    folder = tasks.include_path if set(names) - HELDOUT_TASKS.keys() else None
    return tasks.model_copy(update={"names": names, "own": own, "include_path": folder})
