"""The step that checks a run before anything else starts."""
# ruff: noqa: B006 - how KFP is told that a parameter may be left out; it hands over copies

from typing import NamedTuple

from kfp import dsl

from components.image import image


@dsl.component(base_image=image(), install_kfp_package=False)
def check_recipe(
    made: dict,
    data: dict,
    teacher: dict,
    evaluation: dict,
    export: dict,
    tasks: dict,
    models: dict,
    data_max_documents: str,
    tracking_experiment: str,
    training_checkpoints: str,
    where_code_version: str,
    student: dict = {},
    student_num_layers: str = "",
    distillation: dict = {},
    distillation_loss: str = "",
    distillation_temperature: str = "",
    teacher_outputs: dict = {},
    training: dict = {},
    promote: dict = {},
    training_global_batch_size: str = "",
    training_lr: str = "",
    training_train_iters: str = "",
    sweep_variants: list = [],
    sweep_metric: str = "",
    search_candidates: list = [],
    search_metric: str = "",
    where_data_image: str = "",
    where_data_node_selector: dict = {},
    where_data_tolerations: list = [],
    where_models_image: str = "",
    where_models_accelerator_count: str = "",
    where_models_node_selector: dict = {},
    where_models_tolerations: list = [],
    where_training_image: str = "",
    where_training_accelerator_count: str = "",
    where_training_node_selector: dict = {},
    where_training_tolerations: list = [],
    where_volume_claim: str = "",
    where_mlflow_secret: str = "",
) -> NamedTuple(  # type: ignore[valid-type]
    "Checked",
    [
        ("data", dict),
        ("teacher", dict),
        ("student", dict),
        ("distillation", dict),
        ("teacher_outputs", dict),
        ("training", dict),
        ("evaluation", dict),
        ("export", dict),
        ("tasks", dict),
        ("models", dict),
        ("promote", dict),
        ("sweep_variants", list),
        ("search_candidates", list),
        ("measured", list),
        ("met", dict),
    ],
):
    """Read all that a run may change, as `submit` does; all other steps work by what comes of it.

    Args:
        made: what is fixed when the pipeline is made (`flagscale.run_values.Made`).
        data: the recipe's section `data`.
        teacher: the recipe's section `teacher`.
        evaluation: the recipe's section `evaluation`.
        export: the recipe's section `export`.
        tasks: the recipe's section `tasks`.
        models: the recipe's section `models`.
        data_max_documents: sets `data.max_documents`; empty: the section's.
        tracking_experiment: MLflow's, unless KFP's plugin or the runner has chosen one.
        training_checkpoints: folder or URL of training checkpoints.
        where_code_version: changes when the code does; KFP's cache sees only parameters.
        student: the recipe's section `student`.
        student_num_layers: so many of the teacher's layers, evenly spread: sets
            `student.num_layers`.
        distillation: the recipe's section `distillation`.
        distillation_loss: sets `distillation.loss`.
        distillation_temperature: sets `distillation.temperature`.
        teacher_outputs: the recipe's section `teacher_outputs`.
        training: the recipe's section `training`.
        promote: the recipe's section `promote`.
        training_global_batch_size: sets `training.global_batch_size`.
        training_lr: sets `training.lr`.
        training_train_iters: sets `training.train_iters`.
        sweep_variants: of each the name, and the sections student, distillation and training.
        sweep_metric: figure of the evaluation that decides.
        search_candidates: of each the name and the section student.
        search_metric: held-out loss that ranks.
        where_data_image: of the data pods.
        where_data_node_selector: labels of their nodes.
        where_data_tolerations: taints that are no obstacle to them.
        where_models_image: of the models pods.
        where_models_accelerator_count: a pod, a number as text.
        where_models_node_selector: labels of their nodes.
        where_models_tolerations: taints that are no obstacle to them.
        where_training_image: of the training pods.
        where_training_accelerator_count: a pod, a number as text.
        where_training_node_selector: labels of their nodes.
        where_training_tolerations: taints that are no obstacle to them.
        where_volume_claim: PersistentVolumeClaim that steps share.
        where_mlflow_secret: Secret of the tracking server.
    """
    from flagscale.execution.step_process import step_process

    with step_process("check-recipe", experiment=tracking_experiment) as step:
        from flagscale.run_values import Made
        from flagscale.steps.check_recipe import check_recipe

        return check_recipe(step.section(Made, made), locals())  # all arguments, by name
