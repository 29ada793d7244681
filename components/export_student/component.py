"""The step that exports the trained student."""

from kfp import dsl

from components.image import image


@dsl.component(base_image=image(), install_kfp_package=False)
def export_student(
    export: dict,
    code_version: str,
    experiment: str,
    distilled: dsl.Input[dsl.Model],
    evaluation: dsl.Input[dsl.Artifact],
    model: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
) -> None:
    """Write the trained student as a Hugging Face folder, prove it, register it in MLflow.

    Args:
        export: the recipe's section `export`.
        code_version: changes when the code does; KFP's cache sees only parameters.
        experiment: MLflow's, unless KFP's plugin or the runner has chosen one.
        distilled: from distil-student.
        evaluation: from evaluate: the figures of the model card.
        model: config, safetensors, tokenizer and model card.
        metrics: largest logit difference after the round trip.
    """
    from flagscale.steps.step_process import step_process

    with step_process("export-student", experiment=experiment) as step:
        from flagscale.recipe import ExportRecipe
        from flagscale.steps.export_student import export_student

        section = step.section(ExportRecipe, export)
        inputs = (step.input(distilled.path), step.input(evaluation.path))
        step.report(export_student(section, *inputs, step.output(model.path)), metrics)
