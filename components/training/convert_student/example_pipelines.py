"""A pipeline of convert-student alone, on artifacts of other runs.

Made by `python -m components` from the component's signature: change it there.
"""

from kfp import dsl

from .component import convert_student


@dsl.pipeline(name="convert-student-example")
def convert_student_example(
    student_recipe: dict = {"init": "depth", "num_layers": 2},
    models_recipe: dict = {},
    code_version: str = "release",
    experiment: str = "flagscale-distillation",
    accelerators: str = "0",
    record_failure: bool = False,
    teacher_uri: str = "s3://bucket/teacher",
    dataset_uri: str = "s3://bucket/dataset",
) -> None:
    """Make the student from the teacher and prove that it can be distilled."""
    convert_student(
        student_recipe=student_recipe,
        models_recipe=models_recipe,
        code_version=code_version,
        experiment=experiment,
        accelerators=accelerators,
        record_failure=record_failure,
        teacher=dsl.importer(artifact_uri=teacher_uri, artifact_class=dsl.Model).output,
        dataset=dsl.importer(artifact_uri=dataset_uri, artifact_class=dsl.Dataset).output,
    )
