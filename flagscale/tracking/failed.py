"""A step that failed outside its run: before it had one, or when its outputs were put in place."""

from __future__ import annotations

import logging
import socket
import tempfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from flagscale.secrets import mask
from flagscale.tracking.kfp_run import KfpRun, overall_status
from flagscale.tracking.names import (
    OF_KFP_RUN_TAG,
    PARENT_TAG,
    PROCESS_TAG,
    first_line,
    here,
    own_kfp_run,
)
from flagscale.tracking.place import find_place
from flagscale.tracking.server import (
    UPLOAD_TIMEOUT,
    environment,
    make_client,
    tracking_uri,
)
from flagscale.tracking.step import run_of_process

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)


def step_failed(name: str, status: str) -> None:
    """Tell of a step that failed outside `step_run`: its outputs could not be put in place.

    Or, on a cluster, before it had a run of its own.

    Args:
        name: of the step.
        status: FAILED or KILLED.
    """
    run = run_of_process()
    if run is not None:
        if run.status == "FINISHED":
            run.finish(status)
        return
    uri = tracking_uri()
    if not uri or own_kfp_run() is None:
        return
    try:
        _note_failure(make_client(uri), name, status)
    except Exception as error:  # whatever MLflow raises: the step's own error is what counts
        logger.warning("MLflow was not told that %s failed: %s", name, first_line(error))


def keep_files(run_id: str, files: Mapping[str, Path]) -> None:
    """Store files with a run whose process has ended, e.g. the logs of those that failed.

    Args:
        run_id: of a run of this process's server.
        files: path among the run's artifacts -> file; secrets are masked.
    """
    uri = tracking_uri()
    if not uri:
        return
    try:
        client = make_client(uri)
        with environment(UPLOAD_TIMEOUT), tempfile.TemporaryDirectory() as folder:
            for name, path in files.items():
                place = PurePosixPath(name)
                shown = Path(folder, place.name)
                shown.write_text(mask(path.read_text(encoding="utf-8", errors="replace")))
                client.log_artifact(run_id, str(shown), str(place.parent))
    except Exception as error:  # whatever MLflow raises: the step's own error is what counts
        logger.warning("MLflow did not take %s: %s", ", ".join(files), first_line(error))


def _note_failure(client: MlflowClient, name: str, status: str) -> None:
    """End the runs that this pod's other processes left; where none failed, make one that did."""
    place = find_place(client, name)
    query = f"tags.`{OF_KFP_RUN_TAG}` = '{own_kfp_run()}' and attributes.status = 'RUNNING'"
    for run in client.search_runs([place.experiment_id], query):
        host = run.data.tags.get(PROCESS_TAG, "").partition(":")[0]
        if run.info.run_name == name and host == socket.gethostname():
            client.set_terminated(run.info.run_id, status)
    if place.kfp_run is not None:  # else KFP's plugin has a run for the task, and ends it
        _show_failure(place.kfp_run, name, status)


def _show_failure(parent: KfpRun, name: str, status: str) -> None:
    if overall_status(parent.children_named(name)) == "RUNNING":
        made = parent.client.create_run(
            parent.experiment_id,
            run_name=name,
            tags={
                PARENT_TAG: parent.run_id,
                OF_KFP_RUN_TAG: own_kfp_run() or "",
                PROCESS_TAG: here(),
            },
        )
        parent.client.set_terminated(made.info.run_id, status)
    parent.show_children()
