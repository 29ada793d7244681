"""The step that ranks the variants of a sweep."""

from kfp import dsl

from components.image import image


@dsl.component(base_image=image(), install_kfp_package=False)
def leaderboard(
    variants: list,
    metric: str,
    code_version: str,
    experiment: str,
    evaluations: dsl.Input[list[dsl.Artifact]],
    leaderboard: dsl.Output[dsl.Artifact],
    leaderboard_report: dsl.Output[dsl.HTML],
    leaderboard_summary: dsl.Output[dsl.Markdown],
    ranking_metrics: dsl.Output[dsl.Metrics],
) -> None:
    """Rank the variants of a sweep, and show them in MLflow as children of the sweep's run.

    Args:
        variants: of each the name, and the sections student, distillation and training.
        metric: figure that decides: kl, lm_loss, top1_agreement or accuracy.
        code_version: changes when the code does; KFP's cache sees only parameters.
        experiment: MLflow's, unless KFP's plugin or the runner has chosen one.
        evaluations: from evaluate, of each variant, in any order.
        leaderboard: every figure with its interval and its difference to the best, as JSON and
            CSV, and the report.
        leaderboard_report: the table and a chart in one page that needs no network.
        leaderboard_summary: the table in short.
        ranking_metrics: the winner's headline figures.
    """
    from flagscale.execution.step_process import step_process

    with step_process("leaderboard", experiment=experiment) as step:
        from pathlib import Path

        from flagscale.steps.leaderboard import rank_variants

        figures = rank_variants(
            step.literal(variants),
            metric,
            [step.input_or_absent("evaluations", one) for one in evaluations],
            Path(leaderboard.path),
        )
        step.copy(Path(leaderboard.path) / "report.html", leaderboard_report.path)
        step.copy(Path(leaderboard.path) / "summary.md", leaderboard_summary.path)
        step.report(figures, ranking_metrics)
