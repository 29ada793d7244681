"""The step that compares the models on held-out text."""

from kfp import dsl

from components.image import image


@dsl.component(base_image=image(), install_kfp_package=False)
def evaluate(
    evaluation_recipe: dict,
    models_recipe: dict,
    code_version: str,
    experiment: str,
    accelerators: str,
    record_failure: bool,
    teacher: dsl.Input[dsl.Model],
    student: dsl.Input[dsl.Model],
    distilled_student: dsl.Input[dsl.Model],
    dataset: dsl.Input[dsl.Dataset],
    evaluation: dsl.Output[dsl.Artifact],
    report: dsl.Output[dsl.HTML],
    evaluation_summary: dsl.Output[dsl.Markdown],
    evaluation_metrics: dsl.Output[dsl.Metrics],
) -> None:
    """Compare teacher, student before and student after training on the held-out test split.

    Args:
        evaluation_recipe: the recipe's section `evaluation`.
        models_recipe: the recipe's section `models`.
        code_version: changes when the code does; KFP's cache sees only parameters.
        experiment: MLflow's, unless KFP's plugin or the runner has chosen one.
        accelerators: number of those the pod was given, as text; it fails if it cannot use them.
        record_failure: whether a failure is written into the output, so that the steps of other
            students go on, instead of ending the run.
        teacher: from prepare-teacher.
        student: from convert-student: before training.
        distilled_student: from distil-student: after training.
        dataset: from prepare-data.
        evaluation: every figure with its confidence interval, per document too, and the report.
        report: verdict, tables, curves and continuations in one page that needs no network.
        evaluation_summary: the verdict and the headline figures, in Markdown.
        evaluation_metrics: the headline figures.
    """
    from flagscale.execution.step_process import step_process

    with step_process(
        "evaluate",
        experiment,
        accelerators,
        record_failure_at=evaluation.path if record_failure else None,
    ) as step:
        step.require(distilled_student=distilled_student, student=student)
        from pathlib import Path

        from flagscale.recipe import EvaluationRecipe, ModelsRecipe
        from flagscale.steps.evaluate import evaluate

        figures = evaluate(
            step.section(EvaluationRecipe, evaluation_recipe),
            teacher=step.input("teacher", teacher),
            student=step.input("student", student),
            distilled=step.input("distilled_student", distilled_student),
            dataset=step.input("dataset", dataset),
            output=Path(evaluation.path),
            models=step.section(ModelsRecipe, models_recipe),
        )
        step.copy(Path(evaluation.path) / "report.html", report.path)
        step.copy(Path(evaluation.path) / "summary.md", evaluation_summary.path)
        step.report(figures, evaluation_metrics)
