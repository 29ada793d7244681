"""What MLflow is still to be told of a run: kept until the server takes it, while work goes on.

A thread sends it: letters (a tag, a status) one after the other, points of curves some seconds'
worth at a time. A server that is away is asked again until it is back; then everything arrives,
with the times at which it happened. Nothing arrives twice: MLflow's tables have one row for a
point's name, step, time and value, and what else is sent can be sent again.

Nothing lies on a disk: a training that is killed while its server is away tells its whole curve
when it goes on, and any other step is done again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from flagscale.tracking.delivery import Patience, answers, delivered, is_refusal
from flagscale.tracking.letters import Begun, Letter, Point, Send
from flagscale.tracking.names import first_line
from flagscale.tracking.server import send_metrics

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

_BATCH_SECONDS = 5.0
_GLANCE_SECONDS = 1.0  # for which the work waits to see whether a letter arrives
_MOST_POINTS = 200_000
_METRICS_A_BATCH = 500


class Outbox:
    """Of one run. No method raises for MLflow; those that wait are told for how long.

    Attributes:
        begun: the run; None as long as the server has not made it.
        refused: why it never will; None otherwise.
    """

    def __init__(
        self, connect: Callable[[], MlflowClient], begin: Callable[[MlflowClient], Begun]
    ) -> None:
        """Start the thread, which first connects and begins.

        Args:
            connect: makes a client; may be called several times.
            begin: finds or makes the run; ditto.
        """
        self.begun: Begun | None = None
        self.refused: str | None = None
        self._connect, self._begin = connect, begin
        self._client: MlflowClient | None = None
        self._letters: deque[Letter] = deque()
        self._points: list[Point] = []
        self._flying: Sequence[Point] = ()
        self._changed = threading.Condition()
        self._away = self._hurry = False
        self._lost: list[str] = []
        threading.Thread(target=self._work, daemon=True, name="mlflow").start()

    def begins_within(self, seconds: float) -> bool:
        """Wait for the run, no longer than until the server turns out to be away."""
        self._wait(lambda: self.begun or self.refused or self._away, seconds)
        return self.begun is not None

    def put_points(self, points: Sequence[Point]) -> None:
        """Returns at once: they are sent every few seconds."""
        with self._changed:
            self._points += points
            too_many = len(self._points) - _MOST_POINTS
            if too_many > 0:
                del self._points[:too_many]
                self._lose("metrics", f"MLflow was behind by {_MOST_POINTS} figures")
            if len(self._points) == len(points) or len(self._points) >= _METRICS_A_BATCH:
                self._changed.notify_all()  # there is something again, or much

    def put(self, kind: str, send: Send, *, glance: bool = True) -> None:
        """Send something after what has been put before it.

        Args:
            kind: what it is, for the log.
            send: see `Letter`.
            glance: wait a moment to see it arrive, so that what is read next is true; not where
                the server is known to be away.
        """
        letter = Letter(kind, send)
        with self._changed:
            self._letters.append(letter)
            self._changed.notify_all()
        if glance:
            self._wait(lambda: letter.done.is_set() or self._away, _GLANCE_SECONDS)

    def attempt(self, kind: str, send: Send) -> Any:  # noqa: ANN401 - what `send` returns
        """Send something from the work's own thread, as long as it takes and patience lasts.

        For what is large, or gone in a moment.

        Args:
            kind: what it is, for the log.
            send: see `Letter`.

        Returns:
            What `send` returned; None if it was given up.
        """
        began: float | None = None

        def waits(error: Exception, pause: float) -> bool:
            nonlocal began
            began = began or time.monotonic()
            self._trouble(kind, error)
            left = began + Patience.left - time.monotonic()
            time.sleep(max(0.0, min(pause, left)))
            return left > 0

        if self.begun is None:
            with Patience.spent():
                self._wait(lambda: self.begun or self.refused, Patience.left)
        client, begun = self._client, self.begun
        if self.refused is not None or client is None or begun is None:
            return None
        answer, lost = delivered(lambda: send(client, begun), lambda: answers(client), waits)
        if began is not None:
            Patience.left = max(0.0, Patience.left - (time.monotonic() - began))
            self._over()
        if lost is not None:
            self._lose(kind, lost)
        return answer

    def give_up(self) -> None:
        """Send nothing any more: nobody waits for it."""
        self.refused = self.refused or "the server was away"

    def drain(self, seconds: float) -> bool:
        """Send what there is, and wait for it; whether nothing is left."""
        with self._changed:
            self._hurry = True
            self._changed.notify_all()
        with Patience.spent():
            self._wait(lambda: not self._left, seconds)
        return not self._left

    @property
    def left(self) -> str:
        """What has not arrived yet, in words."""
        points = len(self._points) + len(self._flying)
        figures = [f"{points} figures"] if points else []
        return ", ".join(figures + [letter.kind for letter in self._letters])

    @property
    def lost(self) -> str:
        """What did not arrive and never will, and why, in words."""
        return "; ".join(self._lost)

    @property
    def _left(self) -> bool:
        return bool(self._letters or self._points or self._flying)

    def _wait(self, until: Callable[[], object], seconds: float) -> None:
        with self._changed:
            self._changed.wait_for(until, seconds)

    def _work(self) -> None:
        """The thread's whole life; it ends with the process."""
        self._start()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._letters or self._points)
                self._changed.wait_for(self._is_due, _BATCH_SECONDS)
                letter = self._letters[0] if self._letters else None
            if letter is not None:
                self._deliver(letter)
            elif self._points:
                self._deliver_points()

    def _is_due(self) -> bool:
        many = len(self._points) >= _METRICS_A_BATCH
        return bool(self._letters) or many or (self._hurry and bool(self._points))

    def _start(self) -> None:
        def start() -> tuple[MlflowClient, Begun]:
            client = self._client or self._connect()
            self._client = client
            return client, self._begin(client)

        def waits(error: Exception, pause: float) -> bool:
            return not is_refusal(error, at_the_door=True) and self._pause("the run", error, pause)

        found, refused = delivered(start, self._serves, waits)
        with self._changed:
            self.refused = self.refused or refused
            if found is not None:
                self._client, self.begun = found
            self._changed.notify_all()
        if found is None:
            logger.warning("MLflow: nothing is tracked: %s", self.refused)

    def _serves(self) -> bool:
        return self._client is not None and answers(self._client)

    def _deliver(self, letter: Letter) -> None:
        lost = self._told(letter.kind, letter.send)
        with self._changed:
            self._letters.popleft()
            letter.done.set()
            self._changed.notify_all()
        if lost is not None:
            self._lose(letter.kind, lost)

    def _deliver_points(self) -> None:
        with self._changed:
            self._flying = self._points[:_METRICS_A_BATCH]
            del self._points[: len(self._flying)]
        batch = self._flying
        lost = self._told("metrics", lambda client, begun: _send(client, begun, batch))
        if lost is not None and len(batch) > 1:  # perhaps because of one of them
            each = [self._told("metrics", partial(_send, points=[one])) for one in batch]
            lost = next((why for why in each if why is not None), None)
        if lost is not None:
            self._lose("metrics", lost)
        with self._changed:
            self._flying = ()
            self._hurry = self._hurry and bool(self._points)
            self._changed.notify_all()

    def _told(self, kind: str, send: Send) -> str | None:
        """Tell the server something; why it was not taken, None if it was."""
        client, begun = self._client, self.begun
        if self.refused is not None or client is None or begun is None:
            return self.refused
        _, lost = delivered(
            lambda: send(client, begun),
            self._serves,
            lambda error, pause: self._pause(kind, error, pause),
        )
        self._over()
        return lost

    def _pause(self, kind: str, error: Exception, pause: float) -> bool:
        self._trouble(kind, error)
        time.sleep(pause)
        return self.refused is None

    def _trouble(self, kind: str, error: Exception) -> None:
        if not self._away:
            logger.warning("MLflow does not take %s, is asked again: %s", kind, first_line(error))
        with self._changed:
            self._away = True
            self._changed.notify_all()

    def _over(self) -> None:
        if self._away:
            self._away = False
            logger.info("MLflow takes what it is told again")

    def _lose(self, kind: str, why: str) -> None:
        """Once a kind."""
        if self.refused is not None or any(one.startswith(f"{kind}: ") for one in self._lost):
            return
        self._lost.append(f"{kind}: {why}")
        logger.error("MLflow did not take %s, going on: %s", kind, why)


def outbox_of(client: MlflowClient, begun: Begun) -> Outbox:
    """Of a run that there is."""
    outbox = Outbox(lambda: client, lambda _: begun)
    outbox.begins_within(60.0)  # no server is asked
    return outbox


def _send(client: MlflowClient, begun: Begun, points: Sequence[Point]) -> None:
    """What the run does not have yet; again it would be taken for new if its time is another."""
    new = [
        (name, value, time_ms, step or 0)
        for name, value, time_ms, step in points
        if step is None or step not in begun.known.get(name, ())
    ]
    if new:
        send_metrics(client, begun.run_id, new)
