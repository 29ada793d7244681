"""A step whose result came from a cache, shown beside those that ran, so that runs compare."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from flagscale.tracking.letters import Begun
from flagscale.tracking.names import ATTEMPT_TAG, CACHED_TAG, PARENT_TAG
from flagscale.tracking.outbox import outbox_of
from flagscale.tracking.run import StepRun
from flagscale.tracking.server import find_run, run_of_attempt

if TYPE_CHECKING:
    from mlflow import MlflowClient


def copy_run(
    client: MlflowClient,
    experiment_id: str,
    parent: str,
    name: str,
    original: str | None,
    figures: Mapping[str, float],
    tags: Mapping[str, str] | None = None,
    attempt: str | None = None,
) -> None:
    """Make a finished child with the parameters and last figures of the run that did the work.

    Args:
        client: of the tracking server.
        experiment_id: of the parent.
        parent: the run above it.
        name: of the step.
        original: the run that did the work, if known.
        figures: to show when that run is unknown or gone.
        tags: beside those that say what it is.
        attempt: of several calls with the same one makes it.
    """
    all_tags = {PARENT_TAG: parent, CACHED_TAG: original or "unknown", **(tags or {})}
    made = None
    if attempt is not None:
        all_tags[ATTEMPT_TAG] = attempt
        made = run_of_attempt(client, experiment_id, attempt)
    made = made or client.create_run(experiment_id, run_name=name, tags=all_tags).info.run_id
    child = StepRun(outbox_of(client, Begun(made, experiment_id)))
    run = find_run(client, original)
    if run is not None:
        child.log_params(run.data.params)
    child.log_metrics(run.data.metrics if run is not None else figures)
    child.finish("FINISHED")
