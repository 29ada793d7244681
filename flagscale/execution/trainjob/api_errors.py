"""What Kubernetes' API, and its clients, say when something fails."""

from __future__ import annotations

import json
from typing import Any

from flagscale.patience import is_away


def is_api_away(error: Exception) -> bool:
    """Whether Kubernetes' API is away or overloaded; what it refuses stays refused."""
    from urllib3.exceptions import HTTPError

    return is_away(error, HTTPError)


def status_of(error: BaseException | None) -> int | None:
    """HTTP status of what the API answered; the SDK hides it behind errors of its own."""
    while error is not None:
        status = getattr(error, "status", None)
        if isinstance(status, int):
            return status
        error = error.__cause__
    return None


def told(error: BaseException) -> str:
    """What the API's server said, or the last cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    body = getattr(error, "body", None)
    if body:
        return f"{getattr(error, 'status', '')} {_message(body)}"
    return f"{type(error).__name__}: {error}"


def _message(body: Any) -> str:  # noqa: ANN401 - text or bytes
    text = body.decode(errors="replace") if isinstance(body, bytes) else str(body)
    try:
        return str(json.loads(text)["message"])
    except (ValueError, KeyError, TypeError):
        return text.strip()
