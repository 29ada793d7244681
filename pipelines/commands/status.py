"""`python -m pipelines status`: how a run on a cluster is doing."""

import argparse

from pipelines.cluster.connection import Server, say
from pipelines.cluster.following import State, check_outcome, follow, look
from pipelines.cluster.tracked_end import end_in_mlflow
from pipelines.commands.arguments import new_command
from pipelines.commands.cluster import (
    POLL_SECONDS,
    add_connection,
    add_waiting,
    check_waiting,
    connection,
)
from pipelines.outcome import duration

_EXAMPLES = """\
  python -m pipelines status 1f0c... --host https://kfp.example.com
      the run's state, and each step's with its time; exit code 1 when the run failed

  python -m pipelines status 1f0c... --wait
      a line whenever a step's state changes, until the run ends; Ctrl-C ends only the waiting
"""


def add(commands: argparse._SubParsersAction) -> None:
    """Add the command's parser."""
    parser = new_command(commands, "status", "say how a run on a cluster is doing", _EXAMPLES)
    parser.add_argument("run_id", metavar="RUN_ID", help="as `submit` printed it")
    add_waiting(parser)
    add_connection(parser)
    parser.set_defaults(work=work)


def work(arguments: argparse.Namespace) -> str:
    """The run's state.

    Raises:
        StepFailed: the run failed, or was terminated.
    """
    check_waiting(arguments)
    server = Server(connection(arguments))
    url = server.url("runs", "details", arguments.run_id)
    if arguments.wait:
        state = follow(
            server, arguments.run_id, arguments.poll_seconds or POLL_SECONDS, arguments.timeout
        )
        end_in_mlflow(arguments.run_id, state.state)
        check_outcome(state, url)
        return f"{headline(state)}\n{url}"
    state = look(server, arguments.run_id)
    text = "\n".join([headline(state), *(f"  {task.line()}" for task in state.tasks)])
    if state.state in ("FAILED", "CANCELED"):
        say(text)
    end_in_mlflow(arguments.run_id, state.state)
    check_outcome(state, url)
    return f"{text}\n{url}"


def headline(state: State) -> str:
    """The run in one line."""
    taken = "" if state.seconds is None else f" in {duration(state.seconds)}"
    return f"{state.name}: {state.state}{taken}"
