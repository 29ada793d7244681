"""A pipeline of leaderboard alone, on artifacts of other runs.

Made by `python -m components` from the component's signature: change it there.
"""

from kfp import dsl

from .component import leaderboard


@dsl.pipeline(name="leaderboard-example")
def leaderboard_example(
    variants: list = [
        {
            "name": "temperature 1.0",
            "student": {"init": "depth", "num_layers": 2},
            "distillation": {"temperature": 1.0},
            "training": {"train_iters": 30, "lr": 0.001},
        },
        {
            "name": "temperature 2.0",
            "student": {"init": "depth", "num_layers": 2},
            "distillation": {"temperature": 2.0},
            "training": {"train_iters": 30, "lr": 0.001},
        },
    ],
    metric: str = "kl",
    code_version: str = "release",
    experiment: str = "flagscale-distillation",
    evaluations_uris: list = ["s3://bucket/evaluations/1", "s3://bucket/evaluations/2"],
) -> None:
    """Rank the variants of a sweep, and show them in MLflow as children of the sweep's run."""
    with dsl.ParallelFor(evaluations_uris) as evaluations_uri:
        evaluations = dsl.importer(artifact_uri=evaluations_uri, artifact_class=dsl.Artifact)
    leaderboard(
        variants=variants,
        metric=metric,
        code_version=code_version,
        experiment=experiment,
        evaluations=dsl.Collected(evaluations.output),
    )
