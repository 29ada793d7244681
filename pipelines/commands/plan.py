"""`python -m pipelines plan`: what each step needs, before anything is queued."""

import argparse
import json
from pathlib import Path

from flagscale.sizes.teacher import UnknownSizeError
from pipelines.commands.arguments import add_recipe, new_command, read_recipe
from pipelines.plan_text import as_json, as_text
from pipelines.planning import plans
from pipelines.platform import load_platform
from pipelines.search_budget import search_cost

_EXAMPLES = """\
  python -m pipelines plan recipes/qwen3-8b-to-24-layers.yaml --platform gke-h100
      memory, storage, operations, time and price of each step on a cluster

  python -m pipelines plan recipes/smollm2-135m-to-22-layers.yaml
      the same on this machine

  python -m pipelines plan mine.yaml --platform gke-h100 --set training.micro_batch_size=4
      whether a change fits

  python -m pipelines plan mine.yaml --platform gke-h100 --json | jq '.[0].steps[].rank_bytes'

what the numbers mean:
  a rank        the fullest of the step's processes: of its accelerator's memory, or on a CPU of
                the host's; `of` is what tensors can fill. Its parts are in the second table
  a pod's host  the memory of all processes of one pod, against `memory` of the platform file
  stays         weights that the step leaves on the volume; `for a while`: checkpoints, beside it
  time          at the stated share of the accelerators' peak; from `accelerator` (or
                `accelerator_memory`, `accelerator_tflops`) of the platform file
  price         `price_per_hour` of the platform file, for the pods' time

The teacher's sizes are read from its config.json: of a folder, the Hub's cache or the Hub.
`compile`, `submit` and `run` refuse what does not fit; where `models.parallelism` is not given,
they take the smallest layout that does.
"""


def add(commands: argparse._SubParsersAction) -> None:
    """Add the command's parser."""
    parser = new_command(
        commands, "plan", "tell what each step needs, and whether it fits", _EXAMPLES
    )
    add_recipe(parser)
    parser.add_argument(
        "--platform",
        metavar="NAME|FILE",
        help="a name in recipes/platforms/, or a YAML file (default: this machine)",
    )
    parser.add_argument("--json", action="store_true", help="bytes and seconds, for programs")
    parser.set_defaults(work=work)


def work(arguments: argparse.Namespace) -> str:
    """The plan of the recipe, of each variant of its sweep, or of each candidate of its search."""
    recipe = read_recipe(arguments)
    platform = load_platform(arguments.platform) if arguments.platform else None
    where = Path(arguments.platform).stem if arguments.platform else "this machine"
    try:
        found = plans(recipe, platform)
    except UnknownSizeError as error:
        if arguments.json:
            return json.dumps([])
        return f"{recipe.name} on {where}\nnot checked: {error}"
    if arguments.json:
        return json.dumps([as_json(plan, where) for plan in found], indent=2)
    told = [as_text(plan, where) for plan in found]
    if recipe.search is not None:
        told.append(str(search_cost(recipe, [plan.steps for plan in found])))
    return "\n\n\n".join(told)
