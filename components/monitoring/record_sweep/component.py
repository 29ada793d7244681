"""The step that completes a sweep's run in MLflow."""

from kfp import dsl

from components.image import image


@dsl.component(base_image=image(), install_kfp_package=False)
def record_sweep(
    experiment: str,
    dataset_metrics: dsl.Input[dsl.Metrics],
    teacher_metrics: dsl.Input[dsl.Metrics],
    student_metrics: dsl.Input[list[dsl.Metrics]],
    training_metrics: dsl.Input[list[dsl.Metrics]],
    evaluation_metrics: dsl.Input[list[dsl.Metrics]],
    leaderboard_metrics: dsl.Input[dsl.Metrics],
    export_metrics: dsl.Input[dsl.Metrics],
    leaderboard: dsl.Input[dsl.Artifact],
    outputs_metrics: dsl.Input[dsl.Metrics] = None,
) -> None:
    """Show in MLflow the steps and variants that the cache served; end the run there.

    Args:
        experiment: MLflow's, unless KFP's plugin has chosen one.
        dataset_metrics: from prepare-data.
        teacher_metrics: from prepare-teacher.
        student_metrics: from convert-student, of each variant.
        training_metrics: from distil-student, of each variant.
        evaluation_metrics: from evaluate, of each variant.
        leaderboard_metrics: from leaderboard.
        export_metrics: from export-winner.
        leaderboard: from leaderboard: every variant's figures.
        outputs_metrics: from cache-teacher, where there is one.
    """
    from flagscale.execution.step_process import step_process

    with step_process("record-sweep", experiment=experiment) as step:
        from pathlib import Path

        from flagscale.steps.record_sweep import record_sweep

        record_sweep(
            {
                "prepare-data": [Path(dataset_metrics.path)],
                "prepare-teacher": [Path(teacher_metrics.path)],
                "cache-teacher": [Path(outputs_metrics.path)] if outputs_metrics else [],
                "convert-student": [Path(one.path) for one in student_metrics],
                "distil-student": [Path(one.path) for one in training_metrics],
                "evaluate": [Path(one.path) for one in evaluation_metrics],
                "leaderboard": [Path(leaderboard_metrics.path)],
                "export-student": [Path(export_metrics.path)],
            },
            step.input("leaderboard", leaderboard),
        )
