"""The step that completes a run in MLflow."""

from kfp import dsl

from components.image import image


@dsl.component(base_image=image(), install_kfp_package=False)
def record_run(
    experiment: str,
    dataset_metrics: dsl.Input[dsl.Metrics],
    teacher_metrics: dsl.Input[dsl.Metrics],
    student_metrics: dsl.Input[dsl.Metrics],
    training_metrics: dsl.Input[dsl.Metrics],
    evaluation_metrics: dsl.Input[dsl.Metrics],
    export_metrics: dsl.Input[dsl.Metrics],
    outputs_metrics: dsl.Input[dsl.Metrics] = None,
    task_metrics: dsl.Input[dsl.Metrics] = None,
) -> None:
    """Show in MLflow the steps that the cache served, which could not do so; end the run there.

    Args:
        experiment: MLflow's, unless KFP's plugin has chosen one.
        dataset_metrics: from prepare-data.
        teacher_metrics: from prepare-teacher.
        student_metrics: from convert-student.
        training_metrics: from distil-student.
        evaluation_metrics: from evaluate.
        export_metrics: from export-student.
        outputs_metrics: from cache-teacher, where there is one.
        task_metrics: from evaluate-tasks, where there is one.
    """
    from flagscale.execution.step_process import step_process

    with step_process("record-run", experiment=experiment):
        from pathlib import Path

        from flagscale.steps.record_run import record_run

        record_run(
            {
                "prepare-data": [Path(dataset_metrics.path)],
                "prepare-teacher": [Path(teacher_metrics.path)],
                "cache-teacher": [Path(outputs_metrics.path)] if outputs_metrics else [],
                "convert-student": [Path(student_metrics.path)],
                "distil-student": [Path(training_metrics.path)],
                "evaluate": [Path(evaluation_metrics.path)],
                "export-student": [Path(export_metrics.path)],
                "evaluate-tasks": [Path(task_metrics.path)] if task_metrics else [],
            }
        )
