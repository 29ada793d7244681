"""The step that trains the student in pods of its own."""

from kfp import dsl

from components.image import image


@dsl.component(base_image=image(), install_kfp_package=False)
def distil_student_on_nodes(
    distillation: dict,
    training: dict,
    checkpoints: str,
    code_version: str,
    experiment: str,
    nodes: int,
    accelerator_count: str,
    pods: dict,
    teacher: dsl.Input[dsl.Model],
    student: dsl.Input[dsl.Model],
    dataset: dsl.Input[dsl.Dataset],
    model: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
) -> None:
    """Train the student as distil-student does, as a TrainJob: starts it and follows it.

    Args:
        distillation: the recipe's section `distillation`.
        training: the recipe's section `training`.
        checkpoints: folder of training checkpoints on the volume; the same one resumes a stopped
            run.
        code_version: changes when the code does; KFP's cache sees only parameters.
        experiment: MLflow's, unless KFP's plugin or the runner has chosen one.
        nodes: pods that train together.
        accelerator_count: of each of them, a number as text: KFP gives pods no other.
        pods: what else each gets: cpu, memory, accelerator_type, the TrainingRuntime's name as
            runtime, timeout_seconds, restarts; image, volumes, node selector and secrets are the
            launcher's.
        teacher: from prepare-teacher.
        student: from convert-student.
        dataset: from prepare-data.
        model: the student after training, with its loss curves.
        metrics: last losses, speed.
    """
    from flagscale.steps.step_process import step_process

    with step_process("distil-student", experiment=experiment) as step:
        from flagscale.ranks.nodes import NodePods, accelerators_of
        from flagscale.recipe import DistillationRecipe, TrainingRecipe
        from flagscale.steps.distil_student_on_nodes import distil_student_on_nodes

        figures = distil_student_on_nodes(
            step.section(DistillationRecipe, distillation),
            step.section(TrainingRecipe, training),
            teacher=step.input(teacher.path),
            student=step.input(student.path),
            dataset=step.input(dataset.path),
            checkpoints=checkpoints,
            output=step.output(model.path),
            nodes=nodes,
            accelerator_count=accelerators_of(accelerator_count),
            pods=step.section(NodePods, pods),
        )
        step.report(figures, metrics)
