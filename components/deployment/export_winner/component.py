"""The step that exports the best student of a sweep."""

from kfp import dsl

from components.image import image


@dsl.component(base_image=image(), install_kfp_package=False)
def export_winner(
    export_recipe: dict,
    models_recipe: dict,
    code_version: str,
    experiment: str,
    accelerators: str,
    distilled_students: dsl.Input[list[dsl.Model]],
    evaluations: dsl.Input[list[dsl.Artifact]],
    leaderboard: dsl.Input[dsl.Artifact],
    exported_student: dsl.Output[dsl.Model],
    lineage: dsl.Output[dsl.HTML],
    winners_evaluation: dsl.Output[dsl.Artifact],
    export_metrics: dsl.Output[dsl.Metrics],
) -> None:
    """Export the student that leads the leaderboard, as export-student does with a run's only one.

    Args:
        export_recipe: the recipe's section `export`.
        models_recipe: the recipe's section `models`.
        code_version: changes when the code does; KFP's cache sees only parameters.
        experiment: MLflow's, unless KFP's plugin or the runner has chosen one.
        accelerators: number of those the pod was given, as text; it fails if it cannot use them.
        distilled_students: from distil-student, of each variant, in any order.
        evaluations: from evaluate, of each variant, in any order.
        leaderboard: from leaderboard: says which is the winner.
        exported_student: config, safetensors, tokenizer and model card.
        lineage: which data, teacher, code and recipe made the student, step by step.
        winners_evaluation: of the winner, from `evaluations`.
        export_metrics: largest logit difference after the round trip.
    """
    from flagscale.execution.step_process import step_process

    with step_process("export-winner", experiment, accelerators) as step:
        from pathlib import Path

        from flagscale.recipe import ExportRecipe, ModelsRecipe
        from flagscale.steps.export_winner import export_winner

        figures = export_winner(
            step.section(ExportRecipe, export_recipe),
            students=[
                step.input_or_absent("distilled_students", one) for one in distilled_students
            ],
            evaluations=[step.input_or_absent("evaluations", one) for one in evaluations],
            leaderboard=step.input("leaderboard", leaderboard),
            output=step.output(exported_student.path),
            winners_evaluation=Path(winners_evaluation.path),
            models=step.section(ModelsRecipe, models_recipe),
            lineage=Path(lineage.path),
        )
        step.report(figures, export_metrics)
