"""A pipeline of cache-teacher alone, on artifacts of other runs.

Made by `python -m components` from the component's signature: change it there.
"""

from kfp import dsl

from .component import cache_teacher


@dsl.pipeline(name="cache-teacher-example")
def cache_teacher_example(
    teacher_outputs_recipe: dict = {},
    met_recipe: dict = {},
    models_recipe: dict = {},
    checkpoints: str = "/mnt/flagscale/checkpoints",
    code_version: str = "release",
    experiment: str = "flagscale-distillation",
    accelerators: str = "0",
    teacher_uri: str = "s3://bucket/teacher",
    dataset_uri: str = "s3://bucket/dataset",
) -> None:
    """Run the teacher on the samples that trainings meet, and keep what it makes of them."""
    cache_teacher(
        teacher_outputs_recipe=teacher_outputs_recipe,
        met_recipe=met_recipe,
        models_recipe=models_recipe,
        checkpoints=checkpoints,
        code_version=code_version,
        experiment=experiment,
        accelerators=accelerators,
        teacher=dsl.importer(artifact_uri=teacher_uri, artifact_class=dsl.Model).output,
        dataset=dsl.importer(artifact_uri=dataset_uri, artifact_class=dsl.Dataset).output,
    )
