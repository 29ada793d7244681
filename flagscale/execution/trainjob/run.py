"""Runs a step's function on nodes of their own, as a TrainJob of Kubeflow Trainer.

The step's process is the launcher: it creates the TrainJob, follows it, and deletes it whatever
happens. Its ranks are those of `flagscale.execution.launch`, torchrun's on each node; Trainer tells
torchrun where the others are. Request, result and errors go through a folder on the shared volume.

How it ends:

* The launcher is asked to stop: so are the ranks, through the heartbeat; they save and end.
* The launcher is killed: the heartbeat stands still, and the ranks save and end by themselves. A
  retry of the step deletes what is left of the TrainJob, which it knows by name, and goes on from
  the checkpoint. Where there is none, Kubernetes deletes it with the launcher's pod, its owner.
* A node is drained or lost, or a rank killed: a new TrainJob goes on from the last checkpoint, a
  few times (`NodePods.restarts`).
* A rank fails: the step fails with the first rank's error.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from flagscale import variables
from flagscale.artifacts import digest
from flagscale.errors import Interrupted, UserError
from flagscale.execution import heartbeat
from flagscale.execution.launch import rank_command, rank_environment
from flagscale.execution.notes import REQUEST_VARIABLE
from flagscale.execution.rank_folder import LostError, RankFolder
from flagscale.execution.trainjob.api_errors import is_api_away
from flagscale.execution.trainjob.cluster import Cluster
from flagscale.execution.trainjob.launch import Launch
from flagscale.execution.trainjob.manifest import Nodes, train_job
from flagscale.patience import patiently
from flagscale.stop import deferred_stop, stop_requested

logger = logging.getLogger(__name__)

T = TypeVar("T")
_GRACE_SECONDS = 300  # that Kubernetes gives a node to save
_GONE_SECONDS = _GRACE_SECONDS + 60.0


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
    kind = cluster.check(nodes.pods.runtime, nodes.pods.network.host_network)
    launcher = cluster.pod(pod_name)
    from kubernetes.utils.quantity import parse_quantity

    def manifest(folder: Path) -> dict[str, Any]:
        return train_job(
            name,
            kind,
            launcher,
            shared,
            nodes,
            rank_command(step, function, nodes.processes),
            _environment(folder),
            rank_environment(float(parse_quantity(nodes.pods.cpu)), nodes.processes),
            _GRACE_SECONDS,
        )

    with deferred_stop():
        return _until_done(cluster, name, nodes, shared / "launches" / name, request, manifest)


def _until_done(
    cluster: Cluster,
    name: str,
    nodes: Nodes,
    home: Path,
    request: dict[str, Any],
    manifest: Callable[[Path], dict[str, Any]],
) -> Any:  # noqa: ANN401 - any JSON value
    """One TrainJob after the other, until one ends well or fails for good.

    KFP starts no step anew because a node of its TrainJob was drained or lost: the step was not.

    Raises:
        LostError: it happened too often.
        Interrupted: this process was asked to stop.
    """
    left = nodes.pods.restarts
    while True:
        _clear(cluster, name, home)
        ranks = RankFolder.create(home / uuid.uuid4().hex[:8], request)
        try:
            result = Launch(cluster, name, ranks, nodes).run(manifest(ranks.path))
        except LostError as error:
            if stop_requested():
                raise Interrupted(str(error)) from error
            if not left:
                raise LostError(f"{error}; start it again, it goes on from there") from error
            logger.warning("%s; starting all nodes anew, at most %d times", error, left)
            left -= 1
        else:
            shutil.rmtree(home, ignore_errors=True)
            return result


def _clear(cluster: Cluster, name: str, home: Path) -> None:
    """Remove the TrainJob of a launcher that was killed, and wait until its pods are gone.

    Raises:
        UserError: they do not go.
        Interrupted: this process was asked to stop meanwhile.
    """
    for earlier in home.glob("*/"):
        heartbeat.ask_to_stop(earlier)

    def is_there() -> bool:
        return cluster.find(name) is not None or bool(cluster.pods(name))

    def patient(call: Callable[[], T], doing: str) -> T:
        return patiently(call, f"{doing} TrainJob {name}", is_api_away)

    if patient(is_there, "look for"):
        logger.info("TrainJob %s is left of an earlier try: deleting it", name)
        patient(lambda: cluster.delete(name), "delete")
        deadline = time.monotonic() + _GONE_SECONDS
        while patient(is_there, "look for"):
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
