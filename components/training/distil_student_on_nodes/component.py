"""The step that trains the student in pods of its own."""

from kfp import dsl

from components.image import image


@dsl.component(base_image=image(), install_kfp_package=False)
def distil_student_on_nodes(
    distillation_recipe: dict,
    training_recipe: dict,
    checkpoints: str,
    code_version: str,
    experiment: str,
    nodes: int,
    accelerator_count: str,
    pods: dict,
    of_many: dict,
    teacher: dsl.Input[dsl.Model],
    student: dsl.Input[dsl.Model],
    dataset: dsl.Input[dsl.Dataset],
    distilled_student: dsl.Output[dsl.Model],
    training_metrics: dsl.Output[dsl.Metrics],
    teacher_outputs: dsl.Input[dsl.Dataset] = None,
) -> None:
    """Train the student as distil-student does, as a TrainJob: starts it and follows it.

    Args:
        distillation_recipe: the recipe's section `distillation`.
        training_recipe: the recipe's section `training`.
        checkpoints: folder of training checkpoints on the volume; the same one resumes a stopped
            run.
        code_version: changes when the code does; KFP's cache sees only parameters.
        experiment: MLflow's, unless KFP's plugin or the runner has chosen one.
        nodes: pods that train together.
        accelerator_count: of each of them, a number as text: KFP gives pods no other.
        pods: what else each gets: cpu, memory, accelerator_type, the TrainingRuntime's name as
            runtime, timeout_seconds, restarts, annotations, network; image, volumes, node selector
            and secrets are the launcher's.
        of_many: of one of many students record_failure, and in a search until_step and samples;
            empty: the only one, trained to the end.
        teacher: from prepare-teacher.
        student: from convert-student.
        dataset: from prepare-data.
        distilled_student: the student after training, with its loss curves; of a rung the curves
            and held-out losses alone.
        training_metrics: last losses, speed.
        teacher_outputs: from cache-teacher, where there is one.
    """
    from flagscale.execution.step_process import step_process

    with step_process(
        "distil-student",
        experiment=experiment,
        record_failure_at=distilled_student.path if of_many.get("record_failure") else None,
    ) as step:
        from flagscale.execution.trainjob.nodes import NodePods, accelerators_of
        from flagscale.recipe import DistillationRecipe, TrainingRecipe

        step.require(
            {DistillationRecipe: distillation_recipe, TrainingRecipe: training_recipe},
            student=student,
        )
        from flagscale.recipe.search import OfManyRecipe
        from flagscale.steps.distil_student_on_nodes import distil_student_on_nodes
        from flagscale.steps.search.rung import Rung

        figures = distil_student_on_nodes(
            step.section(DistillationRecipe, distillation_recipe),
            step.section(TrainingRecipe, training_recipe),
            teacher=step.input("teacher", teacher),
            student=step.input("student", student),
            dataset=step.input("dataset", dataset),
            teacher_outputs=teacher_outputs
            and step.input("teacher_outputs", teacher_outputs, in_parts=True),
            checkpoints=step.literal(checkpoints),
            output=step.output(distilled_student.path),
            nodes=nodes,
            accelerator_count=accelerators_of(accelerator_count),
            pods=step.section(NodePods, pods),
            rung=Rung.of(step.section(OfManyRecipe, of_many), step.pointer("student", student)),
        )
        step.report(figures, training_metrics)
