"""Runs a step's function on nodes of their own, as a TrainJob of Kubeflow Trainer.

The step's process is the launcher: it creates the TrainJob, follows it, and deletes it whatever
happens. Its ranks are those of `flagscale.ranks.launch`, torchrun's on each node; Trainer tells
torchrun where the others are. Request, result and errors go through a folder on the shared volume.

How it ends:

* The launcher is asked to stop: so are the ranks, through the heartbeat; they save and end.
* The launcher is killed: the heartbeat stands still, and the ranks save and end by themselves. A
  retry of the step deletes what is left of the TrainJob, which it knows by name, and goes on from
  the checkpoint. Where there is none, Kubernetes deletes it with the launcher's pod, its owner.
* A rank fails, or a node is lost: the step fails with the first rank's error, and may be retried.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
import uuid
from pathlib import Path
from typing import Any

from flagscale import variables
from flagscale.artifacts import digest
from flagscale.errors import Interrupted, UserError
from flagscale.ranks import heartbeat
from flagscale.ranks.cluster import Cluster
from flagscale.ranks.heartbeat import Heartbeat
from flagscale.ranks.launch import REQUEST_VARIABLE, rank_command, rank_environment
from flagscale.ranks.rank_folder import RankFolder
from flagscale.ranks.trainjob_log import NodeLog
from flagscale.ranks.trainjob_manifest import Nodes, train_job
from flagscale.ranks.trainjob_state import all_ended, dead_pod, failure, is_complete, waiting
from flagscale.steps.signals import deferred_stop, stop_requested

logger = logging.getLogger(__name__)

STOP_VARIABLE = "FLAGSCALE_STOP_SECONDS"
_POLL_SECONDS = 0.2
_LOOK_SECONDS = 2.0  # between two looks at the TrainJob
_SETTLE_SECONDS = 10.0  # for the other ranks to say how they end, once one has failed
_REMIND_SECONDS = 60.0
_API_PATIENCE_SECONDS = 300.0
_GRACE_SECONDS = 300  # that Kubernetes gives a node to save
_GONE_SECONDS = _GRACE_SECONDS + 60.0
_RESULT_SECONDS = 60.0
_LOG_SECONDS = 5.0  # for the rest of the log: the TrainJob is deleted after it


def job_name(step: str, identity: Any) -> str:  # noqa: ANN401 - a JSON value
    """The name by which a retry of a step knows the TrainJob of the try before.

    Args:
        step: its name.
        identity: of what is to be done; the same in every try, in no other task.
    """
    run = os.environ.get(variables.KFP_RUN, "")
    return f"{step}-{digest([run, identity]).removeprefix('sha256:')[:12]}"


def run_on_nodes(
    step: str,
    function: str,
    request: dict[str, Any],
    nodes: Nodes,
    shared: Path,
    name: str,
) -> Any:  # noqa: ANN401 - any JSON value
    """Call a function in every rank of a TrainJob, and give back what the first returned.

    Args:
        step: its name, for the log.
        function: `module:name`; its result is a JSON value.
        request: its keyword arguments, JSON values.
        nodes: how many, with what.
        shared: a folder that every node sees under the same path.
        name: of the TrainJob, from `job_name`.

    Raises:
        UserError: something is missing that it needs; or a rank failed, and this is its message.
        Interrupted: this process was asked to stop, and the ranks have stopped.
    """
    cluster = Cluster()
    pod_name = os.environ.get("KFP_POD_NAME")
    if not pod_name:
        raise UserError(
            "KFP_POD_NAME is not set: a TrainJob is started by a pod of Kubeflow Pipelines. "
            "`python -m pipelines run` trains on this machine"
        )
    kind = cluster.check(nodes.pods.runtime)
    launcher = cluster.pod(pod_name)
    home = shared / "launches" / name
    from kubernetes.utils.quantity import parse_quantity

    with deferred_stop():
        _clear(cluster, name, home)
        ranks = RankFolder.create(home / uuid.uuid4().hex[:8], request)
        manifest = train_job(
            name,
            kind,
            launcher,
            shared,
            nodes,
            rank_command(step, function, nodes.processes),
            _environment(ranks.path),
            rank_environment(float(parse_quantity(nodes.pods.cpu)), nodes.processes),
            _GRACE_SECONDS,
        )
        result = _Launch(cluster, name, ranks, nodes).run(manifest)
    shutil.rmtree(home, ignore_errors=True)
    return result


class _Launch:
    """One TrainJob, from its creation to its deletion."""

    def __init__(self, cluster: Cluster, name: str, ranks: RankFolder, nodes: Nodes) -> None:
        self._cluster, self._name, self._ranks, self._nodes = cluster, name, ranks, nodes
        self._started = self._heard = self._reminded = time.monotonic()
        self._running = self._ended = False

    def run(self, manifest: dict[str, Any]) -> Any:  # noqa: ANN401 - any JSON value
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
        if why is not None:
            self._ranks.raise_error(stop_requested(), otherwise=why)
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
                return why or f"TrainJob {self._name}: a rank ended early; see the log above"
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
            return False, why or f"TrainJob {self._name} was deleted by somebody else"
        if is_complete(job):
            return True, None
        self._ended = all_ended(pods)
        self._tell(waiting(job, pods, self._nodes.count))
        failed = failure(job)
        # The first to die is the one to tell of: the others end because of it.
        return False, why or dead_pod(pods) or (failed and f"TrainJob {self._name}: {failed}")

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
        for attempt in range(3):
            try:
                self._cluster.delete(self._name)
                return
            except UserError as error:
                logger.warning("%s", error)
                time.sleep(1.0 + attempt)


def _clear(cluster: Cluster, name: str, home: Path) -> None:
    """Remove the TrainJob of a launcher that was killed, and wait until its pods are gone.

    Raises:
        UserError: they do not go.
        Interrupted: this process was asked to stop meanwhile.
    """
    for earlier in home.glob("*/"):
        heartbeat.ask_to_stop(earlier)
    if cluster.find(name) is not None or cluster.pods(name):
        logger.info("TrainJob %s is left of an earlier try: deleting it", name)
        cluster.delete(name)
        deadline = time.monotonic() + _GONE_SECONDS
        while cluster.find(name) is not None or cluster.pods(name):
            if time.monotonic() > deadline:
                raise UserError(
                    f"TrainJob {name} of an earlier try is still being deleted; see `kubectl "
                    f"describe trainjob {name}`, and start the step again when it is gone"
                )
            if stop_requested():
                raise Interrupted(f"stopped while TrainJob {name} of an earlier try was deleted")
            time.sleep(1.0)
    shutil.rmtree(home, ignore_errors=True)


def _environment(folder: Path) -> dict[str, str]:
    """What ranks must have, whatever the launcher's pod has."""
    found = {REQUEST_VARIABLE: str(folder)}
    for name in ("MLFLOW_EXPERIMENT_NAME", heartbeat.LIMIT_VARIABLE):
        if name in os.environ:
            found[name] = os.environ[name]
    return found


def _stop_seconds() -> float:
    """How long the launcher waits for ranks to save; its pod has 30 seconds to end in all.

    Deleting the TrainJob then does not cut them short: they have `_GRACE_SECONDS`.
    """
    return float(os.environ.get(STOP_VARIABLE, "20"))
