"""`python -m pipelines plan`: what each step needs, before anything is queued."""

import argparse
import json
from pathlib import Path

from flagscale.errors import UserError
from flagscale.sizes.teacher import UnknownSizeError
from pipelines import forecast
from pipelines.commands.arguments import add_recipe, new_command, read_recipe
from pipelines.plan_text import as_json, as_text
from pipelines.planning import Plan, plans
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

  python -m pipelines plan mine.yaml --after runs/latest --set training.train_iters=2000
      also what loss a training of that length would end with, by the curve of one that was run

  python -m pipelines plan mine.yaml --after runs/latest --baseline runs/without-teacher
      and for how long the teacher is worth it

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
    parser.add_argument(
        "--after",
        type=Path,
        metavar="RUN",
        help="folder of a run, as runs/latest: forecast the loss from its curve",
    )
    parser.add_argument(
        "--baseline",
        type=Path,
        metavar="RUN",
        help="with --after: folder of a run with distillation.loss=none, to compare with",
    )
    parser.add_argument("--json", action="store_true", help="bytes and seconds, for programs")
    parser.set_defaults(work=work)


def work(arguments: argparse.Namespace) -> str:
    """The plan of the recipe, of each variant of its sweep, or of each candidate of its search."""
    recipe = read_recipe(arguments)
    platform = load_platform(arguments.platform) if arguments.platform else None
    if arguments.baseline and not arguments.after:
        raise UserError("--baseline is compared with --after, which is missing")
    where = Path(arguments.platform).stem if arguments.platform else "this machine"
    try:
        found = plans(recipe, platform)
    except UnknownSizeError as error:
        if arguments.json:
            return json.dumps([])
        return f"{recipe.name} on {where}\nnot checked: {error}"
    rows = [_forecasts(plan, arguments) for plan in found]
    if arguments.json:
        told_json = [
            as_json(plan, where) | {"forecast": None if own is None else forecast.as_json(own)}
            for plan, own in zip(found, rows, strict=True)
        ]
        return json.dumps(told_json, indent=2)
    told = []
    for plan, own in zip(found, rows, strict=True):
        parts = [as_text(plan, where), own and forecast.as_text(own, arguments.after)]
        told.append("\n\n".join(part for part in (*parts, forecast.law(plan)) if part))
    if recipe.search is not None:
        told.append(str(search_cost(recipe, [plan.steps for plan in found])))
    return "\n\n\n".join(told)


def _forecasts(plan: Plan, arguments: argparse.Namespace) -> list[forecast.Row] | None:
    """Of one training; None where no run is named."""
    if arguments.after is None:
        return None
    return forecast.forecasts(plan.job.recipe, arguments.after, arguments.baseline)
