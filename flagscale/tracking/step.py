"""The run of a step: a new one, or the one that an earlier attempt at the same work left."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from flagscale import variables
from flagscale.artifacts import Manifest, digest
from flagscale.secrets import hide_in_urls
from flagscale.tracking.kfp_run import (
    KfpRun,
    KfpStep,
    in_kfp_without_plugin,
    overall_status,
)
from flagscale.tracking.names import (
    OF_KFP_RUN_TAG,
    PARENT_TAG,
    PROCESS_TAG,
    STARTED_TAG,
    TRAINING_TAG,
    WORK_TAG,
    first_line,
    flatten,
    here,
    metric_name,
)
from flagscale.tracking.run import StepRun, truthful_status
from flagscale.tracking.server import (
    DEFAULT_EXPERIMENT,
    find_experiment,
    make_client,
    tracking_uri,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

_EARLIER_LOOKED_AT = 50  # runs of the same training
_PAUSES_ON_A_CLUSTER = (5, 20)  # seconds


class _Process:
    """What this process is about: the first run that it makes."""

    run: StepRun | None = None


class _Place(NamedTuple):
    """Where a step's run belongs."""

    experiment_id: str
    parent: str | None
    kfp_run: KfpRun | None  # the parent, if the steps look after it themselves


class _Work(NamedTuple):
    """What a step's run is about."""

    name: str
    params: Mapping[str, Any]
    training: str | None
    parents: Mapping[str, Manifest]

    @property
    def tag(self) -> str:
        """Equal for attempts at the same work: variants of a sweep differ in one of these."""
        inputs = {name: manifest.digest for name, manifest in self.parents.items()}
        return _short_digest([flatten(self.params), self.training, inputs])


@contextmanager
def step_run(
    name: str,
    params: Mapping[str, Any],
    training: str | None = None,
    parents: Mapping[str, Manifest] | None = None,
) -> Iterator[StepRun]:
    """Track a step: a child of the run in `MLFLOW_RUN_ID`, else of the KFP run's, else on its own.

    The status tells the truth: FINISHED, FAILED when the body raises, KILLED when it raises
    `Interrupted` or `KeyboardInterrupt`.

    Args:
        name: of the step, e.g. `distil-student`.
        params: what the step was given; nested mappings are flattened, names get no prefix but
            their own, so give sections by name: `{"training": training.model_dump()}`.
        training: names work that goes on where it was interrupted. Another attempt at it for the
            same parent, or in the same KFP run, goes on in the same run, whose curves it only
            completes; a run of another pipeline run becomes `StepRun.resumes`.
        parents: manifests of the inputs, by name. In a KFP run a later run of the same step,
            params, training and inputs is another attempt, and makes a failed one good.
    """
    run = _start(_Work(name, params, training, parents or {}))
    _Process.run = _Process.run or run
    with truthful_status(run):
        yield run


def step_failed(name: str, status: str) -> None:
    """Tell of a step that failed outside `step_run`: its outputs could not be put in place.

    Or, on a cluster where the steps look after the pipeline's run, before it had a run of its own.

    Args:
        name: of the step.
        status: FAILED or KILLED.
    """
    if _Process.run is not None:
        if _Process.run.status == "FINISHED":
            _Process.run.finish(status)
        return
    uri = tracking_uri()
    if not uri or not in_kfp_without_plugin():
        return
    try:
        client = make_client(uri)
        parent = KfpRun.find(client, _experiment_id(client))
        if parent is not None:
            _note_failure(client, parent, name, status)
    except Exception as error:  # whatever MLflow raises: the step's own error is what counts
        logger.warning("MLflow was not told that %s failed: %s", name, first_line(error))


def _note_failure(client: MlflowClient, parent: KfpRun, name: str, status: str) -> None:
    """End the runs that this pod's other processes left; where none failed, make one that did."""
    for run in parent.children_named(name):
        host = run.data.tags.get(PROCESS_TAG, "").partition(":")[0]
        if run.info.status == "RUNNING" and host == socket.gethostname():
            client.set_terminated(run.info.run_id, status)
    if overall_status(parent.children_named(name)) == "RUNNING":
        tags = {PARENT_TAG: parent.run_id, PROCESS_TAG: here()}
        made = client.create_run(parent.experiment_id, run_name=name, tags=tags)
        client.set_terminated(made.info.run_id, status)
    parent.show_children()


def _start(work: _Work) -> StepRun:
    uri = tracking_uri()
    if not uri:
        return StepRun(None, None)
    shown = hide_in_urls(uri)
    # A server's pod may be starting anew: a training of days is worth the wait.
    pauses = _PAUSES_ON_A_CLUSTER if os.environ.get(variables.KFP_RUN) else ()
    for pause in (*pauses, None):
        try:
            return _track(make_client(uri), work)
        except Exception as error:  # whatever MLflow raises: training goes on
            if pause is None:
                reason = first_line(error)
                logger.warning("MLflow at %s: %s is not tracked: %s", shown, work.name, reason)
                break
            logger.info("MLflow at %s does not serve, trying again in %d s", shown, pause)
            time.sleep(pause)
    return StepRun(None, None)


def _track(client: MlflowClient, work: _Work) -> StepRun:
    place = _place(client)
    earlier = _earlier_runs(client, place.experiment_id, work.training)
    same = next((run for run in earlier if _is_same_attempt(run, place)), None)
    if same is not None:
        return _reopen(client, place, same, work.params)
    run_id = _make(client, place, work)
    run = _hold(client, run_id, place)
    run.resumes = earlier[0].info.run_id if earlier else None
    run.log_params(work.params)
    return run


def _place(client: MlflowClient) -> _Place:
    experiment_id = _experiment_id(client)
    if in_kfp_without_plugin():
        kfp_run = KfpRun.find_or_make(client, experiment_id)
        return _Place(experiment_id, kfp_run.run_id, kfp_run)
    return _Place(experiment_id, os.environ.get("MLFLOW_RUN_ID") or None, None)


def _experiment_id(client: MlflowClient) -> str:
    return os.environ.get("MLFLOW_EXPERIMENT_ID") or find_experiment(
        client, os.environ.get("MLFLOW_EXPERIMENT_NAME", DEFAULT_EXPERIMENT)
    )


def _hold(
    client: MlflowClient,
    run_id: str,
    place: _Place,
    known: Mapping[str, set[int]] | None = None,
) -> StepRun:
    if place.kfp_run is not None:
        return KfpStep(client, run_id, place.kfp_run, known)
    return StepRun(client, run_id, known)


def _make(client: MlflowClient, place: _Place, work: _Work) -> str:
    tags = {PROCESS_TAG: here()}
    if place.parent is not None:
        tags[PARENT_TAG] = place.parent
    if work.training is not None:
        tags[TRAINING_TAG] = _short_digest(work.training)
    if os.environ.get(variables.KFP_RUN):
        tags[OF_KFP_RUN_TAG] = os.environ[variables.KFP_RUN]
        tags[WORK_TAG] = work.tag
    made = client.create_run(place.experiment_id, run_name=work.name, tags=tags)
    return str(made.info.run_id)


def _earlier_runs(client: MlflowClient, experiment_id: str, training: str | None) -> list[Any]:
    """The runs of the same training, the newest first."""
    if training is None:
        return []
    query = f"tags.`{TRAINING_TAG}` = '{_short_digest(training)}'"
    newest_first = ["attributes.start_time DESC"]
    return list(
        client.search_runs(
            [experiment_id], query, order_by=newest_first, max_results=_EARLIER_LOOKED_AT
        )
    )


def _short_digest(value: Any) -> str:  # noqa: ANN401 - any JSON value
    return digest(value).removeprefix("sha256:")[:16]


def _is_same_attempt(run: Any, place: _Place) -> bool:  # noqa: ANN401 - mlflow's Run
    tags = run.data.tags
    same_parent = place.parent is not None and tags.get(PARENT_TAG) == place.parent
    kfp_run = os.environ.get(variables.KFP_RUN)
    return same_parent or bool(kfp_run and tags.get(OF_KFP_RUN_TAG) == kfp_run)


def _reopen(
    client: MlflowClient,
    place: _Place,
    run: Any,  # noqa: ANN401 - mlflow's Run
    params: Mapping[str, Any],
) -> StepRun:
    """Go on in a run that an earlier attempt made; what it holds already is not sent again."""
    run_id = run.info.run_id
    client.update_run(run_id, status="RUNNING")
    tags = {PROCESS_TAG: here(), STARTED_TAG: str(int(time.time() * 1000))}
    if place.parent is not None:
        tags[PARENT_TAG] = place.parent
    for key, value in tags.items():
        client.set_tag(run_id, key, value)
    known = {
        name: {point.step for point in client.get_metric_history(run_id, name)}
        for name in run.data.metrics
    }
    reopened = _hold(client, run_id, place, known)
    there = run.data.params
    reopened.log_params({k: v for k, v in flatten(params).items() if metric_name(k) not in there})
    logger.info("going on in MLflow run %s", run_id)
    return reopened
