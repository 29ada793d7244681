"""A pipeline of evaluate alone, on artifacts of other runs.

Made by `python -m components` from the component's signature: change it there.
"""

from kfp import dsl

from .component import evaluate


@dsl.pipeline(name="evaluate-example")
def evaluate_example(
    evaluation_recipe: dict = {
        "max_documents": 20,
        "micro_batch_size": 8,
        "prompts": ["The list type"],
        "max_new_tokens": 12,
    },
    models_recipe: dict = {},
    code_version: str = "release",
    experiment: str = "flagscale-distillation",
    accelerators: str = "0",
    record_failure: bool = False,
    teacher_uri: str = "s3://bucket/teacher",
    student_uri: str = "s3://bucket/student",
    distilled_student_uri: str = "s3://bucket/distilled_student",
    dataset_uri: str = "s3://bucket/dataset",
) -> None:
    """Compare teacher, student before and student after training on the held-out test split."""
    evaluate(
        evaluation_recipe=evaluation_recipe,
        models_recipe=models_recipe,
        code_version=code_version,
        experiment=experiment,
        accelerators=accelerators,
        record_failure=record_failure,
        teacher=dsl.importer(artifact_uri=teacher_uri, artifact_class=dsl.Model).output,
        student=dsl.importer(artifact_uri=student_uri, artifact_class=dsl.Model).output,
        distilled_student=dsl.importer(
            artifact_uri=distilled_student_uri, artifact_class=dsl.Model
        ).output,
        dataset=dsl.importer(artifact_uri=dataset_uri, artifact_class=dsl.Dataset).output,
    )
