"""The step that completes the run of many students, a sweep's or a search's, in MLflow."""

from kfp import dsl

from components.image import image


@dsl.component(base_image=image(), install_kfp_package=False)
def record_many(
    experiment: str,
    dataset_metrics: dsl.Input[dsl.Metrics],
    teacher_metrics: dsl.Input[dsl.Metrics],
    student_metrics: dsl.Input[list[dsl.Metrics]],
    training_metrics: dsl.Input[list[dsl.Metrics]],
    ranking_metrics: dsl.Input[dsl.Metrics],
    export_metrics: dsl.Input[dsl.Metrics],
    ranking: dsl.Input[dsl.Artifact],
    outputs_metrics: dsl.Input[dsl.Metrics] = None,
    importance_metrics: dsl.Input[dsl.Metrics] = None,
    evaluation_metrics: dsl.Input[list[dsl.Metrics]] = None,
    winner_training_metrics: dsl.Input[dsl.Metrics] = None,
    winner_evaluation_metrics: dsl.Input[dsl.Metrics] = None,
    task_metrics: dsl.Input[dsl.Metrics] = None,
) -> None:
    """Show in MLflow the steps and students that the cache served; end the run there.

    Args:
        experiment: MLflow's, unless KFP's plugin has chosen one.
        dataset_metrics: from prepare-data.
        teacher_metrics: from prepare-teacher.
        student_metrics: from convert-student, of each student.
        training_metrics: from distil-student, of each student; of a search in the first rung.
        ranking_metrics: from leaderboard, or the last rank-candidates.
        export_metrics: from export-winner, of a search from export-student.
        ranking: from leaderboard, or the last rank-candidates: every student's figures.
        outputs_metrics: from cache-teacher, where there is one.
        importance_metrics: from measure-layers, where there is one.
        evaluation_metrics: from evaluate, of each student of a sweep.
        winner_training_metrics: from distil-student, of the training to the end of a search.
        winner_evaluation_metrics: from evaluate, of a search.
        task_metrics: from evaluate-tasks, where there is one.
    """
    from flagscale.execution.step_process import step_process

    with step_process("record-many", experiment=experiment) as step:
        from pathlib import Path

        from flagscale.steps.record_many import record_many

        of_winner = winner_training_metrics, winner_evaluation_metrics
        trained, evaluated = ([one] if one else [] for one in of_winner)
        record_many(
            {
                "prepare-data": [Path(dataset_metrics.path)],
                "prepare-teacher": [Path(teacher_metrics.path)],
                "cache-teacher": [Path(outputs_metrics.path)] if outputs_metrics else [],
                "measure-layers": [Path(importance_metrics.path)] if importance_metrics else [],
                "convert-student": [Path(one.path) for one in student_metrics],
                "distil-student": [Path(one.path) for one in (*training_metrics, *trained)],
                "evaluate": [Path(one.path) for one in evaluation_metrics or evaluated],
                "export-student": [Path(export_metrics.path)],
                "evaluate-tasks": [Path(task_metrics.path)] if task_metrics else [],
            },
            Path(ranking_metrics.path),
            step.input("ranking", ranking),
        )
