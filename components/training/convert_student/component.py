"""The step that makes the student."""

from kfp import dsl

from components.image import image


@dsl.component(base_image=image(), install_kfp_package=False)
def convert_student(
    student_recipe: dict,
    models_recipe: dict,
    code_version: str,
    experiment: str,
    accelerators: str,
    record_failure: bool,
    teacher: dsl.Input[dsl.Model],
    dataset: dsl.Input[dsl.Dataset],
    student: dsl.Output[dsl.Model],
    student_report: dsl.Output[dsl.HTML],
    audit: dsl.Output[dsl.HTML],
    student_metrics: dsl.Output[dsl.Metrics],
    layer_importance: dsl.Input[dsl.Artifact] = None,
) -> None:
    """Make the student from the teacher and prove that it can be distilled.

    Args:
        student_recipe: the recipe's section `student`.
        models_recipe: the recipe's section `models`.
        code_version: changes when the code does; KFP's cache sees only parameters.
        experiment: MLflow's, unless KFP's plugin or the runner has chosen one.
        accelerators: number of those the pod was given, as text; it fails if it cannot use them.
        record_failure: whether a failure is written into the output, so that the steps of other
            students go on, instead of ending the run.
        teacher: from prepare-teacher.
        dataset: from prepare-data: text for the proofs.
        student: the student before training, as a Megatron-Core distributed checkpoint.
        student_report: which layers went and what that costs, sizes and proofs, as one page.
        audit: every check of the conversion with figure and tolerance, as one page.
        student_metrics: figures of the proofs, parameters of the student.
        layer_importance: from measure-layers, where several students ask for it.
    """
    from flagscale.execution.step_process import step_process

    with step_process(
        "convert-student",
        experiment,
        accelerators,
        record_failure_at=student.path if record_failure else None,
    ) as step:
        from flagscale.recipe import ModelsRecipe, StudentRecipe
        from flagscale.steps.convert_student import convert_student

        folder, measured = step.output(student.path), layer_importance
        figures = convert_student(
            step.section(StudentRecipe, student_recipe),
            teacher=step.input("teacher", teacher),
            dataset=step.input("dataset", dataset),
            output=folder,
            models=step.section(ModelsRecipe, models_recipe),
            importance=step.input_or_absent("layer_importance", measured) if measured else None,
        )
        for name, page in (("report.html", student_report), ("audit.html", audit)):
            step.copy(folder / name, page.path)
        step.report(figures, student_metrics)
