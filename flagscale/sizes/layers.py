"""The step that measures the teacher's layers once, for all students that ask for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from flagscale.recipe import ParallelismRecipe
from flagscale.sizes import models
from flagscale.sizes.job import Job
from flagscale.sizes.layout import Layout
from flagscale.sizes.machine import PROCESS
from flagscale.sizes.steps import FORWARD_EFFICIENCY, StepPlan, measuring_flops

MEASURE_STEP = "measure-layers"


def measure_step(jobs: Sequence[Job], sizes: ParallelismRecipe) -> StepPlan:
    """measure-layers: each measurement once, as far as the student that most layers go for needs.

    Args:
        jobs: of all trainings, of which one or more measure layers.
        sizes: of the model steps' layout.
    """
    job, layout = jobs[0], Layout.of(sizes)
    teacher, machine = job.teacher.shape, job.models
    kept: dict[tuple[str, int, int], int] = {}  # fewest layers, by what decides on a measurement
    for one in jobs:
        student = one.recipe.student
        if student.measures_layers:
            asked = (student.layer_importance, student.measured_tokens, student.seed)
            kept[asked] = min(kept.get(asked, teacher.num_layers), one.student.num_layers)
    most = max(tokens for _, tokens, _ in kept)
    setup = replace(job.model_steps, measured_tokens=most)
    rank = max(
        (models.measure_layers(setup, layout, stage) for stage in range(layout.pipeline)),
        key=lambda parts: sum(parts.values()),
    )
    held = sum(rank.values()) if machine.device == "cpu" else 0
    seq_length = job.recipe.data.seq_length
    return StepPlan(
        step=MEASURE_STEP,
        machine=machine,
        layout=layout,
        rank=rank,
        host=layout.ranks * (PROCESS[machine.device] + held),
        artifact=0.0,  # a page of text
        most_stored=0.0,
        scratch=0.0,
        moved=2.0 * job.teacher_bytes,
        sent=0.0,
        flops=sum(
            measuring_flops(teacher, layers, tokens, seq_length)
            for (_, tokens, _), layers in kept.items()
        ),
        efficiency=FORWARD_EFFICIENCY,
    )
