"""What a recipe needs of a platform: its steps' sizes, the layout that is chosen, what is refused.

`python -m pipelines plan` shows it; `compile`, `submit` and `run` refuse what does not fit.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from kubernetes.utils import parse_quantity

from flagscale.errors import UserError
from flagscale.recipe import ParallelismRecipe, Recipe
from flagscale.recipe.combinations import check_width_pruning
from flagscale.recipe.model_steps import LayoutRecipe, ModelsRecipe
from flagscale.recipe.teacher_outputs import decided
from flagscale.sizes.asking import ASK_STEP, ask_step
from flagscale.sizes.fitting import layouts, smallest_layout
from flagscale.sizes.job import Job
from flagscale.sizes.layers import MEASURE_STEP, measure_step
from flagscale.sizes.layout import Layout
from flagscale.sizes.machine import ACCELERATORS, Accelerator, Machine
from flagscale.sizes.outputs import CACHE_STEP, cache_step
from flagscale.sizes.steps import MODEL_STEPS, StepPlan, model_step, training_step
from flagscale.sizes.teacher import Teacher, UnknownSizeError, teacher_of
from pipelines.platform import Platform
from pipelines.pods import Pods
from pipelines.search_budget import check_budget
from pipelines.teacher_outputs import Choice, chosen, with_choice

if TYPE_CHECKING:
    from flagscale.megatron.shape import ModelShape

_MOST_RANKS = 64  # of a layout that is named for what does not fit
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True)
class Plan:
    """A recipe's steps on a platform.

    Attributes:
        job: with the models and machines that they are for.
        sizes: of the model steps' layout.
        steps: in their order.
        choice: whether its training reads teacher outputs, and why.
        name: of the variant; None without a sweep.
    """

    job: Job
    sizes: ParallelismRecipe
    steps: tuple[StepPlan, ...]
    choice: Choice
    name: str | None = None

    @property
    def problems(self) -> list[str]:
        """What does not fit, each with what would."""
        of = f"{self.name}: " if self.name else ""
        return [
            f"{of}{step.step}: {step.lacks}; {nearest(self.job, step)}"
            for step in self.steps
            if step.lacks
        ]


def plans(recipe: Recipe, platform: Platform | None, on_cpu: bool = False) -> list[Plan]:
    """The recipe's plan, or one of each variant of its sweep or candidate of its search.

    Args:
        recipe: resolved.
        platform: None: this machine.
        on_cpu: leave its accelerators alone.

    Raises:
        UnknownSizeError: how large the models are cannot be told here.
        UserError: the student does not fit the teacher, or one of them cannot be divided as a
            layout says.
    """
    teacher = teacher_of(recipe.teacher)
    here = this_machine(on_cpu) if platform is None else Machine(None)

    def job_of(one: Recipe) -> Job:
        machines = (here, here) if platform is None else _machines(one, platform)
        return _job(one, teacher, machines)

    variants = recipe.variants
    jobs: dict[str | None, Job] = {}
    if not variants:
        jobs[None] = job_of(recipe)
    for variant in variants:
        try:
            jobs[variant.name] = job_of(variant.recipe)
        except UserError as error:
            raise UserError(f"{recipe.varied} {variant.name!r}: {error}") from error
    if recipe.measures_layers_once:
        jobs = {name: replace(job, layers_measured=True) for name, job in jobs.items()}
    choice = chosen(recipe, list(jobs.values()), choose)
    decided_jobs = [
        replace(job, recipe=decided(job.recipe, choice.cached)) for job in jobs.values()
    ]
    return [
        _plan(job, name, choice, decided_jobs) for name, job in zip(jobs, decided_jobs, strict=True)
    ]


def check_run(recipes: Iterable[Recipe]) -> None:
    """Refuse values of one run that its models cannot be divided by.

    Args:
        recipes: without a sweep, with the run's values; several: a sweep's variants.

    Raises:
        UserError: as `plans`.
    """
    for recipe in recipes:
        with contextlib.suppress(UnknownSizeError):
            _student(recipe, teacher_of(recipe.teacher))


def fitted(recipe: Recipe, platform: Platform | None, on_cpu: bool = False) -> tuple[Recipe, str]:
    """The recipe with the layout of its model steps, once it is known that everything fits.

    Args:
        recipe: resolved.
        platform: None: this machine.
        on_cpu: leave its accelerators alone.

    Returns:
        The recipe, in which `distillation.teacher_outputs=auto` is decided too, and lines for
        people: what was not checked, or what was decided, and why.

    Raises:
        UserError: what does not fit, with the number, and the nearest layout that does; or what a
            layout does not divide.
    """
    try:
        found = plans(recipe, platform, on_cpu)
    except UnknownSizeError as error:
        recipe = with_choice(recipe, Choice(False, "sizes are not known"))
        return recipe, f"note: not checked whether teacher and student fit: {error}\n"
    problems = [problem for plan in found for problem in plan.problems]
    if problems:
        where = "this machine" if platform is None else "the platform"
        raise UserError(
            f"recipe {recipe.name} does not fit {where}:\n  " + "\n  ".join(problems) + "\n"
            "`python -m pipelines plan` shows what each step needs"
        )
    check_budget(recipe, [plan.steps for plan in found])
    choice, note = found[0].choice, ""
    if recipe.distillation.teacher_outputs == "auto" and choice.cached:
        note = f"note: distillation.teacher_outputs=auto: {choice}\n"
    recipe = with_choice(recipe, choice)
    if recipe.models.parallelism is not None:
        return recipe, note
    largest = max((plan.sizes for plan in found), key=lambda sizes: sizes.smallest_world_size)
    if largest.smallest_world_size == 1:
        return recipe, note
    given = {name: getattr(largest, name) for name in LayoutRecipe.model_fields}
    models = ModelsRecipe(parallelism=LayoutRecipe(**given))
    return recipe.model_copy(update={"models": models}), note


def nearest(job: Job, step: StepPlan) -> str:
    """What to change so that a step has room."""
    if step.step == "distil-student":
        return _nearest_training(job)
    if step.machine.device == "cpu":
        return f"give its pod {step.host / 2**30:.0f}Gi of memory"
    roomy = replace(job, models=replace(job.models, accelerators=_MOST_RANKS, memory=None))
    sizes = choose(roomy)
    if sizes is None:
        return f"no layout of up to {_MOST_RANKS} accelerators has room"
    wanted = _model_step(roomy, step.step, sizes)
    count = sizes.smallest_world_size
    return (
        f"the smallest layout that fits is {wanted.layout}: accelerator_count: {count} for the "
        f"model steps, and at least {wanted.host / 2**30:.0f}Gi of memory"
    )


def _job(recipe: Recipe, teacher: Teacher, machines: tuple[Machine, Machine]) -> Job:
    student, student_source = _student(recipe, teacher)
    try:
        recipe.check_models(machines[0].accelerators)
        recipe.check_accelerators(machines[1].accelerators)
    except ValueError as error:
        raise UserError(str(error)) from error
    for field in ("spec", "heterogeneous_layers_config"):
        if getattr(student.architecture, field) is not None:
            raise UnknownSizeError(f"student.architecture.{field} may be of any size")
    return Job(recipe, teacher, student, *machines, student_source)


def _plan(job: Job, name: str | None, choice: Choice, jobs: list[Job]) -> Plan:
    sizes = job.model_sizes(choose(job))
    steps = [model_step(job, step, sizes) for step in MODEL_STEPS]
    steps.insert(2, training_step(job))
    # The plan of each variant has the steps that it shares with others.
    if job.layers_measured:
        steps.insert(1, measure_step(jobs, sizes))
    if job.reads_outputs:
        steps.insert(1, cache_step(job, sizes, [one.recipe for one in jobs]))
    if job.recipe.tasks.is_asked:
        steps.append(ask_step(job, sizes))
    return Plan(job, sizes, tuple(steps), choice, name)


def _model_step(job: Job, step: str, sizes: ParallelismRecipe) -> StepPlan:
    if step == MEASURE_STEP:
        return measure_step([job], sizes)
    others = {CACHE_STEP: cache_step, ASK_STEP: ask_step}
    return others[step](job, sizes) if step in others else model_step(job, step, sizes)


def _student(recipe: Recipe, teacher: Teacher) -> tuple[ModelShape, Teacher | None]:
    """The student's shape, once it is known that both models can be divided as the recipe says.

    And what is known of its source, where it is a model of its own.
    """
    from flagscale.megatron.layout import check_layouts
    from flagscale.models.student_shape import student_shape

    own = recipe.student.pretrained
    source = None if own is None else teacher_of(own, "student")
    student = source.shape if source else student_shape(teacher.shape, recipe.student)
    check_layouts(recipe, teacher.shape, student)
    return student, source


def choose(job: Job) -> ParallelismRecipe | None:
    """The smallest layout of the model steps that has room; None where there is none.

    On a CPU there is none to choose: more processes would hold no less.
    """
    if job.models.device == "cpu":
        return None

    def fits(sizes: ParallelismRecipe) -> bool:
        try:
            check_width_pruning(job.recipe.student, sizes)
            _check_quantized(job, sizes, calibrates=True)
        except (ValueError, UserError):
            return False
        steps = [*MODEL_STEPS, *[CACHE_STEP] * job.reads_outputs]
        if job.recipe.tasks.is_asked and job.recipe.export.format == "megatron":
            steps.append(ASK_STEP)
        if job.layers_measured and job.recipe.student.measures_layers:
            steps.append(MEASURE_STEP)
        return all(_model_step(job, step, sizes).lacks is None for step in steps)

    shapes = (job.teacher.shape, job.student)
    return smallest_layout(shapes, fits, job.models.accelerators, job.recipe.data.seq_length)


def _nearest_training(job: Job) -> str:
    """The layout of the training that fits, with its accelerators, or else on more nodes."""
    machine = job.training
    if machine.device == "cpu":
        needed = training_step(job).host / 2**30
        return f"give its pod {needed:.0f}Gi of memory"
    found = smallest_training(job)
    if found is None:
        return f"no layout on up to {_MOST_RANKS} nodes has room"
    nodes, layout = found
    on = f"resources.nodes={nodes}, " if nodes != machine.pods else ""
    return f"the nearest layout that fits is {on}{_as_fields(layout)}"


def smallest_training(job: Job) -> tuple[int, Layout] | None:
    """Nodes and layout of a training that has room: of the recipe's nodes, or else of more.

    Args:
        job: on accelerators.

    Returns:
        The layout with the fewest ranks a copy of the model; None where none has room.
    """
    for nodes in _more(job.training.pods):
        bigger = replace(job, training=replace(job.training, pods=nodes))
        for layout in _training_layouts(bigger):
            if training_step(bigger, layout).lacks is None:
                return nodes, layout
    return None


def _as_fields(layout: Layout) -> str:
    """As a recipe says it; sizes of 1 are left out."""
    fields = {
        "tensor_model_parallel_size": layout.tensor,
        "pipeline_model_parallel_size": layout.pipeline,
        "context_parallel_size": layout.context,
        "expert_model_parallel_size": layout.expert,
    }
    given = [f"{name}: {size}" for name, size in fields.items() if size > 1]
    if layout.sequence_parallel:
        given.append("sequence_parallel: true")
    return f"training.parallelism={{{', '.join(given)}}}"


def _more(nodes: int) -> Iterator[int]:
    while nodes <= _MOST_RANKS:
        yield nodes
        nodes *= 2


def _training_layouts(job: Job) -> Iterator[Layout]:
    """Layouts of all the training's accelerators, fewest ranks a copy of the model first."""
    training, world = job.recipe.training, job.training.accelerators * job.training.pods
    # The output layer of a teacher whose outputs are read is divided as the student's.
    shapes = [job.student] + ([job.teacher.shape] if job.runs_in_training else [])
    for sizes in layouts(shapes, world, job.recipe.data.seq_length):
        split = sizes.tensor_model_parallel_size > 1
        given = sizes.model_copy(
            update={
                "sequence_parallel": split,
                "context_parallel_size": training.parallelism.context_parallel_size,
            }
        )
        try:
            training.model_copy(update={"parallelism": given}).check_world_size(world)
            _check_quantized(job, given, calibrates=False)
        except (ValueError, UserError):
            continue
        yield Layout.of(given, world)


def _check_quantized(job: Job, sizes: ParallelismRecipe, *, calibrates: bool) -> None:
    """Refuse a layout that the student is not quantised on, if it is."""
    from flagscale.megatron.quantized import check_quantized

    quantization = job.recipe.student.quantization
    if quantization is not None:
        check_quantized(job.student, quantization.recipe, sizes, calibrates=calibrates)


def _machines(recipe: Recipe, platform: Platform) -> tuple[Machine, Machine]:
    """Pods of the model steps and of the training."""
    training = machine(platform.steps.training)
    wanted = recipe.resources.accelerator_count
    if wanted is not None:
        training = replace(training, accelerators=min(wanted, training.accelerators))
    return machine(platform.steps.models), replace(training, pods=recipe.resources.nodes)


def machine(pods: Pods) -> Machine:
    """A pod, as its platform file describes it."""
    known = ACCELERATORS[pods.accelerator] if pods.accelerator else None
    memory = float(parse_quantity(pods.accelerator_memory)) if pods.accelerator_memory else None
    flops = pods.accelerator_tflops * 1e12 if pods.accelerator_tflops else None
    accelerator = known
    if known is not None:
        accelerator = Accelerator(memory or known.memory, flops or known.flops, known.bandwidth)
    elif memory:
        accelerator = Accelerator(memory, flops)
    return Machine(
        memory=float(parse_quantity(pods.memory)),
        accelerators=pods.accelerator_count,
        accelerator=accelerator,
        price_per_hour=pods.price_per_hour,
    )


def this_machine(on_cpu: bool = False) -> Machine:
    """Memory and accelerators of this machine, or of the container that this is.

    Args:
        on_cpu: leave the accelerators alone.
    """
    memory = float(psutil.virtual_memory().total)
    with contextlib.suppress(OSError, ValueError):  # there is no such file, or it says `max`
        memory = min(memory, float(_CGROUP_LIMIT.read_text()))
    cards = [] if on_cpu else _cards()
    smallest = Accelerator(min(cards)) if cards else None
    return Machine(memory, len(cards), smallest)


def _cards() -> list[float]:
    """Bytes of each NVIDIA accelerator that processes may use here."""
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        query.append(f"--id={visible}")
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=True, timeout=10)  # noqa: S603
        return [float(line) * 2**20 for line in answer.stdout.split()]
    except (OSError, subprocess.SubprocessError, ValueError):
        return []
