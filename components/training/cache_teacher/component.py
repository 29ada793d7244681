"""The step that asks the teacher once, for all trainings."""

from kfp import dsl

from components.image import image


@dsl.component(base_image=image(), install_kfp_package=False)
def cache_teacher(
    teacher_outputs_recipe: dict,
    met_recipe: dict,
    models_recipe: dict,
    checkpoints: str,
    code_version: str,
    experiment: str,
    accelerators: str,
    teacher: dsl.Input[dsl.Model],
    dataset: dsl.Input[dsl.Dataset],
    teacher_outputs: dsl.Output[dsl.Dataset],
    outputs_metrics: dsl.Output[dsl.Metrics],
) -> None:
    """Run the teacher on the samples that trainings meet, and keep what it makes of them.

    Args:
        teacher_outputs_recipe: the recipe's section `teacher_outputs`.
        met_recipe: which samples trainings meet, and how they would run the teacher; from
            check-recipe.
        models_recipe: the recipe's section `models`.
        checkpoints: folder or URL of training checkpoints; a stopped step goes on there.
        code_version: changes when the code does; KFP's cache sees only parameters.
        experiment: MLflow's, unless KFP's plugin or the runner has chosen one.
        accelerators: number of those the pod was given, as text; it fails if it cannot use them.
        teacher: from prepare-teacher.
        dataset: from prepare-data.
        teacher_outputs: what the teacher makes of each sample, whatever a training's order.
        outputs_metrics: samples, bytes a token, speed, bias.
    """
    from flagscale.execution.step_process import step_process

    with step_process("cache-teacher", experiment, accelerators) as step:
        from flagscale.recipe import MetRecipe, ModelsRecipe, TeacherOutputsRecipe
        from flagscale.steps.cache_teacher import cache_teacher

        figures = cache_teacher(
            step.section(TeacherOutputsRecipe, teacher_outputs_recipe),
            step.section(MetRecipe, met_recipe),
            teacher=step.input("teacher", teacher),
            dataset=step.input("dataset", dataset),
            checkpoints=step.literal(checkpoints),
            output=step.output(teacher_outputs.path),
            models=step.section(ModelsRecipe, models_recipe),
        )
        step.report(figures, outputs_metrics)
