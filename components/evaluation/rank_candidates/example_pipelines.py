"""A pipeline of rank-candidates alone, on artifacts of other runs.

Made by `python -m components` from the component's signature: change it there.
"""

from kfp import dsl

from .component import rank_candidates


@dsl.pipeline(name="rank-candidates-example")
def rank_candidates_example(
    candidates: list = [{"name": "two layers", "student": {"init": "depth", "num_layers": 2}}],
    ranking_recipe: dict = {
        "rung": 1,
        "slots": 1,
        "bootstrap_samples": 1000,
        "confidence": 0.95,
        "margin": 0.1,
    },
    metric: str = "distillation_loss",
    checkpoints: str = "/mnt/flagscale/checkpoints",
    code_version: str = "release",
    experiment: str = "flagscale-distillation",
    results_uris: list = ["s3://bucket/results/1", "s3://bucket/results/2"],
) -> None:
    """Rank the candidates of a rung on the samples that all were measured on; say who goes on."""
    with dsl.ParallelFor(results_uris) as results_uri:
        results = dsl.importer(artifact_uri=results_uri, artifact_class=dsl.Model)
    rank_candidates(
        candidates=candidates,
        ranking_recipe=ranking_recipe,
        metric=metric,
        checkpoints=checkpoints,
        code_version=code_version,
        experiment=experiment,
        results=dsl.Collected(results.output),
    )
