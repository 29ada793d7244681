"""A pipeline of prepare-data alone, on artifacts of other runs.

Made by `python -m components` from the component's signature: change it there.
"""

from kfp import dsl

from .component import prepare_data


@dsl.pipeline(name="prepare-data-example")
def prepare_data_example(
    data_recipe: dict = {
        "max_documents": 200,
        "source": "python-docs",
        "tokenizer": "./build/tiny-teacher",
        "seq_length": 64,
        "validation_fraction": 0.1,
        "test_fraction": 0.1,
    },
    code_version: str = "release",
    experiment: str = "flagscale-distillation",
) -> None:
    """Turn documents into token datasets, split by the documents' hashes."""
    prepare_data(
        data_recipe=data_recipe,
        code_version=code_version,
        experiment=experiment,
    )
