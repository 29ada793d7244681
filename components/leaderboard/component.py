"""The step that ranks the variants of a sweep."""

from kfp import dsl

from components.image import image


@dsl.component(base_image=image(), install_kfp_package=False)
def leaderboard(
    variants: list,
    metric: str,
    code_version: str,
    experiment: str,
    results: dsl.Input[list[dsl.Artifact]],
    table: dsl.Output[dsl.Artifact],
    report: dsl.Output[dsl.HTML],
    metrics: dsl.Output[dsl.Metrics],
) -> None:
    """Rank the variants of a sweep, and show them in MLflow as children of the sweep's run.

    Args:
        variants: of each the name, and the sections student, distillation and training.
        metric: figure that decides: kl, lm_loss, top1_agreement or accuracy.
        code_version: changes when the code does; KFP's cache sees only parameters.
        experiment: MLflow's, unless KFP's plugin or the runner has chosen one.
        results: from evaluate, of each variant, in any order.
        table: every figure with its interval and its difference to the best, as JSON and CSV, and
            the report.
        report: the table and a chart in one page that needs no network.
        metrics: the winner's headline figures.
    """
    from flagscale.steps.step_process import step_process

    with step_process("leaderboard", experiment=experiment) as step:
        from pathlib import Path

        from flagscale.steps.leaderboard import leaderboard

        found = [step.input(result.path) for result in results]
        figures = leaderboard(variants, metric, found, Path(table.path))
        step.copy(Path(table.path) / "report.html", report.path)
        step.report(figures, metrics)
