"""A pipeline of promote alone, on artifacts of other runs.

Made by `python -m components` from the component's signature: change it there.
"""

from kfp import dsl

from .component import promote


@dsl.pipeline(name="promote-example")
def promote_example(
    promote_recipe: dict = {"conditions": ["distilled/kl <= 1.0 at 95%"]},
    code_version: str = "release",
    experiment: str = "flagscale-distillation",
    evaluation_uri: str = "s3://bucket/evaluation",
    exported_student_uri: str = "s3://bucket/exported_student",
    export_metrics_uri: str = "s3://bucket/export_metrics",
) -> None:
    """Judge the student by the recipe's conditions; if all hold, move the alias in MLflow to it."""
    promote(
        promote_recipe=promote_recipe,
        code_version=code_version,
        experiment=experiment,
        evaluation=dsl.importer(artifact_uri=evaluation_uri, artifact_class=dsl.Artifact).output,
        exported_student=dsl.importer(
            artifact_uri=exported_student_uri, artifact_class=dsl.Model
        ).output,
        export_metrics=dsl.importer(
            artifact_uri=export_metrics_uri, artifact_class=dsl.Metrics
        ).output,
    )
