"""Arguments of the commands that talk to a KFP server, in the same words."""

import argparse
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pydantic import TypeAdapter, ValidationError

from flagscale.errors import UserError
from flagscale.run_values.kubernetes_names import Name
from pipelines.cluster.connection import Connection
from pipelines.cluster.package import Package, make_package
from pipelines.cluster.retry_policy import read_retry_policy, warning
from pipelines.cluster.run_parameters import read_parameters
from pipelines.cluster.server import Server, say
from pipelines.cluster.submission import Order, experiment_name
from pipelines.commands.arguments import add_platform, add_recipe, read_recipe
from pipelines.planning import check_run, fitted
from pipelines.platform import load_platform
from pipelines.sources import notes

POLL_SECONDS = 10.0

# As KFP's own command line: KFP_ and the option's name.
_OPTIONS = (
    # names, field of Connection, variable, help
    (("--host", "--endpoint"), "host", "KFP_ENDPOINT", "address of the KFP server"),
    (("-n", "--namespace"), "namespace", "KFP_NAMESPACE", "yours, on a server of many users"),
    (
        ("--existing-token", "--token"),
        "existing_token",
        "KFP_EXISTING_TOKEN",
        "to authenticate with; others on this machine see an option, but not the variable",
    ),
    (
        ("--token-file",),
        "token_file",
        "KF_PIPELINES_SA_TOKEN_PATH",
        "a file with the token, read again at each request",
    ),
    (("--cookies",), "cookies", "KFP_COOKIES", "of a login in the browser: name=value"),
    (("--iap-client-id",), "client_id", "KFP_IAP_CLIENT_ID", "of Google's Identity-Aware Proxy"),
    (("--other-client-id",), "other_client_id", "KFP_OTHER_CLIENT_ID", "of a desktop app there"),
    (
        ("--other-client-secret",),
        "other_client_secret",
        "KFP_OTHER_CLIENT_SECRET",
        "of the same app",
    ),
    (("--ssl-ca-cert",), "ssl_ca_cert", "KFP_SSL_CA_CERT", "certificates to trust, a PEM file"),
    (
        ("--kube-context",),
        "kube_context",
        "KFP_KUBE_CONTEXT",
        "of kubectl, without --host; where a token says who asks (GKE, EKS), forward a port",
    ),
    (("--ui-host",), "ui_host", "KF_PIPELINES_UI_ENDPOINT", "for links, where not the host"),
)

ENVIRONMENT = """\
environment:
  KFP_ENDPOINT, KFP_NAMESPACE, KFP_EXISTING_TOKEN, ...
                        in place of the options, as for KFP's own command `kfp`; so are
                        KF_PIPELINES_ENDPOINT and the other variables of KFP's client
  FLAGSCALE_REGISTRY, FLAGSCALE_CPU_IMAGE, FLAGSCALE_GPU_IMAGE
                        images, as for `compile`
"""


def add_connection(parser: argparse.ArgumentParser) -> None:
    """Where the server is, and who asks."""
    group = parser.add_argument_group(
        "server",
        "Inside a Kubeflow notebook no option is needed. Without an address: kubectl port-forward "
        "--namespace kubeflow svc/ml-pipeline-ui 8080:80, then --host http://localhost:8080",
    )
    for names, field, variable, text in _OPTIONS:
        kind = Path if field in ("token_file", "ssl_ca_cert") else str
        metavar = names[-1].removeprefix("--").upper()
        group.add_argument(
            *names, dest=field, type=kind, metavar=metavar, help=f"{text} [{variable}]"
        )


def connection(arguments: argparse.Namespace) -> Connection:
    """The options, and the variables in place of those not given.

    Raises:
        UserError: they contradict one another, or name no file.
    """
    values: dict[str, Any] = {}
    for _names, field, variable, _text in _OPTIONS:
        value = getattr(arguments, field)
        if value is None and os.environ.get(variable):
            value = os.environ[variable]
            value = Path(value) if field in ("token_file", "ssl_ca_cert") else value
        values[field] = value
    values["host"] = values["host"] or os.environ.get("KF_PIPELINES_ENDPOINT") or None
    # An option is meant for this command, a variable perhaps for all: the option wins.
    if arguments.existing_token is None and arguments.token_file is not None:
        values["existing_token"] = None
    elif values["existing_token"] is not None and arguments.token_file is None:
        values["token_file"] = None
    return Connection(**values)


def server(connection: Connection) -> Server:
    """The server to start runs on; a retry policy that would harm them is told of.

    Raises:
        UserError: there is none, or it does not accept the caller.
    """
    found = Server(connection)
    harm = warning(read_retry_policy(connection))
    if harm:
        say(harm)
    return found


def add_waiting(parser: argparse.ArgumentParser) -> None:
    """Whether and how to wait for a run's end."""
    parser.add_argument(
        "--wait",
        action="store_true",
        help="follow the run until it ends; exit code 1 when it failed. Ctrl-C ends only the wait",
    )
    parser.add_argument(
        "--timeout",
        type=_positive,
        metavar="SECONDS",
        help="wait no longer than this; the run goes on (default: without end)",
    )
    parser.add_argument(
        "--poll-seconds",
        type=_positive,
        metavar="SECONDS",
        help=f"between two looks while waiting (default: {POLL_SECONDS:g})",
    )


def check_waiting(arguments: argparse.Namespace) -> None:
    """Refuse what is said of a wait that is not asked for.

    Raises:
        UserError: `--timeout` or `--poll-seconds` without `--wait`.
    """
    for option in ("timeout", "poll_seconds"):
        value = getattr(arguments, option)
        if value is not None and not arguments.wait:
            name = option.replace("_", "-")
            raise UserError(f"--{name} {value:g}: is only of use in a wait; add --wait")


def add_order(parser: argparse.ArgumentParser) -> None:
    """What is started, and with which values."""
    add_recipe(parser)
    add_platform(parser)
    parser.add_argument(
        "-p",
        "--parameter",
        dest="parameters",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a value for these runs alone: a parameter as the KFP UI shows it, or "
        "section.field=value of the recipe. --set changes the pipeline's own defaults instead, "
        "which makes a new version of it. May be repeated",
    )
    parser.add_argument("--pipeline-name", help="on the server (default: distillation-RECIPE)")
    parser.add_argument(
        "--experiment-name",
        help="KFP's experiment, made where it is missing (default: the recipe's tracking."
        "experiment) [KF_PIPELINES_DEFAULT_EXPERIMENT_NAME]",
    )
    parser.add_argument("--service-account", type=_name, help="of the pods (default: the server's)")
    parser.add_argument(
        "--no-cache",
        dest="reuse",
        action="store_false",
        help="repeat every step, also where an earlier run has its result",
    )


@contextmanager
def order(arguments: argparse.Namespace, name: str | None) -> Iterator[tuple[Package, Order]]:
    """The compiled pipeline and what is asked of it; nothing has been sent yet.

    Args:
        arguments: of `add_order`.
        name: of the run or schedule; None: the recipe's.

    Raises:
        UserError: recipe, platform or parameters are wrong.
    """
    platform = load_platform(arguments.platform)
    recipe, note = fitted(read_recipe(arguments), platform)
    sys.stdout.write(note)
    where = Path(arguments.platform).stem
    with TemporaryDirectory(prefix="flagscale-") as folder:
        package = make_package(recipe, platform, Path(folder), arguments.pipeline_name, where)
        parameters = read_parameters(arguments.parameters, package.definitions, recipe, platform)
        check_run(parameters.recipes)
        sys.stdout.write(notes(parameters.recipes[0], platform, parameters.sent))
        yield (
            package,
            Order(
                name=name or f"{recipe.name} on {where}",
                experiment=experiment_name(arguments.experiment_name, recipe),
                parameters=parameters.sent,
                tracking_experiment=parameters.sent.get(
                    "tracking_experiment", recipe.tracking.experiment
                ),
                service_account=arguments.service_account,
                reuse=arguments.reuse,
            ),
        )


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: must be a number of seconds, more than 0")
    return value


def _name(text: str) -> str:
    try:
        return TypeAdapter(Name).validate_python(text)
    except ValidationError:
        raise argparse.ArgumentTypeError(
            f"{text!r}: must be a name as Kubernetes takes it, like pipeline-runner"
        ) from None
