"""The step that turns text into token datasets."""

from kfp import dsl

from components.image import image


@dsl.component(base_image=image(), install_kfp_package=False)
def prepare_data(
    data_recipe: dict,
    code_version: str,
    experiment: str,
    dataset: dsl.Output[dsl.Dataset],
    dataset_metrics: dsl.Output[dsl.Metrics],
) -> None:
    """Turn documents into token datasets, split by the documents' hashes.

    Args:
        data_recipe: the recipe's section `data`.
        code_version: changes when the code does; KFP's cache sees only parameters.
        experiment: MLflow's, unless KFP's plugin or the runner has chosen one.
        dataset: train, validation and test tokens, and the tokenizer.
        dataset_metrics: counts of documents, tokens and characters.
    """
    from flagscale.execution.step_process import step_process

    with step_process("prepare-data", experiment=experiment) as step:
        from flagscale.recipe import DataRecipe
        from flagscale.steps.prepare_data_alone import prepare_data_alone

        data = step.section(DataRecipe, data_recipe)
        step.report(prepare_data_alone(data, step.output(dataset.path)), dataset_metrics)
