"""A plan as text for people, and as JSON for programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from flagscale.sizes.job import Job
from flagscale.sizes.parameters import parameters
from flagscale.sizes.steps import FORWARD_EFFICIENCY, STORAGE_RATE, TRAINING_EFFICIENCY, StepPlan
from pipelines.planning import Plan

_GB = 1e9
_PARTS = ("weights", "gradients", "optimiser", "teacher", "activations", "logits", "save")


def as_text(plan: Plan, where: str) -> str:
    """The plan as tables.

    Args:
        plan: of a recipe, or of one variant.
        where: the platform's name.
    """
    job = plan.job
    name = f"{job.recipe.name}, {plan.name}" if plan.name else job.recipe.name
    paragraphs = [
        f"{name} on {where}\n"
        f"  teacher {job.recipe.teacher.source}: {_model(job.teacher.shape)}, "
        f"{8 * job.teacher.dtype_bytes}-bit ({job.teacher.origin})\n"
        f"  student{_source(job)}" + f"\n  teacher outputs {plan.choice}",
        _table([_MEMORY, *(_memory(step) for step in plan.steps)]),
        _table([_RANK, *(_rank(step) for step in plan.steps)]),
        _table([_WORK, *(_work(step) for step in plan.steps), _total(plan.steps)]),
        _assumptions(plan),
    ]
    verdict = "everything fits"
    if plan.problems:
        verdict = "does not fit:\n  " + "\n  ".join(plan.problems)
    return "\n\n".join([*paragraphs, verdict])


def as_json(plan: Plan, where: str) -> dict[str, Any]:
    """The plan in bytes, seconds and numbers.

    Args:
        plan: of a recipe, or of one variant.
        where: the platform's name.
    """
    job = plan.job
    figures = ("rank_bytes", "seconds", "gpu_hours", "price", "lacks")
    return {
        "recipe": job.recipe.name,
        "variant": plan.name,
        "platform": where,
        "teacher": {
            "source": job.recipe.teacher.source,
            "parameters": parameters(job.teacher.shape).total,
            "origin": job.teacher.origin,
        },
        "student": {
            "parameters": parameters(job.student).total,
            "num_layers": job.student.num_layers,
            "hidden_size": job.student.hidden_size,
        }
        | ({"source": job.recipe.student.source} if job.student_source else {}),
        "steps": [
            asdict(step) | {name: getattr(step, name) for name in figures} for step in plan.steps
        ],
        "teacher_outputs": asdict(plan.choice),
        "problems": plan.problems,
    }


_MEMORY = ("step", "pods", "layout", "a rank", "of", "a pod's host", "of", "fits")
_RANK = ("a rank, GB", *_PARTS, "all")
_WORK = ("step", "stays", "for a while", "pod's disk", "moved", "a rank sends", "FLOPs", "time",
         "GPU hours", "price")  # fmt: skip


def _source(job: Job) -> str:
    """The student's size, and where a model of its own comes from."""
    source = job.student_source
    if source is None:
        return f": {_model(job.student)}{_narrower(job)}"
    name = job.recipe.student.source
    return f" {name}: {_model(job.student)}, {8 * source.dtype_bytes}-bit ({source.origin})"


def _model(shape: Any) -> str:  # noqa: ANN401 - a ModelShape
    count = parameters(shape).total
    size = f"{count / 1e9:.2f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"
    return f"{size} parameters, {shape.num_layers} layers"


def _narrower(job: Job) -> str:
    """What is pruned of the teacher's widths: a target may have chosen it."""
    from flagscale.models.cut_shape import cut_widths

    if not job.recipe.student.cuts_width:
        return ""
    cut = cut_widths(job.teacher.shape, job.student)
    return "".join(f", {name} {size}" for name, size in cut.items())


def _memory(step: StepPlan) -> tuple[str, ...]:
    machine = step.machine
    pods = f"{machine.pods} x {machine.accelerators} accelerators"
    room = "?" if machine.room is None else _gb(machine.room)
    if not machine.accelerators:
        pods, room = f"{machine.pods} x CPU", "host"
    memory = "?" if machine.memory is None else _gb(machine.memory)
    verdict = "no" if step.lacks else "yes"
    if machine.accelerators and machine.room is None and not step.lacks:
        verdict = "not checked: no accelerator"
    used = (_gb(step.rank_bytes), room, _gb(step.host), memory)
    return (step.step, pods, str(step.layout), *used, verdict)


def _rank(step: StepPlan) -> tuple[str, ...]:
    parts = [f"{step.rank[name] / _GB:.1f}" if step.rank.get(name) else "" for name in _PARTS]
    return (step.step, *parts, f"{step.rank_bytes / _GB:.1f}")


def _work(step: StepPlan) -> tuple[str, ...]:
    stored = [_gb(count) if count else "" for count in (step.artifact, step.most_stored)]
    return (
        step.step,
        *stored,
        _gb(step.scratch) if step.scratch else "",
        _gb(step.moved),
        _gb(step.sent) if step.sent else "",
        _operations([step]),
        _time(step.seconds),
        _number(step.gpu_hours),
        _number(step.price),
    )


def _operations(steps: Sequence[StepPlan]) -> str:
    """Every step runs a model: 0 is of one whose text the recipe does not bound, evaluate's."""
    if not all(step.flops for step in steps):
        return "?"
    return f"{sum(step.flops for step in steps):.1e}"


def _total(steps: Sequence[StepPlan]) -> tuple[str, ...]:
    """Of the whole pipeline: artifacts stay side by side, checkpoints go."""

    def sum_of(name: str) -> float | None:
        values = [getattr(step, name) for step in steps]
        return None if any(value is None for value in values) else sum(values)

    return (
        "all",
        _gb(sum(step.artifact for step in steps)),
        _gb(max(step.most_stored for step in steps)),
        _gb(max(step.scratch for step in steps)),
        _gb(sum(step.moved for step in steps)),
        "",
        _operations(steps),
        _time(sum_of("seconds")),
        _number(sum_of("gpu_hours")),
        _number(sum_of("price")),
    )


def _assumptions(plan: Plan) -> str:
    lines = [
        "Arithmetic, not a measurement; docs/sizes.md says how good it is. `prepare-data` holds no "
        "model: it is not in the tables, nor is its dataset.",
    ]
    if any(step.machine.accelerators for step in plan.steps):
        lines.append(
            f"Time: {TRAINING_EFFICIENCY:.0%} of the accelerators' bf16 peak in training, "
            f"{FORWARD_EFFICIENCY:.0%} in the other steps; {STORAGE_RATE / 1e9:g} GB/s to the "
            "volume."
        )
    return "\n".join(lines)


def _gb(count: float) -> str:
    if count < 0.95e8:
        return f"{count / 1e6:.0f} MB"
    return f"{count / _GB:.1f} GB" if count < 99.95e9 else f"{count / _GB:,.0f} GB"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:,.2f}"


def indented(rows: Sequence[Sequence[str]]) -> str:
    """A table under a sentence."""
    return "\n".join(f"  {line}" for line in _table(rows).splitlines())


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])
