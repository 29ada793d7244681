"""The step that exports the trained student."""

from kfp import dsl

from components.image import image


@dsl.component(base_image=image(), install_kfp_package=False)
def export_student(
    export_recipe: dict,
    models_recipe: dict,
    code_version: str,
    experiment: str,
    accelerators: str,
    distilled_student: dsl.Input[dsl.Model],
    evaluation: dsl.Input[dsl.Artifact],
    exported_student: dsl.Output[dsl.Model],
    lineage: dsl.Output[dsl.HTML],
    export_metrics: dsl.Output[dsl.Metrics],
) -> None:
    """Write the trained student as a Hugging Face folder, prove it, register it in MLflow.

    Args:
        export_recipe: the recipe's section `export`.
        models_recipe: the recipe's section `models`.
        code_version: changes when the code does; KFP's cache sees only parameters.
        experiment: MLflow's, unless KFP's plugin or the runner has chosen one.
        accelerators: number of those the pod was given, as text; it fails if it cannot use them.
        distilled_student: from distil-student.
        evaluation: from evaluate: the figures of the model card.
        exported_student: config, safetensors, tokenizer and model card.
        lineage: which data, teacher, code and recipe made the student, step by step.
        export_metrics: largest logit difference after the round trip.
    """
    from flagscale.execution.step_process import step_process

    with step_process("export-student", experiment, accelerators) as step:
        from pathlib import Path

        from flagscale.recipe import ExportRecipe, ModelsRecipe
        from flagscale.steps.export_student import export_student

        figures = export_student(
            step.section(ExportRecipe, export_recipe),
            distilled=step.input("distilled_student", distilled_student),
            evaluation=step.input("evaluation", evaluation),
            output=step.output(exported_student.path),
            models=step.section(ModelsRecipe, models_recipe),
            lineage=Path(lineage.path),
        )
        step.report(figures, export_metrics)
