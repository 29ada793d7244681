"""The step that completes a search's run in MLflow."""

from kfp import dsl

from components.image import image


@dsl.component(base_image=image(), install_kfp_package=False)
def record_search(
    experiment: str,
    dataset_metrics: dsl.Input[dsl.Metrics],
    teacher_metrics: dsl.Input[dsl.Metrics],
    student_metrics: dsl.Input[list[dsl.Metrics]],
    rung_metrics: dsl.Input[list[dsl.Metrics]],
    search_metrics: dsl.Input[dsl.Metrics],
    training_metrics: dsl.Input[dsl.Metrics],
    evaluation_metrics: dsl.Input[dsl.Metrics],
    export_metrics: dsl.Input[dsl.Metrics],
    search: dsl.Input[dsl.Artifact],
    outputs_metrics: dsl.Input[dsl.Metrics] = None,
) -> None:
    """Show in MLflow the steps and candidates that the cache served; end the run there.

    Args:
        experiment: MLflow's, unless KFP's plugin has chosen one.
        dataset_metrics: from prepare-data.
        teacher_metrics: from prepare-teacher.
        student_metrics: from convert-student, of each candidate.
        rung_metrics: from distil-student, of each candidate in the first rung.
        search_metrics: from the last rank-candidates.
        training_metrics: from distil-student, of the winner's training to the end.
        evaluation_metrics: from evaluate.
        export_metrics: from export-student.
        search: from the last rank-candidates: every candidate's figures.
        outputs_metrics: from cache-teacher, where there is one.
    """
    from flagscale.execution.step_process import step_process

    with step_process("record-search", experiment=experiment) as step:
        from pathlib import Path

        from flagscale.steps.record_search import record_search

        record_search(
            {
                "prepare-data": [Path(dataset_metrics.path)],
                "prepare-teacher": [Path(teacher_metrics.path)],
                "cache-teacher": [Path(outputs_metrics.path)] if outputs_metrics else [],
                "convert-student": [Path(one.path) for one in student_metrics],
                "distil-student": [Path(one.path) for one in (*rung_metrics, training_metrics)],
                "rank-candidates": [Path(search_metrics.path)],
                "evaluate": [Path(evaluation_metrics.path)],
                "export-student": [Path(export_metrics.path)],
            },
            step.input("search", search),
        )
