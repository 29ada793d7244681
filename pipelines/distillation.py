"""The distillation pipeline: six steps, their inputs, and what a cluster gives them.

`build_pipeline` makes it for a recipe: the recipe's sections become the parameters' defaults, so
that an uploaded pipeline shows them in the KFP UI and every run can change them. The same
definition runs on this machine (`python -m pipelines run`) and compiles to YAML for a cluster
(`python -m pipelines compile`). Each step is given only the sections that it depends on: another
temperature reuses data, teacher and conversion from the cache.
"""

import hashlib
from pathlib import Path

from kfp import dsl
from kfp.dsl.base_component import BaseComponent

from components.convert_student.component import convert_student
from components.distil_student.component import distil_student
from components.evaluate.component import evaluate
from components.export_student.component import export_student
from components.image import VERSION, image
from components.prepare_data.component import prepare_data
from components.prepare_teacher.component import prepare_teacher
from flagscale.recipe import Recipe, ResourcesRecipe

SECTIONS = ("data", "teacher", "student", "distillation", "training", "evaluation", "export")
RELEASE = f"flagscale-distillation {VERSION}"


def build_pipeline(recipe: Recipe, code_version: str = RELEASE) -> BaseComponent:
    """The pipeline with the recipe's sections as defaults and its resources on the tasks.

    Args:
        recipe: resolved.
        code_version: changes when the code does, and with it every cache key. In a compiled
            pipeline it is the release, because the image pins the code; on this machine it is
            `source_version`.
    """
    values = {
        name: getattr(recipe, name).model_dump(mode="json", exclude_none=True) for name in SECTIONS
    }

    @dsl.pipeline(
        name="distillation",
        display_name=f"Distillation: {recipe.name}",
        description="Distils a teacher into a smaller student with Megatron-Core and ModelOpt.",
    )
    def distillation(
        data: dict = values["data"],
        teacher: dict = values["teacher"],
        student: dict = values["student"],
        distillation: dict = values["distillation"],
        training: dict = values["training"],
        evaluation: dict = values["evaluation"],
        export: dict = values["export"],
        checkpoints: str = f"/tmp/flagscale/checkpoints/{recipe.name}",  # noqa: S108 - in the pod
        code_version: str = code_version,
    ) -> None:
        """Wire the steps.

        Args:
            data: section `data` of the recipe.
            teacher: section `teacher`.
            student: section `student`.
            distillation: section `distillation`.
            training: section `training`.
            evaluation: section `evaluation`.
            export: section `export`.
            checkpoints: folder of training checkpoints; on a mounted volume an interrupted run
                goes on where it was.
            code_version: changes when the code does.
        """
        text = prepare_data(data=data, code_version=code_version)
        text.set_display_name("Prepare data")
        dataset = text.outputs["dataset"]

        source = prepare_teacher(teacher=teacher, code_version=code_version, dataset=dataset)
        big = _runs_models(source, "Prepare teacher", recipe.resources).outputs["model"]

        conversion = convert_student(
            student=student, code_version=code_version, teacher=big, dataset=dataset
        )
        small = _runs_models(conversion, "Convert student", recipe.resources).outputs["model"]

        trained = distil_student(
            distillation=distillation,
            training=training,
            checkpoints=checkpoints,
            code_version=code_version,
            teacher=big,
            student=small,
            dataset=dataset,
        )
        distilled = _runs_models(trained, "Distil student", recipe.resources).outputs["model"]

        measured = evaluate(
            evaluation=evaluation,
            code_version=code_version,
            teacher=big,
            student=small,
            distilled=distilled,
            dataset=dataset,
        )
        results = _runs_models(measured, "Evaluate", recipe.resources).outputs["results"]

        exported = export_student(
            export=export, code_version=code_version, distilled=distilled, evaluation=results
        )
        _runs_models(exported, "Export student", recipe.resources)

    return distillation


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


def _runs_models(
    task: dsl.PipelineTask, title: str, resources: ResourcesRecipe
) -> dsl.PipelineTask:
    """Give a task the resources that the recipe asks for."""
    task.set_display_name(title)
    task.set_cpu_request(resources.cpu).set_memory_request(resources.memory)
    task.set_memory_limit(resources.memory)
    if resources.accelerator_count:
        task.set_container_image(image(resources.accelerator_count))
        task.set_accelerator_type(resources.accelerator_type)
        task.set_accelerator_limit(resources.accelerator_count)
    return task
