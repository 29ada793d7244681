"""A pipeline of distil-student-on-nodes alone, on artifacts of other runs.

Made by `python -m components` from the component's signature: change it there.
"""

from kfp import dsl

from .component import distil_student_on_nodes


@dsl.pipeline(name="distil-student-on-nodes-example")
def distil_student_on_nodes_example(
    distillation_recipe: dict = {},
    training_recipe: dict = {
        "train_iters": 30,
        "micro_batch_size": 4,
        "global_batch_size": 8,
        "lr": 0.001,
        "min_lr": 0.0001,
        "lr_warmup_iters": 3,
        "eval_interval": 10,
        "eval_iters": 2,
        "save_interval": 10,
    },
    checkpoints: str = "/mnt/flagscale/checkpoints",
    code_version: str = "release",
    experiment: str = "flagscale-distillation",
    nodes: int = 2,
    accelerator_count: str = "8",
    pods: dict = {"cpu": "16", "memory": "64Gi"},
    of_many: dict = {},
    teacher_uri: str = "s3://bucket/teacher",
    student_uri: str = "s3://bucket/student",
    dataset_uri: str = "s3://bucket/dataset",
) -> None:
    """Train the student as distil-student does, as a TrainJob: starts it and follows it."""
    distil_student_on_nodes(
        distillation_recipe=distillation_recipe,
        training_recipe=training_recipe,
        checkpoints=checkpoints,
        code_version=code_version,
        experiment=experiment,
        nodes=nodes,
        accelerator_count=accelerator_count,
        pods=pods,
        of_many=of_many,
        teacher=dsl.importer(artifact_uri=teacher_uri, artifact_class=dsl.Model).output,
        student=dsl.importer(artifact_uri=student_uri, artifact_class=dsl.Model).output,
        dataset=dsl.importer(artifact_uri=dataset_uri, artifact_class=dsl.Dataset).output,
    )
