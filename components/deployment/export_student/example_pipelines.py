"""A pipeline of export-student alone, on artifacts of other runs.

Made by `python -m components` from the component's signature: change it there.
"""

from kfp import dsl

from .component import export_student


@dsl.pipeline(name="export-student-example")
def export_student_example(
    export_recipe: dict = {"registered_model_name": "tiny"},
    models_recipe: dict = {},
    code_version: str = "release",
    experiment: str = "flagscale-distillation",
    accelerators: str = "0",
    distilled_student_uri: str = "s3://bucket/distilled_student",
    evaluation_uri: str = "s3://bucket/evaluation",
) -> None:
    """Write the trained student as a Hugging Face folder, prove it, register it in MLflow."""
    export_student(
        export_recipe=export_recipe,
        models_recipe=models_recipe,
        code_version=code_version,
        experiment=experiment,
        accelerators=accelerators,
        distilled_student=dsl.importer(
            artifact_uri=distilled_student_uri, artifact_class=dsl.Model
        ).output,
        evaluation=dsl.importer(artifact_uri=evaluation_uri, artifact_class=dsl.Artifact).output,
    )
