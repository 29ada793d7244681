"""One TrainJob, from its creation to its deletion: what becomes of it, and when it must end."""

from __future__ import annotations

import logging
import os
import time
from typing import Any

from flagscale.errors import UserError
from flagscale.execution.heartbeat import Heartbeat
from flagscale.execution.rank_folder import RankFolder
from flagscale.execution.rank_logs import keep_failed
from flagscale.execution.trainjob.cluster import Cluster
from flagscale.execution.trainjob.log import NodeLog
from flagscale.execution.trainjob.manifest import Nodes
from flagscale.execution.trainjob.state import (
    all_ended,
    dead_pod,
    failure,
    is_complete,
    is_lost,
    lasting,
    waiting,
)
from flagscale.stop import stop_requested

logger = logging.getLogger(__name__)

STOP_VARIABLE = "FLAGSCALE_STOP_SECONDS"
_POLL_SECONDS = 0.2
_LOOK_SECONDS = 2.0  # between two looks at the TrainJob
_SETTLE_SECONDS = 10.0  # for the other ranks to say how they end, once one has failed
_REMIND_SECONDS = 60.0
_API_PATIENCE_SECONDS = 300.0
_RESULT_SECONDS = 60.0
_LOG_SECONDS = 5.0  # for the rest of the log: the TrainJob is deleted after it


class Launch:
    """One TrainJob.

    Args:
        cluster: where.
        name: of the TrainJob; there is none of this name.
        ranks: their folder.
        nodes: what is started.
    """

    def __init__(self, cluster: Cluster, name: str, ranks: RankFolder, nodes: Nodes) -> None:
        self._cluster, self._name, self._ranks, self._nodes = cluster, name, ranks, nodes
        self._started = self._heard = self._reminded = time.monotonic()
        self._running = self._ended = self._lost = False
        self._lasting: str | None = None
        self._pods: set[str] = set()

    def run(self, manifest: dict[str, Any]) -> Any:  # noqa: ANN401 - any JSON value
        """Create it, follow it, delete it; what the first rank returned.

        Raises:
            UserError: a rank failed, or it took longer than it may.
            LostError: ranks were stopped from outside, killed or lost.
            Interrupted: this process was asked to stop, and the ranks have stopped.
        """
        with Heartbeat(self._ranks.path, stop_requested) as heart:
            log = None
            try:
                self._cluster.create(manifest)
                logger.info(
                    "TrainJob %s: %d nodes x %d processes",
                    self._name,
                    self._nodes.count,
                    self._nodes.processes,
                )
                log = NodeLog(self._cluster, self._name)
                why = self._follow(heart)
            finally:
                try:
                    if log is not None:
                        log.finish(_LOG_SECONDS)
                finally:
                    self._delete()
        if (self._lasting or why) is not None and not stop_requested():
            keep_failed(self._ranks)
        if self._lasting is not None and not stop_requested():
            raise UserError(f"TrainJob {self._name}: {self._lasting}")
        if why is not None:
            self._ranks.raise_error(stop_requested(), otherwise=why, lost=self._lost)
        return self._ranks.result(_RESULT_SECONDS)

    def _follow(self, heart: Heartbeat) -> str | None:
        """Until it ends, or must be ended; why it failed, None if it did not."""
        why: str | None = None
        deadline = look_at = 0.0
        while True:
            if time.monotonic() >= look_at:
                look_at = time.monotonic() + _LOOK_SECONDS
                finished, why = self._look(why)
                if finished:
                    return None
            if stop_requested() and not deadline:
                logger.info("stopping: waiting for the ranks to save")
                heart.stop()
                deadline = time.monotonic() + _stop_seconds()
            exits = self._ranks.exits()
            if not deadline and (why or exits):
                heart.stop()
                deadline = time.monotonic() + _SETTLE_SECONDS
            # Ranks that have not started have nothing to save, and none will be waited for.
            ended = self._ended or len(exits) >= len(self._ranks.ranks())
            if deadline and (ended or time.monotonic() > deadline):
                # What the API says by now: a pod was taken away, its time was up.
                finished, why = self._look(why)
                early = f"TrainJob {self._name}: a rank ended early; see the log above"
                return None if finished else why or early
            time.sleep(_POLL_SECONDS)

    def _look(self, why: str | None) -> tuple[bool, str | None]:
        """Whether it is complete, and why it cannot be any more."""
        try:
            job = self._cluster.find(self._name)
            pods = self._cluster.pods(self._name)
        except UserError as error:
            silent = time.monotonic() - self._heard
            logger.debug("%s", error)
            late = f"no answer for {silent:.0f} seconds: {error}"
            return False, why or (late if silent > _API_PATIENCE_SECONDS else None)
        self._heard = time.monotonic()
        if job is None:
            self._lasting = self._lasting or "deleted by somebody else"
            return False, why or self._lasting
        if is_complete(job):
            return True, None
        self._ended = all_ended(pods)
        self._tell(waiting(job, pods, self._nodes.count))
        failed = failure(job)
        self._lasting = self._lasting or lasting(job, pods)
        gone = None if failed else self._gone(pods)  # those of a failed one are deleted
        self._lost = self._lost or gone is not None or is_lost(pods)
        # The first to die is the one to tell of: the others end because of it.
        dead = dead_pod(pods) or gone
        return False, why or dead or (failed and f"TrainJob {self._name}: {failed}")

    def _gone(self, pods: list[dict[str, Any]]) -> str | None:
        """A pod that there was, and that vanished with its node; None if all are there."""
        names = {pod["metadata"]["name"] for pod in pods}
        gone, self._pods = sorted(self._pods - names), self._pods | names
        return f"pod {gone[0]} is gone" if gone else None

    def _tell(self, waits_for: str | None) -> None:
        """Say once that all nodes run, and every minute what is waited for."""
        now = time.monotonic()
        if waits_for is None:
            if not self._running:
                logger.info("all nodes run, after %.0f seconds", now - self._started)
            self._running = True
        elif not self._running and now - self._reminded > _REMIND_SECONDS:
            self._reminded = now
            logger.info("waiting for nodes, %.0f s: %s", now - self._started, waits_for)

    def _delete(self) -> None:
        """In the end, whatever happened: a few times, also when the step was asked to stop."""
        for attempt in range(3):
            try:
                self._cluster.delete(self._name)
                return
            except UserError as error:
                logger.warning("%s", error)
                time.sleep(1.0 + attempt)


def _stop_seconds() -> float:
    """How long the launcher waits for ranks to save; its pod has 30 seconds to end in all.

    Deleting the TrainJob then does not cut them short: they have `_GRACE_SECONDS`.
    """
    return float(os.environ.get(STOP_VARIABLE, "20"))
