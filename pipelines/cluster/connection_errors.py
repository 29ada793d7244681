"""What an exception of KFP's client means to its user, and what would be right."""

from __future__ import annotations

import json

import kfp_server_api
import urllib3
from google.auth.exceptions import GoogleAuthError

from flagscale.errors import UserError
from flagscale.secrets import HIDDEN, mask
from pipelines.cluster.connection import Connection

_AWAY = (429, 502, 503, 504)
_LONGEST_MESSAGE = 600
_FORWARD = "kubectl port-forward --namespace kubeflow svc/ml-pipeline-ui 8080:80"


class NotKfp(Exception):  # noqa: N818 - it says what the server is
    """The server answers, but not as KFP does."""


class BrokenAnswer(Exception):  # noqa: N818 - it says what arrived
    """The server's answer is not what was asked for: cut off, or of something in between."""


class StoppedWaiting(Exception):  # noqa: N818 - what was waited for goes on
    """Ctrl-C ended the waiting; the message says what goes on at the server."""


class Problem:
    """An exception, explained.

    Attributes:
        EXCEPTIONS: what KFP's client raises for what went wrong on the way or at the server.
    """

    EXCEPTIONS = (
        kfp_server_api.ApiException,
        urllib3.exceptions.HTTPError,
        GoogleAuthError,
        NotKfp,
        BrokenAnswer,
        TimeoutError,
        ConnectionError,
    )

    def __init__(
        self, error: Exception, place: str, connection: Connection, missing: str | None = None
    ) -> None:
        """Look at it.

        Args:
            error: one of `EXCEPTIONS`.
            place: the server's name.
            connection: how it was reached.
            missing: what a 404 means.
        """
        self.error = error
        self.status = getattr(error, "status", None) or None
        self._place = place
        self._connection = connection
        self._missing = missing

    def as_user_error(self, doing: str) -> UserError:
        """The error to end with."""
        return UserError(f"{doing}: {self}")

    def __str__(self) -> str:
        text = self._explanation()
        for secret in self._connection.secrets:
            text = text.replace(secret, HIDDEN)
        return mask(text)

    def _explanation(self) -> str:
        place = self._place
        if isinstance(self.error, NotKfp):
            return (
                f"{place} answers with a web page, not as KFP's API: a login page wants a token "
                "(KFP_EXISTING_TOKEN) or its cookie (KFP_COOKIES); on a whole Kubeflow the address "
                "ends in /pipeline"
            )
        if isinstance(self.error, BrokenAnswer):
            return f"{place} gives a broken answer: try again later"
        if isinstance(self.error, GoogleAuthError):
            # The client leaves aside what `gcloud auth application-default login` made.
            return (
                f"Google gives no token for {place} ({_first_line(str(self.error))}); name the key "
                "file of a service account in GOOGLE_APPLICATION_CREDENTIALS, or log in yourself "
                "with --other-client-id and --other-client-secret"
            )
        if not isinstance(self.error, kfp_server_api.ApiException) or self.status is None:
            return self._unreachable()
        if self.status == 401:
            return f"{place} answered 401 (not authenticated): {self._about_the_token()}"
        if self.status == 403:
            return f"{place} answered 403 (not allowed): {self._about_the_right()}"
        if self.status == 404:
            return self._missing or (
                f"{place} answered 404 (not found): it has no KFP API there (version 2.0 or later, "
                f"{place}/apis/v2beta1); on a whole Kubeflow the address ends in /pipeline"
            )
        if self.status in _AWAY:
            return f"{place} answered {self.status} ({self._said()}): try again later"
        return f"{place} answered {self.status}: {self._said()}"

    def _unreachable(self) -> str:
        reason = getattr(self.error, "reason", None) or self.error
        text = str(reason)
        if "SSL" in text or isinstance(reason, urllib3.exceptions.SSLError):
            return (
                f"{self._place}: TLS failed ({_first_line(text)}); a certificate authority of your "
                "own is named with --ssl-ca-cert, a server without TLS with http://"
            )
        what = "does not answer in time" if "timed out" in text else "cannot be reached"
        return (
            f"{self._place} {what} ({_cause(text)}); check --host, or forward a port: {_FORWARD}, "
            "then --host http://localhost:8080"
        )

    def _about_the_token(self) -> str:
        namespace = self._connection.namespace or "NAMESPACE"
        given = self._connection.existing_token or self._connection.token_file
        what = "the token is wrong or has expired" if given else "it wants a token"
        return (
            f"{what}; give one in KFP_EXISTING_TOKEN or --token-file, e.g. from: kubectl create "
            f"token default-editor --namespace {namespace} --audience pipelines.kubeflow.org"
        )

    def _about_the_right(self) -> str:
        namespace = self._connection.namespace
        where = f" in namespace {namespace}" if namespace else ""
        return (
            f"{self._said()}; the account needs the role kubeflow-pipelines-edit{where}"
            f"{', or name another --namespace' if namespace else ''}"
        )

    def _said(self) -> str:
        """The server's own words."""
        body = getattr(self.error, "body", None) or ""
        try:
            values = json.loads(body)
        except ValueError:
            values = None
        if isinstance(values, dict):
            # The API's own names; those of the two endpoints that take files.
            names = ("message", "error_details", "error_message", "error")
            body = next((str(values[name]) for name in names if values.get(name)), body)
        elif body.lstrip().startswith("<"):
            body = ""
        return (body.strip() or str(getattr(self.error, "reason", "")))[:_LONGEST_MESSAGE]


def is_transient(error: Exception, has_answered: bool) -> bool:
    """Whether to ask again: a server away, or a connection lost that was there before."""
    if isinstance(error, kfp_server_api.ApiException):
        return error.status in _AWAY
    if isinstance(error, GoogleAuthError):
        return has_answered and error.retryable
    return has_answered and not isinstance(error, NotKfp)


def is_passing(error: BaseException | None) -> bool:
    """Whether what was there before may be there again in some minutes: reason to go on waiting.

    Unlike a single question, a wait goes on after an error inside the server, or the page of
    whatever answers in its place.
    """
    if isinstance(error, kfp_server_api.ApiException):
        return error.status in _AWAY or (error.status or 0) >= 500
    if isinstance(error, NotKfp | BrokenAnswer):
        return True
    return isinstance(error, Problem.EXCEPTIONS) and is_transient(error, has_answered=True)


def _first_line(text: str) -> str:
    return text.strip().splitlines()[-1][:200] if text.strip() else "no reason given"


def _cause(text: str) -> str:
    """`Connection refused` of urllib3's long sentence."""
    return text.rpartition(": ")[2].strip("')\" ")[:200] or text[:200]
