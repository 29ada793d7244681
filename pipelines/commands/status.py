"""`python -m pipelines status`: how a run on a cluster is doing."""

import argparse

from flagscale.errors import UserError
from pipelines.cluster.ending import check_ended
from pipelines.cluster.following import follow, look
from pipelines.cluster.logs import step_log
from pipelines.cluster.server import Server, say
from pipelines.commands.arguments import new_command
from pipelines.commands.cluster import (
    POLL_SECONDS,
    add_connection,
    add_waiting,
    check_waiting,
    connection,
)

_EXAMPLES = """\
  python -m pipelines status 1f0c... --host https://kfp.example.com
      the run's state, and each step's with its time; exit code 1 when the run failed

  python -m pipelines status 1f0c... --wait
      a line whenever a step's state changes, until the run ends; Ctrl-C ends only the waiting

  python -m pipelines status 1f0c... --log distil-student
      the log of the step's last attempt
"""


def add(commands: argparse._SubParsersAction) -> None:
    """Add the command's parser."""
    parser = new_command(commands, "status", "say how a run on a cluster is doing", _EXAMPLES)
    parser.add_argument("run_id", metavar="RUN_ID", help="as `submit` printed it")
    parser.add_argument(
        "--log", metavar="STEP", help="show the log of a step's last attempt, and nothing else"
    )
    add_waiting(parser)
    add_connection(parser)
    parser.set_defaults(work=work)


def work(arguments: argparse.Namespace) -> str:
    """The run's state, or a step's log.

    Raises:
        UserError: the server has no such run, or no such log.
        StepFailed: the run failed, or was terminated.
    """
    check_waiting(arguments)
    if arguments.log and arguments.wait:
        raise UserError(f"--log {arguments.log}: shows a log as it is now; leave out --wait")
    server = Server(connection(arguments))
    url = server.url("runs", "details", arguments.run_id)
    if arguments.log:
        return step_log(server, look(server, arguments.run_id), arguments.log)
    if arguments.wait:
        pause = arguments.poll_seconds or POLL_SECONDS
        state = follow(server, arguments.run_id, pause, arguments.timeout)
        check_ended(server, state, url)
        return f"{state.headline()}\n{url}"
    state = look(server, arguments.run_id)
    lines = state.lines()
    if state.has_ended:
        say("\n".join(lines))
        check_ended(server, state, url)
        return url
    return "\n".join([*lines, url])
