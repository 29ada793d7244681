"""The step that promotes a student, if it shows what the recipe asks."""

from typing import NamedTuple

from kfp import dsl

from components.image import image


@dsl.component(base_image=image(), install_kfp_package=False)
def promote(
    promote_recipe: dict,
    code_version: str,
    experiment: str,
    evaluation: dsl.Input[dsl.Artifact],
    exported_student: dsl.Input[dsl.Model],
    export_metrics: dsl.Input[dsl.Metrics],
    promotion: dsl.Output[dsl.Artifact],
    promotion_report: dsl.Output[dsl.Markdown],
    promotion_metrics: dsl.Output[dsl.Metrics],
    task_evaluation: dsl.Input[dsl.Artifact] = None,
) -> NamedTuple("Promoted", [("promoted", bool)]):  # type: ignore[valid-type]
    """Judge the student by the recipe's conditions; if all hold, move the alias in MLflow to it.

    A student that does not pass ends nothing: what depends on `promoted` is for later tasks to ask.

    Args:
        promote_recipe: the recipe's section `promote`.
        code_version: changes when the code does; KFP's cache sees only parameters.
        experiment: MLflow's, unless KFP's plugin or the runner has chosen one.
        evaluation: from evaluate, or of a sweep from export-winner.
        exported_student: from export-student or export-winner.
        export_metrics: from there: says in which run of MLflow the student was registered.
        promotion: each condition with its margin and interval, and what came of it.
        promotion_report: the same as a table.
        promotion_metrics: whether it was promoted, and how many conditions hold.
        task_evaluation: from evaluate-tasks, where the student was asked tasks.
        promoted: whether all conditions hold, and the alias is the student's.
    """
    from flagscale.execution.step_process import step_process

    with step_process("promote", experiment=experiment) as step:
        from pathlib import Path

        from flagscale.recipe import PromoteRecipe
        from flagscale.steps.promote import promote

        figures = promote(
            step.section(PromoteRecipe, promote_recipe),
            evaluation=step.input("evaluation", evaluation),
            tasks=step.input("task_evaluation", task_evaluation) if task_evaluation else None,
            exported=step.manifest("exported_student", exported_student),
            export_metrics=Path(export_metrics.path),
            output=Path(promotion.path),
        )
        step.copy(Path(promotion.path) / "gate.md", promotion_report.path)
        step.report(figures, promotion_metrics)
        return (bool(figures["promoted"]),)
