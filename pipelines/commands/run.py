"""`python -m pipelines run`: the pipeline on this machine."""

import argparse
import sys

from pipelines.commands.arguments import add_recipe, add_runs, new_command, read_recipe
from pipelines.local.runner import run_recipe
from pipelines.local.summary import summary
from pipelines.planning import fitted

_EXAMPLES = """\
  python -m pipelines run recipes/smollm2-135m-to-22-layers.yaml
      distil on this machine; results in runs/latest

  python -m pipelines run recipes/tiny.yaml --set distillation.temperature=2
      the same with another temperature: data, teacher and conversion come from the cache

  python -m pipelines run recipes/tiny.yaml --image flagscale-distillation:0.1.0-cpu
      each step in its own container, as on a cluster

environment:
  MLFLOW_TRACKING_URI   tracking server; default: a file in the runs folder
  DOCKER_HOST           socket of docker or podman, for --image
"""


def add(commands: argparse._SubParsersAction) -> None:
    """Add the command's parser."""
    parser = new_command(commands, "run", "run the pipeline on this machine", _EXAMPLES)
    add_recipe(parser)
    add_runs(parser)
    parser.add_argument(
        "--no-cache",
        dest="reuse",
        action="store_false",
        help="repeat every step, and the training from its beginning",
    )
    parser.add_argument(
        "--image",
        help="run each step in a container of this image, which `make images` builds from the code "
        "here; it gets no GPU (default: as processes)",
    )
    parser.set_defaults(work=work)


def work(arguments: argparse.Namespace) -> str:
    """Run, and say what came of it."""
    # Containers of it get no GPU.
    recipe, note = fitted(read_recipe(arguments), None, on_cpu=arguments.image is not None)
    sys.stdout.write(note)
    return summary(run_recipe(recipe, arguments.runs, arguments.reuse, arguments.image))
