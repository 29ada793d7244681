"""A KFP server that answers, with errors that say what would be right.

`Server.read` and `Server.write` run calls of `kfp.Client`. Reads are tried again when a server is
briefly away; writes are not, because the first may have arrived. No message holds a token.
"""

from __future__ import annotations

import io
import logging
import os
import re
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import TypeVar

import kfp
import kfp_server_api

from flagscale.errors import UserError
from pipelines.cluster.access import check_cluster, no_server_named
from pipelines.cluster.client import TIMEOUT_SECONDS, connect
from pipelines.cluster.connection import Connection
from pipelines.cluster.connection_errors import Problem, StoppedWaiting, is_transient

T = TypeVar("T")

_RETRIES = 4


class Server:
    """A KFP server that has answered and accepts the caller.

    Attributes:
        client: KFP's own.
        namespace: of the user's pipelines and runs; None on a single-user server.
    """

    def __init__(self, connection: Connection) -> None:
        """Connect, and check that the server is one that can be used.

        Raises:
            UserError: no server, no KFP, a token or namespace that it does not accept.
        """
        self.connection = connection
        self._has_answered = False
        # The address is in our own message; urllib3 would tell of each attempt.
        logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
        _check_there_is_a_host(connection)
        self.client = self.read("connecting", lambda: connect(connection))
        self.namespace = self._checked_namespace()
        self.read(
            f"looking into namespace {self.namespace}" if self.namespace else "looking around",
            lambda: self.client.experiments.experiment_service_list_experiments(
                page_size=1, namespace=self.namespace or "", _request_timeout=TIMEOUT_SECONDS
            ),
        )
        self._warn_of_age()

    def read(self, doing: str, call: Callable[[], T], missing: str | None = None) -> T:
        """Ask something; a server that is briefly away is asked again.

        Args:
            doing: opens the error's message.
            call: asks.
            missing: what to say of a 404.

        Raises:
            UserError: it failed.
        """
        for attempt in range(_RETRIES + 1):
            try:
                return self._with_a_fresh_token(call)
            except Problem.EXCEPTIONS as error:
                if attempt == _RETRIES or not is_transient(error, self._has_answered):
                    raise self.problem(error, missing).as_user_error(doing) from error
                time.sleep(0.25 * 2**attempt)
        raise AssertionError("the last attempt returns or raises")

    def read_once(self, doing: str, call: Callable[[], T], missing: str | None = None) -> T:
        """Ask something, for who has patience of his own; see `read`.

        Raises:
            UserError: it failed; its cause tells whether to ask again.
        """
        try:
            return self._with_a_fresh_token(call)
        except Problem.EXCEPTIONS as error:
            raise self.problem(error, missing).as_user_error(doing) from error

    def write(self, doing: str, call: Callable[[], T], missing: str | None = None) -> T:
        """Change something; asked once.

        Raises:
            UserError: it failed.
            StoppedWaiting: Ctrl-C came before the answer.
        """
        try:
            return self._quietly(call)
        except Problem.EXCEPTIONS as error:
            raise self.problem(error, missing).as_user_error(doing) from None
        except KeyboardInterrupt:
            raise StoppedWaiting(
                f"stopped while {doing}: it may have been done all the same; see {self.url('runs')}"
            ) from None

    def problem(self, error: Exception, missing: str | None = None) -> Problem:
        """What an exception of the client means here."""
        return Problem(error, place(self.connection), self.connection, missing)

    def renew(self) -> None:
        """Get a new token from wherever the old one came from."""
        # Without `existing_token` KFP's client finds its token anew each time it is made.
        self.client = self._quietly(lambda: connect(self.connection))

    def url(self, *path: str) -> str:
        """A page of the KFP UI.

        Args:
            path: e.g. `runs`, `details`, a run's id.
        """
        page = "/#/" + "/".join(path)
        host = os.environ.get("KF_PIPELINES_UI_ENDPOINT") or self.connection.ui_host
        host = host or self.connection.host or os.environ.get("KF_PIPELINES_ENDPOINT")
        if host is None:
            return f"/pipeline{page} of the KFP UI (--ui-host makes this a link)"
        host = host.rstrip("/")
        return (host if "://" in host else f"https://{host}") + page

    def _with_a_fresh_token(self, call: Callable[[], T]) -> T:
        """Ask; where the token has expired meanwhile, ask again with another."""
        try:
            return self._quietly(call)
        except kfp_server_api.ApiException as error:
            if not self._has_answered or error.status != 401:
                raise
        self.renew()
        return self._quietly(call)

    def _quietly(self, call: Callable[[], T]) -> T:
        """Without what the client prints: links in its own words."""
        with redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            answer = call()
        self._has_answered = True
        return answer

    def _checked_namespace(self) -> str | None:
        namespace: str | None = self.connection.namespace or self.client.get_user_namespace()
        health = self.client.health or {}
        if health.get("multi_user", health.get("apiServerMultiUser")):
            if not namespace:
                raise UserError(
                    f"{place(self.connection)} has a namespace for each user: name yours with "
                    "--namespace or KFP_NAMESPACE"
                )
            return namespace
        if self.connection.namespace:
            say(
                f"note: {place(self.connection)} has one user; --namespace "
                f"{self.connection.namespace} does nothing there"
            )
        return None

    def _warn_of_age(self) -> None:
        theirs, ours = _release(self.client.version()), _release(kfp.__version__)
        if theirs and ours and theirs < ours:
            say(
                f"warning: the server is KFP {self.client.version()}, older than the client's "
                f"{kfp.__version__}: it drops settings that it does not know, without a word"
            )


def say(text: str) -> None:
    """A line for the user, at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def place(connection: Connection) -> str:
    """The server's name in messages."""
    host = connection.host or os.environ.get("KF_PIPELINES_ENDPOINT")
    return host or "the cluster's service ml-pipeline"


def _check_there_is_a_host(connection: Connection) -> None:
    if connection.host or os.environ.get("KF_PIPELINES_ENDPOINT"):
        return
    if connection.existing_token or connection.client_id:
        # With these KFP's client looks for no cluster.
        raise no_server_named()
    check_cluster(connection.kube_context)


def _release(text: str | None) -> tuple[int, int] | None:
    found = re.match(r"v?(\d+)\.(\d+)", text or "")
    return (int(found[1]), int(found[2])) if found else None
