"""`python -m pipelines submit`: a run on a cluster."""

import argparse
from dataclasses import replace
from datetime import datetime

from pipelines.cluster.ending import check_ended
from pipelines.cluster.following import follow
from pipelines.cluster.server import say
from pipelines.cluster.submission import start_run
from pipelines.commands import cluster
from pipelines.commands.arguments import new_command

_EXAMPLES = f"""\
  python -m pipelines submit recipes/smollm2-135m-to-22-layers.yaml --platform gke-h100 \\
      --host https://kfp.example.com
      upload the pipeline if it changed, start a run, print the address of its page

  python -m pipelines submit mine.yaml --platform my-cluster.yaml --wait \\
      -p distillation_temperature=2 -p where_training_node_selector='{{pool: h100}}'
      this run alone with another temperature and other nodes; follow it to its end

  python -m pipelines submit mine.yaml --platform gke-h100 --set training.train_iters=5000
      another default, and so a new version of the pipeline

{cluster.ENVIRONMENT}"""


def add(commands: argparse._SubParsersAction) -> None:
    """Add the command's parser."""
    parser = new_command(commands, "submit", "start a run on a cluster", _EXAMPLES)
    cluster.add_order(parser)
    parser.add_argument("--run-name", help="in the UI (default: recipe, platform and time)")
    cluster.add_waiting(parser)
    cluster.add_connection(parser)
    parser.set_defaults(work=work)


def work(arguments: argparse.Namespace) -> str:
    """Start the run, and follow it if asked to.

    Raises:
        UserError: something is wrong; nothing was started.
        StepFailed: the run was followed, and failed.
    """
    cluster.check_waiting(arguments)
    connection = cluster.connection(arguments)
    with cluster.order(arguments, arguments.run_name) as (package, order):
        if arguments.run_name is None:
            now = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S")
            order = replace(order, name=f"{order.name} {now}")
        server = cluster.server(connection)
        run_id = start_run(server, package, order)
    url = server.url("runs", "details", run_id)
    if not arguments.wait:
        return f"run {run_id}\n{url}"
    say(f"run {run_id}\n{url}")
    state = follow(
        server, run_id, arguments.poll_seconds or cluster.POLL_SECONDS, arguments.timeout
    )
    check_ended(server, state, url)
    return state.headline()
