"""`python -m pipelines doctor`: whether a recipe's distillation computes what it says."""

import argparse
import logging

from flagscale.errors import UserError
from pipelines.commands.arguments import add_recipe, add_runs, new_command, read_recipe
from pipelines.local.runner import prepare_recipe
from pipelines.outcome import StepFailed
from pipelines.planning import fitted

_EXAMPLES = """\
  python -m pipelines doctor recipes/smollm2-135m-to-22-layers.yaml
      data, teacher and student as `run` makes them, from the cache where they are there, then
      every check with figure and tolerance; exit status 1 when one fails

  python -m pipelines doctor recipes/tiny.yaml --set distillation.temperature=4
      the same with another loss
"""


def add(commands: argparse._SubParsersAction) -> None:
    """Add the command's parser."""
    parser = new_command(
        commands, "doctor", "check that a recipe's distillation computes what it says", _EXAMPLES
    )
    add_recipe(parser)
    add_runs(parser)
    parser.set_defaults(work=work)


def work(arguments: argparse.Namespace) -> str:
    """Prepare what is audited, audit it, and give the table.

    Raises:
        UserError: the recipe is a sweep, or wrong.
        StepFailed: a check failed, or a step.
    """
    recipe, _ = fitted(read_recipe(arguments), None)
    if recipe.sweep is not None:
        raise UserError("sweep: a doctor looks at one student; give --set sweep=null and a variant")
    if recipe.search is not None:
        raise UserError("search: a doctor looks at one student; give --set search=null, and one")
    result = prepare_recipe(recipe, arguments.runs)
    outputs = {name: path for step in result.steps.values() for name, path in step.outputs.items()}
    from flagscale.execution.logs import configure_logging

    configure_logging()  # as a step's process does, and before Megatron warns of what is missing
    logging.getLogger("flagscale").setLevel(logging.WARNING)
    # Only now: the runner holds no torch while the steps work.
    from flagscale.evaluation.pages.audit import AUDIT, render
    from flagscale.post_training.findings import as_text, failures
    from flagscale.steps.doctor import Paths, doctor

    paths = Paths(outputs["teacher"], outputs["student"], outputs["dataset"])
    findings = doctor(recipe.distillation, recipe.training, paths, recipe.models)
    page = result.folder / AUDIT
    told = f"{recipe.name}: with the recipe's own loss and precision"
    page.write_text(render([one.values() for one in findings], told), encoding="utf-8")
    text = f"{as_text(findings)}\n\nas a page: {page}"
    if wrong := failures(findings):
        raise StepFailed("\n".join([text, "", *wrong]))
    return text
