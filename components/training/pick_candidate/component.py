"""The step that hands on a student of a search."""

from kfp import dsl

from components.image import image


@dsl.component(base_image=image(), install_kfp_package=False)
def pick_candidate(
    slot: int,
    code_version: str,
    experiment: str,
    search: dsl.Input[dsl.Artifact],
    student: dsl.Output[dsl.Model],
) -> None:
    """Point to the student of a candidate that goes on; a slot too many has none, and says so.

    Args:
        slot: which of those that go on, the best first, from 1.
        code_version: changes when the code does; KFP's cache sees only parameters.
        experiment: MLflow's, unless KFP's plugin or the runner has chosen one.
        search: from rank-candidates, of the rung before.
        student: from convert-student, of this candidate.
    """
    from flagscale.execution.step_process import step_process

    with step_process("pick-candidate", experiment=experiment) as step:
        from pathlib import Path

        from flagscale.steps.pick_candidate import pick_candidate

        pick_candidate(slot, step.input("search", search), Path(student.path))
