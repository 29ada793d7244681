"""A pipeline of record-run alone, on artifacts of other runs.

Made by `python -m components` from the component's signature: change it there.
"""

from kfp import dsl

from .component import record_run


@dsl.pipeline(name="record-run-example")
def record_run_example(
    experiment: str = "flagscale-distillation",
    dataset_metrics_uri: str = "s3://bucket/dataset_metrics",
    teacher_metrics_uri: str = "s3://bucket/teacher_metrics",
    student_metrics_uri: str = "s3://bucket/student_metrics",
    training_metrics_uri: str = "s3://bucket/training_metrics",
    evaluation_metrics_uri: str = "s3://bucket/evaluation_metrics",
    export_metrics_uri: str = "s3://bucket/export_metrics",
) -> None:
    """Show in MLflow the steps that the cache served, which could not do so; end the run there."""
    record_run(
        experiment=experiment,
        dataset_metrics=dsl.importer(
            artifact_uri=dataset_metrics_uri, artifact_class=dsl.Metrics
        ).output,
        teacher_metrics=dsl.importer(
            artifact_uri=teacher_metrics_uri, artifact_class=dsl.Metrics
        ).output,
        student_metrics=dsl.importer(
            artifact_uri=student_metrics_uri, artifact_class=dsl.Metrics
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
    )
