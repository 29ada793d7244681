"""The step that trains the student."""

from kfp import dsl

from components.image import image


@dsl.component(base_image=image(), install_kfp_package=False)
def distil_student(
    distillation: dict,
    training: dict,
    checkpoints: str,
    code_version: str,
    experiment: str,
    teacher: dsl.Input[dsl.Model],
    student: dsl.Input[dsl.Model],
    dataset: dsl.Input[dsl.Dataset],
    model: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
) -> None:
    """Train the student on the teacher's logits; goes on from the last checkpoint by itself.

    Args:
        distillation: the recipe's section `distillation`.
        training: the recipe's section `training`.
        checkpoints: folder or URL of training checkpoints; the same one resumes a stopped run.
        code_version: changes when the code does; KFP's cache sees only parameters.
        experiment: MLflow's, unless KFP's plugin or the runner has chosen one.
        teacher: from prepare-teacher.
        student: from convert-student.
        dataset: from prepare-data.
        model: the student after training, with its loss curves.
        metrics: last losses, speed.
    """
    from flagscale.steps.step_process import step_process

    with step_process("distil-student", experiment=experiment) as step:
        from flagscale.recipe import DistillationRecipe, TrainingRecipe
        from flagscale.steps.distil_student import distil_student

        figures = distil_student(
            step.section(DistillationRecipe, distillation),
            step.section(TrainingRecipe, training),
            teacher=step.input(teacher.path),
            student=step.input(student.path),
            dataset=step.input(dataset.path),
            checkpoints=checkpoints,
            output=step.output(model.path),
        )
        step.report(figures, metrics)
