"""Which failures of what fsspec reaches, object stores and web servers, pass by themselves.

KFP does not repeat a step that ended with an error, so what passes is waited out here. What does
not (wrong credentials, no such bucket, a certificate) is told at once.
"""

from __future__ import annotations

import errno
import socket

from flagscale.patience import causes

_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504})
# S3's servers give these with status 400 or 403 too.
_CODES = frozenset(
    {"RequestTimeout", "SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded"}
)
_ERRNOS = frozenset(
    {
        errno.ECONNABORTED,
        errno.ECONNREFUSED,
        errno.ECONNRESET,
        errno.EHOSTUNREACH,
        errno.ENETUNREACH,
        errno.EPIPE,
        errno.ETIMEDOUT,
        socket.EAI_AGAIN,
    }
)
# By name: the libraries of stores are not installed everywhere. botocore's, aiohttp's, azure's.
_CONNECTION_ERRORS = frozenset(
    {
        "ClientConnectionError",
        "ClientPayloadError",
        "ConnectionError",
        "HTTPClientError",
        "HttpProcessingError",
        "IncompleteRead",
        "ResponseParserError",
        "ServiceRequestError",
        "ServiceResponseError",
    }
)
_LASTING_ERRORS = frozenset({"ClientSSLError", "SSLError", "SSLCertVerificationError"})


def passes(error: BaseException) -> bool:
    """Whether the same request may succeed in a while."""
    found = [_judge(one) for one in causes(error)]
    return True in found and False not in found


def http_status(error: BaseException) -> int | None:
    """What the store's server answered; None if there was no answer."""
    return next((s for s in map(_status, causes(error)) if s is not None), None)


def error_code(error: BaseException) -> str:
    """S3's name of the error; empty if it gave none."""
    return next((code for code in map(_code, causes(error)) if code), "")


def _judge(error: BaseException) -> bool | None:
    """Of one error alone: whether it passes; None if it says nothing."""
    names = {kind.__name__ for kind in type(error).__mro__}
    if names & _LASTING_ERRORS:
        return False
    number = error.errno if isinstance(error, OSError) else None
    if isinstance(error, socket.gaierror) and number != socket.EAI_AGAIN:
        return False  # there is no such server
    if names & _CONNECTION_ERRORS or isinstance(error, ConnectionError | TimeoutError):
        return True  # before a status: aiohttp gives a broken answer one, of its own
    status = _status(error)
    if status is not None:
        return status in _STATUSES or _code(error) in _CODES
    return True if number in _ERRNOS else None


def _status(error: BaseException) -> int | None:
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore's
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return found if isinstance(found, int) else None
    values = (getattr(error, name, None) for name in ("status", "status_code", "code"))
    return next((value for value in values if isinstance(value, int)), None)


def _code(error: BaseException) -> str:
    response = getattr(error, "response", None)
    return str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""
