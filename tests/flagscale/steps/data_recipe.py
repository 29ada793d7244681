"""What prepare-data is asked for."""

from pathlib import Path

from flagscale.recipe import DataRecipe


def recipe(tokenizer: Path, source: Path, **changes: object) -> DataRecipe:
    values = {"tokenizer": str(tokenizer), "source": str(source), "seq_length": 32}
    return DataRecipe.model_validate({**values, **changes})
