"""The step that compares the models on held-out text."""

from kfp import dsl

from components.image import image


@dsl.component(base_image=image(), install_kfp_package=False)
def evaluate(
    evaluation: dict,
    code_version: str,
    experiment: str,
    teacher: dsl.Input[dsl.Model],
    student: dsl.Input[dsl.Model],
    distilled: dsl.Input[dsl.Model],
    dataset: dsl.Input[dsl.Dataset],
    results: dsl.Output[dsl.Artifact],
    report: dsl.Output[dsl.HTML],
    metrics: dsl.Output[dsl.Metrics],
) -> None:
    """Compare teacher, student before and student after training on the held-out test split.

    Args:
        evaluation: the recipe's section `evaluation`.
        code_version: changes when the code does; KFP's cache sees only parameters.
        experiment: MLflow's, unless KFP's plugin or the runner has chosen one.
        teacher: from prepare-teacher.
        student: from convert-student: before training.
        distilled: from distil-student: after training.
        dataset: from prepare-data.
        results: every figure with its confidence interval, per document too, and the report.
        report: tables, curves and continuations in one page that needs no network.
        metrics: the headline figures.
    """
    from flagscale.steps.step_process import step_process

    with step_process("evaluate", experiment=experiment) as step:
        from pathlib import Path

        from flagscale.recipe import EvaluationRecipe
        from flagscale.steps.evaluate import evaluate

        figures = evaluate(
            step.section(EvaluationRecipe, evaluation),
            teacher=step.input(teacher.path),
            student=step.input(student.path),
            distilled=step.input(distilled.path),
            dataset=step.input(dataset.path),
            output=Path(results.path),
        )
        step.copy(Path(results.path) / "report.html", report.path)
        step.report(figures, metrics)
