"""A pipeline of measure-layers alone, on artifacts of other runs.

Made by `python -m components` from the component's signature: change it there.
"""

from kfp import dsl

from .component import measure_layers


@dsl.pipeline(name="measure-layers-example")
def measure_layers_example(
    students: list = [{"init": "depth", "num_layers": 2, "layer_importance": "kl"}],
    models_recipe: dict = {},
    code_version: str = "release",
    experiment: str = "flagscale-distillation",
    accelerators: str = "0",
    record_failure: bool = False,
    teacher_uri: str = "s3://bucket/teacher",
    dataset_uri: str = "s3://bucket/dataset",
) -> None:
    """Measure which of the teacher's layers can go, once for all students that ask the same."""
    measure_layers(
        students=students,
        models_recipe=models_recipe,
        code_version=code_version,
        experiment=experiment,
        accelerators=accelerators,
        record_failure=record_failure,
        teacher=dsl.importer(artifact_uri=teacher_uri, artifact_class=dsl.Model).output,
        dataset=dsl.importer(artifact_uri=dataset_uri, artifact_class=dsl.Dataset).output,
    )
