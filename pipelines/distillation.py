"""The distillation pipeline: six steps and their inputs.

`build_pipeline` makes it for a recipe: the recipe's sections become the parameters' defaults, so
that an uploaded pipeline shows them in the KFP UI and every run can change them. The same
definition runs on this machine (`python -m pipelines run`) and compiles to YAML for a platform
(`python -m pipelines compile`). Each step is given only the sections that it depends on: another
temperature reuses data, teacher and conversion from the cache.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kfp.dsl.base_component import BaseComponent

from components.convert_student.component import convert_student
from components.distil_student.component import distil_student
from components.distil_student_on_nodes.component import distil_student_on_nodes
from components.evaluate.component import evaluate
from components.export_student.component import export_student
from components.image import VERSION
from components.prepare_data.component import prepare_data
from components.prepare_teacher.component import prepare_teacher
from components.record_run.component import record_run
from flagscale.recipe import Recipe
from pipelines import placement
from pipelines.parameters import Parameter, make_pipeline
from pipelines.placement import Placement
from pipelines.platform import Platform

SECTIONS = ("data", "teacher", "student", "distillation", "training", "evaluation", "export")
RELEASE = f"flagscale-distillation {VERSION}"
_IN_THE_POD = "/tmp/flagscale"  # noqa: S108
_METRICS = {
    "prepare-data": "dataset_metrics",
    "prepare-teacher": "teacher_metrics",
    "convert-student": "student_metrics",
    "distil-student": "training_metrics",
    "distil-student-on-nodes": "training_metrics",
    "evaluate": "evaluation_metrics",
    "leaderboard": "leaderboard_metrics",
    "export-student": "export_metrics",
    "export-winner": "export_metrics",
}  # step: what its figures are called


def build_pipeline(
    recipe: Recipe, platform: Platform | None = None, code_version: str = RELEASE
) -> BaseComponent:
    """The pipeline with the recipe's sections as defaults, placed on a platform.

    A recipe with `sweep` gives the pipeline of `pipelines.sweep`.

    Args:
        recipe: resolved.
        platform: None for this machine.
        code_version: changes when the code does, and with it every cache key. In a compiled
            pipeline it is the release, because the image pins the code; on this machine it is
            `source_version`.

    Raises:
        UserError: the platform cannot hold the training.
    """
    if recipe.sweep is not None:
        from pipelines.sweep import build_sweep

        return build_sweep(recipe, platform, code_version)
    if platform is not None:
        placement.check(platform, recipe)

    def wire(values: Mapping[str, Any]) -> None:
        _wire(values, Placement(platform, recipe, values))

    return make_pipeline(
        name="distillation",
        display_name=f"Distillation: {recipe.name}",
        description="Distils a teacher into a smaller student with Megatron-Core and ModelOpt.",
        parameters=[
            *sections(recipe, SECTIONS),
            *run_parameters(recipe, platform, code_version),
        ],
        wire=wire,
    )


def sections(recipe: Recipe, names: tuple[str, ...]) -> list[Parameter]:
    """The recipe's sections as parameters."""
    return [
        Parameter(
            name,
            getattr(recipe, name).model_dump(mode="json", exclude_none=True),
            f"section `{name}` of the recipe",
        )
        for name in names
    ]


def run_parameters(recipe: Recipe, platform: Platform | None, code_version: str) -> list[Parameter]:
    """What is said of a run beside the recipe's sections."""
    folder = f"{placement.location(platform) or _IN_THE_POD}/checkpoints/{recipe.name}"
    return [
        Parameter("checkpoints", folder, "training checkpoints; an interrupted run goes on there"),
        Parameter("experiment", recipe.tracking.experiment, "MLflow's experiment"),
        Parameter("code_version", code_version, "changes when the code does"),
        *(placement.parameters(platform, recipe) if platform else []),
    ]


def _wire(values: Mapping[str, Any], placed: Placement) -> None:
    dataset, teacher = prepare(values, placed)
    distilled, results = teach(values, placed, dataset, teacher)
    exported = export_student(
        export=values["export"], distilled=distilled, evaluation=results, **always(values)
    )
    placed.place(exported, "models", "Export student")
    if placed.on_a_cluster:
        _record(values, placed)


def _record(values: Mapping[str, Any], placed: Placement) -> None:
    """The last step: what KFP's cache served shows up in MLflow, and the run ends there."""
    recorded = record_run(experiment=values["experiment"], **metrics(placed, "export-student"))
    recorded.set_caching_options(enable_caching=False)
    placed.place(recorded, "data", "Record run", accelerators=False)


def metrics(placed: Placement, *last: str) -> dict[str, Any]:
    """The figures of the steps that every run has, and of `last`: channels by name."""
    trained = "distil-student" if placed.nodes == 1 else "distil-student-on-nodes"
    steps = ("prepare-data", "prepare-teacher", "convert-student", trained, "evaluate", *last)
    return {_METRICS[step]: placed.task(step).outputs["metrics"] for step in steps}


def always(values: Mapping[str, Any]) -> dict[str, Any]:
    """What every step is given."""
    return {"code_version": values["code_version"], "experiment": values["experiment"]}


def prepare(values: Mapping[str, Any], placed: Placement) -> tuple[Any, Any]:
    """The steps that all students of a teacher share: channels of the dataset and the teacher."""
    text = prepare_data(data=values["data"], **always(values))
    dataset = placed.place(text, "data", "Prepare data").outputs["dataset"]

    source = prepare_teacher(teacher=values["teacher"], dataset=dataset, **always(values))
    return dataset, placed.place(source, "models", "Prepare teacher").outputs["model"]


def teach(
    values: Mapping[str, Any],
    placed: Placement,
    dataset: Any,  # noqa: ANN401 - KFP's channel
    teacher: Any,  # noqa: ANN401 - KFP's channel
) -> tuple[Any, Any]:
    """The steps of one student: channels of the distilled student and its evaluation."""
    conversion = convert_student(
        student=values["student"], teacher=teacher, dataset=dataset, **always(values)
    )
    student = placed.place(conversion, "models", "Convert student").outputs["model"]

    distilled = _train(values, placed, teacher=teacher, student=student, dataset=dataset)

    measured = evaluate(
        evaluation=values["evaluation"],
        teacher=teacher,
        student=student,
        distilled=distilled,
        dataset=dataset,
        **always(values),
    )
    return distilled, placed.place(measured, "models", "Evaluate").outputs["results"]


def _train(values: Mapping[str, Any], placed: Placement, **models_and_data: Any) -> Any:  # noqa: ANN401 - KFP's channels
    """The training, in its pod or in those that its pod starts: a channel of its student."""
    given = {name: values[name] for name in ("distillation", "training", "checkpoints")}
    given |= models_and_data | always(values)
    if placed.nodes == 1:
        trained = distil_student(**given)
        return placed.place(trained, "training", "Distil student").outputs["model"]
    started = distil_student_on_nodes(
        nodes=placed.nodes,
        accelerator_count=values["training_accelerator_count"],
        pods=placed.node_pods,
        **given,
    )
    title = f"Distil student on {placed.nodes} nodes"
    placed.place(started, "training", title, accelerators=False)
    return started.outputs["model"]


def source_version() -> str:
    """A digest of the sources: the local cache sees no code inside an installed package."""
    import components
    import flagscale

    roots = [Path(package.__path__[0]) for package in (flagscale, components)]
    value = hashlib.sha256()
    for root in roots:
        for path in sorted(p for p in root.rglob("*") if p.suffix in (".py", ".j2")):
            value.update(path.relative_to(root).as_posix().encode() + b"\0")
            value.update(hashlib.sha256(path.read_bytes()).digest())
    return f"sources {value.hexdigest()[:16]}"
