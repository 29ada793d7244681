"""A pipeline of export-winner alone, on artifacts of other runs.

Made by `python -m components` from the component's signature: change it there.
"""

from kfp import dsl

from .component import export_winner


@dsl.pipeline(name="export-winner-example")
def export_winner_example(
    export_recipe: dict = {"registered_model_name": "tiny"},
    models_recipe: dict = {},
    code_version: str = "release",
    experiment: str = "flagscale-distillation",
    accelerators: str = "0",
    distilled_students_uris: list = [
        "s3://bucket/distilled_students/1",
        "s3://bucket/distilled_students/2",
    ],
    evaluations_uris: list = ["s3://bucket/evaluations/1", "s3://bucket/evaluations/2"],
    leaderboard_uri: str = "s3://bucket/leaderboard",
) -> None:
    """Export the student that leads the leaderboard, as export-student does with a run's only one."""
    with dsl.ParallelFor(distilled_students_uris) as distilled_students_uri:
        distilled_students = dsl.importer(
            artifact_uri=distilled_students_uri, artifact_class=dsl.Model
        )
    with dsl.ParallelFor(evaluations_uris) as evaluations_uri:
        evaluations = dsl.importer(artifact_uri=evaluations_uri, artifact_class=dsl.Artifact)
    export_winner(
        export_recipe=export_recipe,
        models_recipe=models_recipe,
        code_version=code_version,
        experiment=experiment,
        accelerators=accelerators,
        distilled_students=dsl.Collected(distilled_students.output),
        evaluations=dsl.Collected(evaluations.output),
        leaderboard=dsl.importer(artifact_uri=leaderboard_uri, artifact_class=dsl.Artifact).output,
    )
