"""The steps' wiring, which a single run and a sweep have in common."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from kfp import dsl

from components.data_processing.prepare_data.component import prepare_data
from components.deployment.promote.component import promote
from components.evaluation.evaluate.component import evaluate
from components.evaluation.evaluate_tasks.component import evaluate_tasks
from components.training.cache_teacher.component import cache_teacher
from components.training.check_recipe.component import check_recipe
from components.training.convert_student.component import convert_student
from components.training.distil_student.component import distil_student
from components.training.distil_student_on_nodes.component import distil_student_on_nodes
from components.training.measure_layers.component import measure_layers
from components.training.prepare_teacher.component import prepare_teacher
from flagscale.run_values import LISTS, MEASURED, MET, SECTIONS, Made
from flagscale.run_values.literal import carried
from pipelines.placement import Placement

Channel = Any  # KFP's

_FIGURES = {
    "prepare-data": "dataset_metrics",
    "prepare-teacher": "teacher_metrics",
    "cache-teacher": "outputs_metrics",
    "measure-layers": "importance_metrics",
    "convert-student": "student_metrics",
    "distil-student": "training_metrics",
    "distil-student-on-nodes": "training_metrics",
    "evaluate": "evaluation_metrics",
    "leaderboard": "ranking_metrics",
    "rank-candidates": "ranking_metrics",
    "export-student": "export_metrics",
    "export-winner": "export_metrics",
    "evaluate-tasks": "task_metrics",
}  # step: its output, and the input of the last step


def check(values: Mapping[str, Any], placed: Placement, made: Made) -> dict[str, Any]:
    """The first step, a check of all parameters.

    Every other step takes a section from it, so that none begins before.

    Args:
        values: the pipeline's parameters by name.
        placed: where tasks go.
        made: the pipeline.

    Returns:
        The values for the other steps: sections and variants as the check gives them.
    """
    given = {name: values[name] for name in made.parameters}
    checked = check_recipe(made=carried(made.model_dump(mode="json", exclude_none=True)), **given)
    placed.place(checked, "data", "Check recipe", small=True, storage=False)
    placed.create_volume(after=checked)
    outputs = [name for name in (*SECTIONS, *LISTS) if name in values]
    return {**values, **{name: checked.outputs[name] for name in (*outputs, MEASURED, MET)}}


def always(values: Mapping[str, Any], kind: str = "data") -> dict[str, Any]:
    """What every step is given, and what those are that run models: how many accelerators."""
    given = {
        "code_version": values["where_code_version"],
        "experiment": values["tracking_experiment"],
    }
    if kind != "data":  # on this machine nobody says how many there are
        # KFP has an input `accelerator_count` of its own for tasks with a limit.
        given["accelerators"] = values.get(f"where_{kind}_accelerator_count", "0")
    return given


def prepare(values: Mapping[str, Any], placed: Placement) -> tuple[Channel, Channel]:
    """The steps that all students of a teacher share: channels of the dataset and the teacher."""
    text = prepare_data(data_recipe=values["data"], **always(values))
    dataset = placed.place(text, "data", "Prepare data").outputs["dataset"]

    source = prepare_teacher(
        teacher_recipe=values["teacher"],
        models_recipe=values["models"],
        dataset=dataset,
        **always(values, "models"),
    )
    return dataset, placed.place(source, "models", "Prepare teacher").outputs["teacher"]


class Rung(NamedTuple):
    """Where a candidate's training stops for now, on how many samples and tasks it is measured."""

    until_step: int
    samples: int
    tasks: Mapping[str, Any]

    def given(self) -> dict[str, Any]:
        """To the training; without tasks where a loss ranks."""
        found = self._asdict()
        return carried({key: value for key, value in found.items() if value})


def cache(
    values: Mapping[str, Any], placed: Placement, dataset: Channel, teacher: Channel
) -> Channel:
    """The step that asks the teacher for all trainings: a channel of its outputs."""
    asked = cache_teacher(
        teacher_outputs_recipe=values["teacher_outputs"],
        met_recipe=values[MET],
        models_recipe=values["models"],
        checkpoints=values["training_checkpoints"],
        teacher=teacher,
        dataset=dataset,
        **always(values, "models"),
    )
    return placed.place(asked, "models", "Cache teacher").outputs["teacher_outputs"]


def measure(
    values: Mapping[str, Any], placed: Placement, dataset: Channel, teacher: Channel
) -> dict[str, Channel]:
    """The step that measures layers for all students, if there is one: what they are given."""
    if not placed.measures_layers_once:
        return {}
    asked = measure_layers(
        students=values[MEASURED],
        models_recipe=values["models"],
        record_failure=True,
        teacher=teacher,
        dataset=dataset,
        **always(values, "models"),
    )
    placed.place(asked, "models", "Measure layers")
    return {"layer_importance": asked.outputs["layer_importance"]}


def convert(
    values: Mapping[str, Any],
    placed: Placement,
    dataset: Channel,
    teacher: Channel,
    measured: Mapping[str, Channel],
    *,
    record_failure: bool = False,
) -> Channel:
    """The step that makes a student: its channel.

    Args:
        values: the pipeline's parameters, or as the check gives them.
        placed: where tasks go.
        dataset: a channel.
        teacher: a channel.
        measured: of `measure`.
        record_failure: whether others go on where this student fails.
    """
    conversion = convert_student(
        student_recipe=values["student"],
        models_recipe=values["models"],
        record_failure=record_failure,
        teacher=teacher,
        dataset=dataset,
        **measured,
        **always(values, "models"),
    )
    return placed.place(conversion, "models", "Convert student").outputs["student"]


def teach(
    values: Mapping[str, Any],
    placed: Placement,
    dataset: Channel,
    teacher: Channel,
    outputs: Channel = None,
    measured: Mapping[str, Channel] = MappingProxyType({}),
    *,
    record_failure: bool = False,
) -> tuple[Channel, Channel]:
    """The steps of one student: channels of the distilled student and its evaluation.

    Args:
        values: see `convert`.
        placed: see there.
        dataset: a channel.
        teacher: a channel.
        outputs: a channel, of `cache`, where the training reads them.
        measured: of `measure`.
        record_failure: see `convert`.
    """
    student = convert(values, placed, dataset, teacher, measured, record_failure=record_failure)
    read = reads(dataset, teacher, outputs)
    distilled = train(values, placed, student, read, record_failure=record_failure)
    judged = judge(
        values, placed, dataset, teacher, student, distilled, record_failure=record_failure
    )
    return distilled, judged


def reads(dataset: Channel, teacher: Channel, outputs: Channel = None) -> dict[str, Channel]:
    """What a training reads beside its student; `outputs` of `cache`, where it reads them."""
    found = {"teacher": teacher, "dataset": dataset}
    return found if outputs is None else {**found, "teacher_outputs": outputs}


def judge(
    values: Mapping[str, Any],
    placed: Placement,
    dataset: Channel,
    teacher: Channel,
    student: Channel,
    distilled: Channel,
    *,
    record_failure: bool = False,
) -> Channel:
    """The step that compares a student with its teacher: a channel of its evaluation."""
    measured = evaluate(
        evaluation_recipe=values["evaluation"],
        models_recipe=values["models"],
        record_failure=record_failure,
        teacher=teacher,
        student=student,
        distilled_student=distilled,
        dataset=dataset,
        **always(values, "models"),
    )
    return placed.place(measured, "models", "Evaluate").outputs["evaluation"]


def ask_tasks(
    values: Mapping[str, Any],
    placed: Placement,
    dataset: Channel,
    teacher: Channel,
    evaluation: Channel,
    exported: Channel,
) -> Channel:
    """The step that asks a teacher and an exported student tasks.

    Returns:
        A channel of their scores; None where no task is named.
    """
    if not placed.evaluates_tasks:
        return None
    asked = evaluate_tasks(
        tasks_recipe=values["tasks"],
        models_recipe=values["models"],
        teacher=teacher,
        dataset=dataset,
        evaluation=evaluation,
        exported_student=exported,
        **always(values, "models"),
    )
    return placed.place(asked, "models", "Evaluate tasks").outputs["task_evaluation"]


def train(
    values: Mapping[str, Any],
    placed: Placement,
    student: Channel,
    read: Mapping[str, Channel],
    rung: Rung | None = None,
    *,
    record_failure: bool = False,
) -> Channel:
    """The training, in its pod or in those that its pod starts: a channel of its student.

    Args:
        values: see `convert`.
        placed: see there.
        student: a channel.
        read: of `reads`.
        rung: of a search, where others go on if it fails; the channel is then of a candidate.
        record_failure: see `convert`.
    """
    given = {f"{name}_recipe": values[name] for name in ("distillation", "training")}
    given["checkpoints"] = values["training_checkpoints"]
    of_many: dict[str, Any] = {"record_failure": True} if record_failure or rung else {}
    given["of_many"] = of_many | (rung.given() if rung else {})
    given |= {"student": student, **read}
    if not placed.uses_trainjob:
        trained = distil_student(**given, **always(values, "training"))
        return placed.place(trained, "training", "Distil student").outputs["distilled_student"]
    started = distil_student_on_nodes(
        nodes=placed.nodes,
        accelerator_count=values["where_training_accelerator_count"],
        pods=carried(placed.node_pods),
        **given,
        **always(values),
    )
    title = f"Distil student on {placed.nodes} node{'s' * (placed.nodes > 1)}"
    placed.place(started, "training", title, small=True)
    return started.outputs["distilled_student"]


def decide(
    values: Mapping[str, Any],
    placed: Placement,
    evaluation: Channel,
    exported: dsl.PipelineTask,
    tasks: Channel = None,
) -> None:
    """The step that promotes the student, where the recipe says what it must have shown.

    Args:
        values: see `convert`.
        placed: see there.
        evaluation: a channel, of the student that was exported.
        exported: the task that did so.
        tasks: a channel of the student's task evaluation, where it was asked tasks.
    """
    if "promote" not in values:
        return
    judged = promote(
        promote_recipe=values["promote"],
        evaluation=evaluation,
        exported_student=exported.outputs["exported_student"],
        export_metrics=exported.outputs["export_metrics"],
        **({} if tasks is None else {"task_evaluation": tasks}),
        **always(values),
    )
    if placed.on_a_cluster:  # the alias may have moved since; here `step_cache` sees to that
        judged.set_caching_options(enable_caching=False)
    placed.place(judged, "data", "Promote", small=True)


def figures(values: Mapping[str, Any], placed: Placement, *last: str) -> dict[str, Any]:
    """What the last step is given: the figures of the steps so far that every run has, and `last`.

    A step that is there several times has those of the task that was placed last.
    """
    trained = "distil-student-on-nodes" if placed.uses_trainjob else "distil-student"
    steps = ["prepare-data", "prepare-teacher", "convert-student", trained, "evaluate", *last]
    steps += ["cache-teacher", "measure-layers", "evaluate-tasks"]
    given = {
        _FIGURES[step]: placed.task(step).outputs[_FIGURES[step]]
        for step in steps
        if placed.has(step)
    }
    return {"experiment": values["tracking_experiment"], **given}


def place_record(task: dsl.PipelineTask, placed: Placement) -> None:
    """Place the last step: what KFP's cache served shows up in MLflow, and the run ends there."""
    task.set_caching_options(enable_caching=False)
    if placed.has("promote"):  # is never cached: nothing of it is to be recorded
        task.after(placed.task("promote"))
    placed.place(task, "data", "Record run", small=True)
