"""Earlier runs of a training: the same run goes on, and what others left open is ended."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flagscale.artifacts import digest
from flagscale.tracking.kfp_run import KfpRun
from flagscale.tracking.names import (
    KFP_RUN_TAG,
    OF_KFP_RUN_TAG,
    PARENT_TAG,
    PROCESS_TAG,
    STARTED_TAG,
    TRAINING_TAG,
    here,
    own_kfp_run,
)
from flagscale.tracking.place import Place
from flagscale.tracking.server import find_run

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

SYSTEM = "system/"  # how MLflow's pages know figures of machines
_EARLIER_LOOKED_AT = 50  # runs of the same training


def short_digest(value: Any) -> str:  # noqa: ANN401 - any JSON value
    """Of the tags by which equal work is found."""
    return digest(value).removeprefix("sha256:")[:16]


def earlier_runs(client: MlflowClient, experiment_id: str, training: str | None) -> list[Any]:
    """The runs of the same training, the newest first."""
    if training is None:
        return []
    query = f"tags.`{TRAINING_TAG}` = '{short_digest(training)}'"
    newest_first = ["attributes.start_time DESC"]
    return list(
        client.search_runs(
            [experiment_id], query, order_by=newest_first, max_results=_EARLIER_LOOKED_AT
        )
    )


def same_attempt(earlier: Sequence[Any], place: Place) -> Any | None:  # noqa: ANN401 - mlflow's Run
    """The newest run that an earlier attempt at the work made, for the same parent or KFP run."""
    kfp_run = own_kfp_run()
    for run in earlier:
        tags = run.data.tags
        if place.parent is not None and tags.get(PARENT_TAG) == place.parent:
            return run
        if kfp_run and tags.get(OF_KFP_RUN_TAG) == kfp_run:
            return run
    return None


def reopen(client: MlflowClient, run: Any, place: Place) -> dict[str, set[int]]:  # noqa: ANN401
    """Go on in a run that an earlier attempt made.

    Returns:
        Name of a metric -> steps that the run has already.
    """
    run_id = run.info.run_id
    client.update_run(run_id, status="RUNNING")
    tags = {PROCESS_TAG: here(), STARTED_TAG: str(int(time.time() * 1000))}
    if place.parent is not None:
        tags[PARENT_TAG] = place.parent
    for key, value in tags.items():
        client.set_tag(run_id, key, value)
    logger.info("going on in MLflow run %s", run_id)
    return {
        name: {point.step for point in client.get_metric_history(run_id, name)}
        for name in run.data.metrics
        if not name.startswith(SYSTEM)
    }


def samples_of(run: Any) -> int:  # noqa: ANN401 - mlflow's Run
    """How many samples of its machines a run has."""
    # MLflow's own sampler reads the last steps from there: the whole history may be large.
    steps = [point.step for point in run.data._metric_objs if point.key.startswith(SYSTEM)]
    return max(steps, default=-1) + 1


def end_lost(client: MlflowClient, earlier: Sequence[Any]) -> None:
    """End the runs of a training whose KFP runs were killed, and show it in those.

    This process keeps all others out of the training's checkpoints, so they are over; one that
    is not, because it works on a volume of the same name elsewhere, says so when it ends.
    """
    own = own_kfp_run()
    for run in earlier:
        tags: Mapping[str, str] = run.data.tags
        if run.info.status != "RUNNING" or tags.get(OF_KFP_RUN_TAG, own) == own:
            continue
        client.set_terminated(run.info.run_id, "KILLED")
        parent = find_run(client, tags.get(PARENT_TAG))
        if parent is not None and KFP_RUN_TAG in parent.data.tags:
            KfpRun(client, parent.info.experiment_id, parent.info.run_id).show_children()
