"""A pipeline of record-many alone, on artifacts of other runs.

Made by `python -m components` from the component's signature: change it there.
"""

from kfp import dsl

from .component import record_many


@dsl.pipeline(name="record-many-example")
def record_many_example(
    experiment: str = "flagscale-distillation",
    dataset_metrics_uri: str = "s3://bucket/dataset_metrics",
    teacher_metrics_uri: str = "s3://bucket/teacher_metrics",
    student_metrics_uris: list = ["s3://bucket/student_metrics/1", "s3://bucket/student_metrics/2"],
    training_metrics_uris: list = [
        "s3://bucket/training_metrics/1",
        "s3://bucket/training_metrics/2",
    ],
    ranking_metrics_uri: str = "s3://bucket/ranking_metrics",
    export_metrics_uri: str = "s3://bucket/export_metrics",
    ranking_uri: str = "s3://bucket/ranking",
) -> None:
    """Show in MLflow the steps and students that the cache served; end the run there."""
    with dsl.ParallelFor(student_metrics_uris) as student_metrics_uri:
        student_metrics = dsl.importer(artifact_uri=student_metrics_uri, artifact_class=dsl.Metrics)
    with dsl.ParallelFor(training_metrics_uris) as training_metrics_uri:
        training_metrics = dsl.importer(
            artifact_uri=training_metrics_uri, artifact_class=dsl.Metrics
        )
    record_many(
        experiment=experiment,
        dataset_metrics=dsl.importer(
            artifact_uri=dataset_metrics_uri, artifact_class=dsl.Metrics
        ).output,
        teacher_metrics=dsl.importer(
            artifact_uri=teacher_metrics_uri, artifact_class=dsl.Metrics
        ).output,
        student_metrics=dsl.Collected(student_metrics.output),
        training_metrics=dsl.Collected(training_metrics.output),
        ranking_metrics=dsl.importer(
            artifact_uri=ranking_metrics_uri, artifact_class=dsl.Metrics
        ).output,
        export_metrics=dsl.importer(
            artifact_uri=export_metrics_uri, artifact_class=dsl.Metrics
        ).output,
        ranking=dsl.importer(artifact_uri=ranking_uri, artifact_class=dsl.Artifact).output,
    )
