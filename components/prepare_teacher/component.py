"""The step that imports the teacher."""

from kfp import dsl

from components.image import image


@dsl.component(base_image=image(), install_kfp_package=False)
def prepare_teacher(
    teacher: dict,
    code_version: str,
    experiment: str,
    dataset: dsl.Input[dsl.Dataset],
    model: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
) -> None:
    """Import a Hugging Face model into Megatron-Core and prove that it is the same model.

    Args:
        teacher: the recipe's section `teacher`.
        code_version: changes when the code does; KFP's cache sees only parameters.
        experiment: MLflow's, unless KFP's plugin or the runner has chosen one.
        dataset: from prepare-data: its validation split measures the teacher's loss.
        model: the teacher as a Megatron-Core distributed checkpoint.
        metrics: largest logit difference to transformers, validation loss, parameters.
    """
    from flagscale.steps.step_process import step_process

    with step_process("prepare-teacher", experiment=experiment) as step:
        from flagscale.recipe import TeacherRecipe
        from flagscale.steps.prepare_teacher import prepare_teacher

        section = step.section(TeacherRecipe, teacher)
        figures = prepare_teacher(section, step.input(dataset.path), step.output(model.path))
        step.report(figures, metrics)
