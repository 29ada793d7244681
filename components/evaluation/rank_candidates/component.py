"""The step that ends a rung of a search."""

from kfp import dsl

from components.image import image


@dsl.component(base_image=image(), install_kfp_package=False)
def rank_candidates(
    candidates: list,
    ranking_recipe: dict,
    metric: str,
    checkpoints: str,
    code_version: str,
    experiment: str,
    results: dsl.Input[list[dsl.Model]],
    search: dsl.Output[dsl.Artifact],
    search_report: dsl.Output[dsl.HTML],
    search_summary: dsl.Output[dsl.Markdown],
    ranking_metrics: dsl.Output[dsl.Metrics],
    before: dsl.Input[dsl.Artifact] = None,
) -> None:
    """Rank the candidates of a rung on the samples that all were measured on; say who goes on.

    Args:
        candidates: all of the search: of each the name and the section student.
        ranking_recipe: which rung ends, how many candidates go on at most, and when a difference
            is clear.
        metric: held-out loss that decides: distillation_loss or lm_loss.
        checkpoints: folder or URL of training checkpoints; those of who is dropped are deleted.
        code_version: changes when the code does; KFP's cache sees only parameters.
        experiment: MLflow's, unless KFP's plugin or the runner has chosen one.
        results: from distil-student, of each candidate of the rung, in any order.
        search: every candidate with its losses, intervals, sizes and cost, and what became of it.
        search_report: the same as one page that needs no network.
        search_summary: the table in short.
        ranking_metrics: how many go on, and the best loss.
        before: from rank-candidates, of the rung before; none after the first one.
    """
    from flagscale.execution.step_process import step_process

    with step_process("rank-candidates", experiment=experiment) as step:
        from pathlib import Path

        from flagscale.recipe.search import RankingRecipe
        from flagscale.steps.rank_candidates import rank_candidates

        figures = rank_candidates(
            step.section(RankingRecipe, ranking_recipe),
            metric,
            step.literal(candidates),
            results=[step.input_or_absent("results", one) for one in results],
            before=step.input("before", before) if before else None,
            checkpoints=step.literal(checkpoints),
            output=Path(search.path),
        )
        step.copy(Path(search.path) / "report.html", search_report.path)
        step.copy(Path(search.path) / "summary.md", search_summary.path)
        step.report(figures, ranking_metrics)
