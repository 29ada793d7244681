"""The step that ends a rung of a search."""

from kfp import dsl

from components.image import image


@dsl.component(base_image=image(), install_kfp_package=False)
def rank_candidates(
    candidates: list,
    rung: int,
    metric: str,
    slots: int,
    bootstrap_samples: int,
    confidence: float,
    margin: float,
    checkpoints: str,
    code_version: str,
    experiment: str,
    results: dsl.Input[list[dsl.Model]],
    search: dsl.Output[dsl.Artifact],
    search_report: dsl.Output[dsl.HTML],
    search_metrics: dsl.Output[dsl.Metrics],
    before: dsl.Input[dsl.Artifact] = None,
) -> None:
    """Rank the candidates of a rung on the samples that all were measured on; say who goes on.

    Args:
        candidates: all of the search: of each the name and the section student.
        rung: which one ends, from 1.
        metric: held-out loss that decides: distillation_loss or lm_loss.
        slots: how many candidates go on at most.
        bootstrap_samples: resamples of the samples for the intervals.
        confidence: mass of the intervals.
        margin: share of the best's loss by which a candidate must be clearly worse to be dropped
            though there is room.
        checkpoints: folder or URL of training checkpoints; those of who is dropped are deleted.
        code_version: changes when the code does; KFP's cache sees only parameters.
        experiment: MLflow's, unless KFP's plugin or the runner has chosen one.
        results: from distil-student, of each candidate of the rung, in any order.
        search: every candidate with its losses, intervals, sizes and cost, and what became of it.
        search_report: the same as one page that needs no network.
        search_metrics: how many go on, and the best loss.
        before: from rank-candidates, of the rung before; none after the first one.
    """
    from flagscale.execution.step_process import step_process

    with step_process("rank-candidates", experiment=experiment) as step:
        from pathlib import Path

        from flagscale.steps.rank_candidates import Ranking, rank_candidates

        figures = rank_candidates(
            Ranking(rung, metric, slots, bootstrap_samples, confidence, margin),
            step.literal(candidates),
            results=[step.input_or_absent("results", one) for one in results],
            before=step.input("before", before) if before else None,
            checkpoints=step.literal(checkpoints),
            output=Path(search.path),
        )
        step.copy(Path(search.path) / "report.html", search_report.path)
        step.report(figures, search_metrics)
