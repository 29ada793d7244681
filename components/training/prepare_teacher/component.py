"""The step that imports the teacher."""

from kfp import dsl

from components.image import image


@dsl.component(base_image=image(), install_kfp_package=False)
def prepare_teacher(
    teacher_recipe: dict,
    models_recipe: dict,
    code_version: str,
    experiment: str,
    accelerators: str,
    dataset: dsl.Input[dsl.Dataset],
    teacher: dsl.Output[dsl.Model],
    teacher_metrics: dsl.Output[dsl.Metrics],
) -> None:
    """Import a Hugging Face model into Megatron-Core and prove that it is the same model.

    Args:
        teacher_recipe: the recipe's section `teacher`.
        models_recipe: the recipe's section `models`.
        code_version: changes when the code does; KFP's cache sees only parameters.
        experiment: MLflow's, unless KFP's plugin or the runner has chosen one.
        accelerators: number of those the pod was given, as text; it fails if it cannot use them.
        dataset: from prepare-data: its validation split measures the teacher's loss.
        teacher: the teacher as a Megatron-Core distributed checkpoint.
        teacher_metrics: largest logit difference to transformers, validation loss, parameters.
    """
    from flagscale.execution.step_process import step_process

    with step_process("prepare-teacher", experiment, accelerators) as step:
        from flagscale.recipe import ModelsRecipe, TeacherRecipe
        from flagscale.steps.prepare_teacher import prepare_teacher

        figures = prepare_teacher(
            step.section(TeacherRecipe, teacher_recipe),
            dataset=step.input("dataset", dataset),
            output=step.output(teacher.path),
            models=step.section(ModelsRecipe, models_recipe),
        )
        step.report(figures, teacher_metrics)
