"""`python -m pipelines compare`: a run beside its baseline, or runs of MLflow side by side."""

import argparse
from pathlib import Path
from typing import get_args

from flagscale.errors import UserError
from flagscale.recipe.sweep import Metric
from pipelines.commands.arguments import (
    DEFAULT_RECIPE,
    add_recipe,
    add_runs,
    new_command,
    read_recipe,
)
from pipelines.local.comparison import compare_with_baseline
from pipelines.run_comparison import PAGE, compare_experiment, compare_runs

_EXAMPLES = f"""\
  python -m pipelines compare recipes/tiny.yaml
      its newest run beside the newest with `--set distillation.loss=none`

  python -m pipelines compare --experiment flagscale-distillation
      all students of an MLflow experiment: leaderboard, Pareto front, what differs in their
      recipes, here and as runs/{PAGE}

  python -m pipelines compare --run-ids RUN RUN
      two runs of MLflow: of pipelines, or of their steps evaluate

environment:
  MLFLOW_TRACKING_URI   tracking server; default: the file in the runs folder
"""


def add(commands: argparse._SubParsersAction) -> None:
    """Add the command's parser."""
    text = "a run beside the same training without a teacher, or runs of MLflow side by side"
    parser = new_command(commands, "compare", text, _EXAMPLES)
    add_recipe(parser)
    add_runs(parser)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--experiment", metavar="NAME", help="all students of an MLflow experiment")
    which.add_argument(
        "--run-ids", nargs="+", metavar="RUN", help="runs of MLflow, two or more, by their ids"
    )
    parser.add_argument(
        "--metric",
        choices=get_args(Metric),
        help="figure that orders runs of MLflow (default: kl)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help=f"HTML page (default: {PAGE} in the runs folder)",
    )
    parser.set_defaults(work=work)


def work(arguments: argparse.Namespace) -> str:
    """The tables.

    Raises:
        UserError: what is given does not go together, or cannot be compared.
    """
    metric = arguments.metric or "kl"
    if arguments.experiment is not None or arguments.run_ids is not None:
        if arguments.overrides or arguments.recipe != DEFAULT_RECIPE:
            raise UserError(
                "runs of MLflow have recipes of their own: leave out the one given, and --set"
            )
        if arguments.experiment is not None:
            return compare_experiment(
                arguments.experiment, metric, arguments.runs, arguments.output
            )
        if len(arguments.run_ids) < 2:
            raise UserError(f"--run-ids {arguments.run_ids[0]}: at least two runs are compared")
        return compare_runs(arguments.run_ids, metric, arguments.runs, arguments.output)
    for option in ("metric", "output"):
        if getattr(arguments, option) is not None:
            raise UserError(f"--{option} goes with --experiment or --run-ids")
    return compare_with_baseline(read_recipe(arguments), arguments.runs)
