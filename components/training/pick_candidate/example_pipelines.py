"""A pipeline of pick-candidate alone, on artifacts of other runs.

Made by `python -m components` from the component's signature: change it there.
"""

from kfp import dsl

from .component import pick_candidate


@dsl.pipeline(name="pick-candidate-example")
def pick_candidate_example(
    slot: int = 1,
    code_version: str = "release",
    experiment: str = "flagscale-distillation",
    search_uri: str = "s3://bucket/search",
) -> None:
    """Point to the student of a candidate that goes on; a slot too many has none, and says so."""
    pick_candidate(
        slot=slot,
        code_version=code_version,
        experiment=experiment,
        search=dsl.importer(artifact_uri=search_uri, artifact_class=dsl.Artifact).output,
    )
