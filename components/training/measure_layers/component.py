"""The step that measures the teacher's layers once, for all students."""

from kfp import dsl

from components.image import image


@dsl.component(base_image=image(), install_kfp_package=False)
def measure_layers(
    students: list,
    models_recipe: dict,
    code_version: str,
    experiment: str,
    accelerators: str,
    record_failure: bool,
    teacher: dsl.Input[dsl.Model],
    dataset: dsl.Input[dsl.Dataset],
    layer_importance: dsl.Output[dsl.Artifact],
    importance_metrics: dsl.Output[dsl.Metrics],
) -> None:
    """Measure which of the teacher's layers can go, once for all students that ask the same.

    Args:
        students: sections `student`, of each kind of measurement one or more; from check-recipe.
        models_recipe: the recipe's section `models`.
        code_version: changes when the code does; KFP's cache sees only parameters.
        experiment: MLflow's, unless KFP's plugin or the runner has chosen one.
        accelerators: number of those the pod was given, as text; it fails if it cannot use them.
        record_failure: whether a failure is written into the output, so that each student measures
            for itself, instead of ending the run.
        teacher: from prepare-teacher.
        dataset: from prepare-data: text to measure on.
        layer_importance: in which order layers go, and what that costs.
        importance_metrics: how many measurements and tokens.
    """
    from flagscale.execution.step_process import step_process

    with step_process(
        "measure-layers",
        experiment,
        accelerators,
        record_failure_at=layer_importance.path if record_failure else None,
    ) as step:
        from flagscale.recipe import ModelsRecipe, StudentRecipe
        from flagscale.steps.measure_layers import measure_layers

        figures = measure_layers(
            [step.section(StudentRecipe, one) for one in students],
            teacher=step.input("teacher", teacher),
            dataset=step.input("dataset", dataset),
            output=step.output(layer_importance.path),
            models=step.section(ModelsRecipe, models_recipe),
        )
        step.report(figures, importance_metrics)
