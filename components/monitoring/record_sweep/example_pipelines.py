"""A pipeline of record-sweep alone, on artifacts of other runs.

Made by `python -m components` from the component's signature: change it there.
"""

from kfp import dsl

from .component import record_sweep


@dsl.pipeline(name="record-sweep-example")
def record_sweep_example(
    experiment: str = "flagscale-distillation",
    dataset_metrics_uri: str = "s3://bucket/dataset_metrics",
    teacher_metrics_uri: str = "s3://bucket/teacher_metrics",
    student_metrics_uris: list = ["s3://bucket/student_metrics/1", "s3://bucket/student_metrics/2"],
    training_metrics_uris: list = [
        "s3://bucket/training_metrics/1",
        "s3://bucket/training_metrics/2",
    ],
    evaluation_metrics_uris: list = [
        "s3://bucket/evaluation_metrics/1",
        "s3://bucket/evaluation_metrics/2",
    ],
    leaderboard_metrics_uri: str = "s3://bucket/leaderboard_metrics",
    export_metrics_uri: str = "s3://bucket/export_metrics",
    leaderboard_uri: str = "s3://bucket/leaderboard",
) -> None:
    """Show in MLflow the steps and variants that the cache served; end the run there."""
    with dsl.ParallelFor(student_metrics_uris) as student_metrics_uri:
        student_metrics = dsl.importer(artifact_uri=student_metrics_uri, artifact_class=dsl.Metrics)
    with dsl.ParallelFor(training_metrics_uris) as training_metrics_uri:
        training_metrics = dsl.importer(
            artifact_uri=training_metrics_uri, artifact_class=dsl.Metrics
        )
    with dsl.ParallelFor(evaluation_metrics_uris) as evaluation_metrics_uri:
        evaluation_metrics = dsl.importer(
            artifact_uri=evaluation_metrics_uri, artifact_class=dsl.Metrics
        )
    record_sweep(
        experiment=experiment,
        dataset_metrics=dsl.importer(
            artifact_uri=dataset_metrics_uri, artifact_class=dsl.Metrics
        ).output,
        teacher_metrics=dsl.importer(
            artifact_uri=teacher_metrics_uri, artifact_class=dsl.Metrics
        ).output,
        student_metrics=dsl.Collected(student_metrics.output),
        training_metrics=dsl.Collected(training_metrics.output),
        evaluation_metrics=dsl.Collected(evaluation_metrics.output),
        leaderboard_metrics=dsl.importer(
            artifact_uri=leaderboard_metrics_uri, artifact_class=dsl.Metrics
        ).output,
        export_metrics=dsl.importer(
            artifact_uri=export_metrics_uri, artifact_class=dsl.Metrics
        ).output,
        leaderboard=dsl.importer(artifact_uri=leaderboard_uri, artifact_class=dsl.Artifact).output,
    )
