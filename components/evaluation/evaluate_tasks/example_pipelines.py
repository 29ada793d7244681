"""A pipeline of evaluate-tasks alone, on artifacts of other runs.

Made by `python -m components` from the component's signature: change it there.
"""

from kfp import dsl

from .component import evaluate_tasks


@dsl.pipeline(name="evaluate-tasks-example")
def evaluate_tasks_example(
    tasks_recipe: dict = {"names": ["heldout_cloze"]},
    models_recipe: dict = {},
    code_version: str = "release",
    experiment: str = "flagscale-distillation",
    accelerators: str = "0",
    teacher_uri: str = "s3://bucket/teacher",
    dataset_uri: str = "s3://bucket/dataset",
    evaluation_uri: str = "s3://bucket/evaluation",
    exported_student_uri: str = "s3://bucket/exported_student",
) -> None:
    """Ask the teacher and the exported student tasks of lm-eval, and measure how fast they write."""
    evaluate_tasks(
        tasks_recipe=tasks_recipe,
        models_recipe=models_recipe,
        code_version=code_version,
        experiment=experiment,
        accelerators=accelerators,
        teacher=dsl.importer(artifact_uri=teacher_uri, artifact_class=dsl.Model).output,
        dataset=dsl.importer(artifact_uri=dataset_uri, artifact_class=dsl.Dataset).output,
        evaluation=dsl.importer(artifact_uri=evaluation_uri, artifact_class=dsl.Artifact).output,
        exported_student=dsl.importer(
            artifact_uri=exported_student_uri, artifact_class=dsl.Model
        ).output,
    )
