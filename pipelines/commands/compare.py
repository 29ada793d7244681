"""`python -m pipelines compare`: a run beside its baseline."""

import argparse

from pipelines.commands.arguments import add_recipe, add_runs, new_command, read_recipe
from pipelines.local.comparison import compare_with_baseline

_EXAMPLES = """\
  python -m pipelines compare recipes/tiny.yaml
      its newest run beside the newest with `--set distillation.loss=none`
"""


def add(commands: argparse._SubParsersAction) -> None:
    """Add the command's parser."""
    text = "a run beside the same training without a teacher"
    parser = new_command(commands, "compare", text, _EXAMPLES)
    add_recipe(parser)
    add_runs(parser)
    parser.set_defaults(work=work)


def work(arguments: argparse.Namespace) -> str:
    """The table of both."""
    return compare_with_baseline(read_recipe(arguments), arguments.runs)
