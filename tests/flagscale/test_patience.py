"""Asking again: which failures, how long, and for whom."""

import logging
import os
import signal
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest

from flagscale.errors import Interrupted, UserError
from flagscale.execution.signals import signals_raise
from flagscale.patience import is_away, patiently, pauses, resumed
from flagscale.stop import deferred_stop
from tests.flagscale.web_server import HANGS_UP, WebServer

SHORT = (0.01, 0.02, 0.04)


def fetch(server: WebServer, name: str = "a.txt") -> str:
    with urllib.request.urlopen(f"{server.url}/{name}") as answer:
        return str(answer.read().decode())


@pytest.fixture
def text(web_server: WebServer) -> WebServer:
    (web_server.folder / "a.txt").write_text("text")
    return web_server


def test_what_passes_is_outlasted_and_told(
    text: WebServer, caplog: pytest.LogCaptureFixture
) -> None:
    text.troubles = [503, HANGS_UP, 429]
    assert patiently(lambda: fetch(text), "read a.txt", is_away, SHORT) == "text"
    assert len(text.requests) == 4
    told = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert told[0] == (
        "cannot read a.txt: HTTP Error 503: Service Unavailable; trying again in 0 s"
    )
    assert len(told) == 3


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 422])
def test_what_is_refused_is_not_asked_for_again(text: WebServer, status: int) -> None:
    text.troubles = [status]
    with pytest.raises(urllib.error.HTTPError, match=str(status)):
        patiently(lambda: fetch(text), "read", is_away, SHORT)
    assert len(text.requests) == 1


def test_patience_ends(text: WebServer) -> None:
    text.troubles = [503] * 100
    with pytest.raises(urllib.error.HTTPError, match="503"):
        patiently(lambda: fetch(text), "read", is_away, SHORT)
    assert len(text.requests) == 1 + len(SHORT)


def test_pods_are_patient_and_people_are_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KFP_RUN_ID", raising=False)
    assert pauses() == ()
    monkeypatch.setenv("KFP_RUN_ID", "run-1")
    assert sum(pauses()) == 240
    assert list(pauses()) == sorted(pauses())
    monkeypatch.setenv("FLAGSCALE_PATIENCE_SECONDS", "60")
    assert sum(pauses()) == pytest.approx(60)
    monkeypatch.setenv("FLAGSCALE_PATIENCE_SECONDS", "0")
    assert pauses() == ()
    for text in ("long", "-1", "inf", "nan"):
        monkeypatch.setenv("FLAGSCALE_PATIENCE_SECONDS", text)
        with pytest.raises(UserError, match=f"FLAGSCALE_PATIENCE_SECONDS='{text}': must be a"):
            pauses()


@pytest.mark.parametrize("deferred", [False, True])
def test_a_request_to_stop_ends_patience_at_once(text: WebServer, deferred: bool) -> None:
    """Also where signals wait for a loop that asks."""
    text.troubles = [503] * 100

    def stop(error: Exception) -> bool:
        # Main thread's handlers run between two of its instructions: in the pause that follows.
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGTERM)).start()
        return is_away(error)

    def ask() -> None:
        with pytest.raises(Interrupted, match="stopped by a signal"):
            patiently(lambda: fetch(text), "read", stop, [600])

    with signals_raise():
        if deferred:
            with deferred_stop():
                ask()
        else:
            ask()
    assert len(text.requests) == 1


def test_an_iterator_goes_on_where_it_broke_off() -> None:
    breaks = [0, 3, 3, 4]

    def numbers() -> Iterator[int]:
        for number in range(5):
            if breaks and breaks[0] == number:
                breaks.pop(0)
                raise ConnectionResetError
            yield number

    # Two pauses are enough for four failures: each time but one it got further.
    assert list(resumed(numbers, "count", is_away, [0.01, 0.01])) == list(range(5))
    assert not breaks


def test_an_iterator_that_gets_no_further_fails() -> None:
    starts = []

    def numbers() -> Iterator[int]:
        starts.append(1)
        yield 0
        raise ConnectionResetError

    found = resumed(numbers, "count", is_away, [0.01, 0.01])
    assert next(found) == 0
    with pytest.raises(ConnectionResetError):
        next(found)
    assert len(starts) == 3
