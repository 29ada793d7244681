"""A pipeline of prepare-teacher alone, on artifacts of other runs.

Made by `python -m components` from the component's signature: change it there.
"""

from kfp import dsl

from .component import prepare_teacher


@dsl.pipeline(name="prepare-teacher-example")
def prepare_teacher_example(
    teacher_recipe: dict = {"source": "./build/tiny-teacher"},
    models_recipe: dict = {},
    code_version: str = "release",
    experiment: str = "flagscale-distillation",
    accelerators: str = "0",
    dataset_uri: str = "s3://bucket/dataset",
) -> None:
    """Import a Hugging Face model into Megatron-Core and prove that it is the same model."""
    prepare_teacher(
        teacher_recipe=teacher_recipe,
        models_recipe=models_recipe,
        code_version=code_version,
        experiment=experiment,
        accelerators=accelerators,
        dataset=dsl.importer(artifact_uri=dataset_uri, artifact_class=dsl.Dataset).output,
    )
