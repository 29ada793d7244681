"""The pipeline as a file for Kubeflow."""

import itertools
from pathlib import Path

from kfp import compiler

from flagscale.errors import UserError
from flagscale.recipe import Recipe
from pipelines.distillation import build_pipeline
from pipelines.platform import Platform


def compile_recipe(recipe: Recipe, platform: Platform, output: Path) -> Path:
    """Write the pipeline with the recipe's values as its defaults.

    Its `code_version` is the release, not a digest of the sources: on a cluster the image pins
    the code, and the file changes only when the pipeline does.

    Args:
        recipe: validated.
        output: a `.yaml` file, replaced if there is one.

    Raises:
        UserError: `output` has another suffix.
    """
    if output.suffix not in (".yaml", ".yml"):
        raise UserError(f"output {output}: must end in .yaml")
    output.parent.mkdir(parents=True, exist_ok=True)
    compiler.Compiler().compile(build_pipeline(recipe, platform), str(output))
    # KFP's opening comment lists the defaults in an order that differs from process to process.
    lines = output.read_text(encoding="utf-8").splitlines(keepends=True)
    body = itertools.dropwhile(lambda line: line.startswith("#"), lines)
    heading = f"# {recipe.name}, made by `python -m pipelines compile`: upload it in the KFP UI.\n"
    output.write_text(heading + "".join(body), encoding="utf-8")
    return output
