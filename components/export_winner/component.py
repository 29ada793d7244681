"""The step that exports the best student of a sweep."""

from kfp import dsl

from components.image import image


@dsl.component(base_image=image(), install_kfp_package=False)
def export_winner(
    export: dict,
    code_version: str,
    experiment: str,
    models: dsl.Input[list[dsl.Model]],
    results: dsl.Input[list[dsl.Artifact]],
    table: dsl.Input[dsl.Artifact],
    model: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
) -> None:
    """Export the student that leads the leaderboard, as export-student does with a run's only one.

    Args:
        export: the recipe's section `export`.
        code_version: changes when the code does; KFP's cache sees only parameters.
        experiment: MLflow's, unless KFP's plugin or the runner has chosen one.
        models: from distil-student, of each variant, in any order.
        results: from evaluate, of each variant, in any order.
        table: from leaderboard: says which is the winner.
        model: config, safetensors, tokenizer and model card.
        metrics: largest logit difference after the round trip.
    """
    from flagscale.steps.step_process import step_process

    with step_process("export-winner", experiment=experiment) as step:
        from flagscale.recipe import ExportRecipe
        from flagscale.steps.export_winner import export_winner

        figures = export_winner(
            step.section(ExportRecipe, export),
            models=[step.input(one.path) for one in models],
            results=[step.input(one.path) for one in results],
            leaderboard=step.input(table.path),
            output=step.output(model.path),
        )
        step.report(figures, metrics)
