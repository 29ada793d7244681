"""`python -m pipelines schedule`: runs on a cluster at set times."""

import argparse

from flagscale.errors import UserError
from pipelines.cluster.cron import check_cron
from pipelines.cluster.submission import Schedule, start_schedule
from pipelines.commands import cluster
from pipelines.commands.arguments import new_command

_MOST_AT_A_TIME = 10  # KFP takes no more

_EXAMPLES = f"""\
  python -m pipelines schedule mine.yaml --platform gke-h100 --cron '0 0 2 * * *' --no-cache
      each day at 02:00 of the server's clock (UTC, most often): second, minute, hour, day of
      month, month, day of week. Without --no-cache a run whose inputs are the same as the day
      before takes yesterday's results, and trains nothing

  python -m pipelines schedule mine.yaml --platform gke-h100 --cron '0 0 2 * * MON' --no-catchup
      each Monday, in place of the schedule of this name; Mondays that were missed stay missed

{cluster.ENVIRONMENT}"""


def add(commands: argparse._SubParsersAction) -> None:
    """Add the command's parser."""
    text = "start runs on a cluster at set times"
    parser = new_command(commands, "schedule", text, _EXAMPLES)
    cluster.add_order(parser)
    parser.add_argument(
        "--cron", required=True, help="six fields, seconds first, e.g. '0 0 2 * * *'"
    )
    parser.add_argument(
        "--name", help="of the schedule; one of this name is replaced (default: RECIPE on PLATFORM)"
    )
    parser.add_argument(
        "--max-concurrency",
        type=int,
        default=1,
        metavar="N",
        help="so many of its runs at a time, 1 to 10; they share the folder of checkpoints unless "
        "-p training_checkpoints names another (default: %(default)s)",
    )
    parser.add_argument(
        "--no-catchup", action="store_true", help="do not make up for runs that were missed"
    )
    parser.add_argument("--disable", action="store_true", help="create it switched off")
    cluster.add_connection(parser)
    parser.set_defaults(work=work)


def work(arguments: argparse.Namespace) -> str:
    """Create or replace the schedule.

    Raises:
        UserError: something is wrong; a schedule of this name is as it was.
    """
    if not 1 <= arguments.max_concurrency <= _MOST_AT_A_TIME:
        raise UserError(f"--max-concurrency {arguments.max_concurrency}: must be 1 to 10")
    schedule = Schedule(
        cron=check_cron(arguments.cron),
        max_concurrency=arguments.max_concurrency,
        catch_up=not arguments.no_catchup,
        enabled=not arguments.disable,
    )
    connection = cluster.connection(arguments)
    with cluster.order(arguments, arguments.name) as (package, order):
        server = cluster.server(connection)
        schedule_id = start_schedule(server, package, order, schedule)
    state = "" if schedule.enabled else ", switched off"
    url = server.url("recurringrun", "details", schedule_id)
    return f"schedule {schedule_id}: {order.name}, {schedule.cron}{state}\n{url}"
