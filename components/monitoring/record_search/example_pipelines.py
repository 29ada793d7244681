"""A pipeline of record-search alone, on artifacts of other runs.

Made by `python -m components` from the component's signature: change it there.
"""

from kfp import dsl

from .component import record_search


@dsl.pipeline(name="record-search-example")
def record_search_example(
    experiment: str = "flagscale-distillation",
    dataset_metrics_uri: str = "s3://bucket/dataset_metrics",
    teacher_metrics_uri: str = "s3://bucket/teacher_metrics",
    student_metrics_uris: list = ["s3://bucket/student_metrics/1", "s3://bucket/student_metrics/2"],
    rung_metrics_uris: list = ["s3://bucket/rung_metrics/1", "s3://bucket/rung_metrics/2"],
    search_metrics_uri: str = "s3://bucket/search_metrics",
    training_metrics_uri: str = "s3://bucket/training_metrics",
    evaluation_metrics_uri: str = "s3://bucket/evaluation_metrics",
    export_metrics_uri: str = "s3://bucket/export_metrics",
    search_uri: str = "s3://bucket/search",
) -> None:
    """Show in MLflow the steps and candidates that the cache served; end the run there."""
    with dsl.ParallelFor(student_metrics_uris) as student_metrics_uri:
        student_metrics = dsl.importer(artifact_uri=student_metrics_uri, artifact_class=dsl.Metrics)
    with dsl.ParallelFor(rung_metrics_uris) as rung_metrics_uri:
        rung_metrics = dsl.importer(artifact_uri=rung_metrics_uri, artifact_class=dsl.Metrics)
    record_search(
        experiment=experiment,
        dataset_metrics=dsl.importer(
            artifact_uri=dataset_metrics_uri, artifact_class=dsl.Metrics
        ).output,
        teacher_metrics=dsl.importer(
            artifact_uri=teacher_metrics_uri, artifact_class=dsl.Metrics
        ).output,
        student_metrics=dsl.Collected(student_metrics.output),
        rung_metrics=dsl.Collected(rung_metrics.output),
        search_metrics=dsl.importer(
            artifact_uri=search_metrics_uri, artifact_class=dsl.Metrics
        ).output,
        training_metrics=dsl.importer(
            artifact_uri=training_metrics_uri, artifact_class=dsl.Metrics
        ).output,
        evaluation_metrics=dsl.importer(
            artifact_uri=evaluation_metrics_uri, artifact_class=dsl.Metrics
        ).output,
        export_metrics=dsl.importer(
            artifact_uri=export_metrics_uri, artifact_class=dsl.Metrics
        ).output,
        search=dsl.importer(artifact_uri=search_uri, artifact_class=dsl.Artifact).output,
    )
