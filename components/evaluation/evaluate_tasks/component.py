"""The step that asks teacher and exported student lm-eval's tasks."""

from kfp import dsl

from components.image import image


@dsl.component(base_image=image(), install_kfp_package=False)
def evaluate_tasks(
    tasks_recipe: dict,
    models_recipe: dict,
    code_version: str,
    experiment: str,
    accelerators: str,
    teacher: dsl.Input[dsl.Model],
    dataset: dsl.Input[dsl.Dataset],
    evaluation: dsl.Input[dsl.Artifact],
    exported_student: dsl.Input[dsl.Model],
    task_evaluation: dsl.Output[dsl.Artifact],
    task_report: dsl.Output[dsl.HTML],
    task_summary: dsl.Output[dsl.Markdown],
    task_metrics: dsl.Output[dsl.Metrics],
) -> None:
    """Ask the teacher and the exported student tasks of lm-eval, and measure how fast they write.

    Args:
        tasks_recipe: the recipe's section `tasks`.
        models_recipe: the recipe's section `models`.
        code_version: changes when the code does; KFP's cache sees only parameters.
        experiment: MLflow's, unless KFP's plugin or the runner has chosen one.
        accelerators: number of those the pod was given, as text; it fails if it cannot use them.
        teacher: from prepare-teacher.
        dataset: from prepare-data: held-out tasks are made of its test split.
        evaluation: from evaluate.
        exported_student: from export-student, or a sweep's export-winner.
        task_evaluation: every model's figures with their standard errors, and of each example.
        task_report: evaluate's, with the tasks and the speed of generation.
        task_summary: the verdict, the tasks and the headline figures.
        task_metrics: the figures, and the speed of generation.
    """
    from flagscale.execution.step_process import step_process

    with step_process("evaluate-tasks", experiment, accelerators) as step:
        from pathlib import Path

        from flagscale.recipe import ModelsRecipe, TasksRecipe
        from flagscale.steps.evaluate_tasks import evaluate_tasks

        figures = evaluate_tasks(
            step.section(TasksRecipe, tasks_recipe),
            teacher=step.input("teacher", teacher),
            dataset=step.input("dataset", dataset),
            evaluation=step.input("evaluation", evaluation),
            exported=step.input("exported_student", exported_student),
            output=Path(task_evaluation.path),
            models=step.section(ModelsRecipe, models_recipe),
        )
        step.copy(Path(task_evaluation.path) / "report.html", task_report.path)
        step.copy(Path(task_evaluation.path) / "summary.md", task_summary.path)
        step.report(figures, task_metrics)
