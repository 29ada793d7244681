"""The run of a step: a new one, or the one that an earlier attempt at the same work left."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from flagscale.artifacts import Manifest
from flagscale.patience import patiently
from flagscale.secrets import hide_in_urls
from flagscale.tracking.attempts import (
    earlier_runs,
    end_lost,
    reopen,
    same_attempt,
    short_digest,
)
from flagscale.tracking.kfp_run import KfpStep
from flagscale.tracking.names import (
    OF_KFP_RUN_TAG,
    PARENT_TAG,
    PROCESS_TAG,
    TRAINING_TAG,
    WORK_TAG,
    first_line,
    flatten,
    here,
    metric_name,
    own_kfp_run,
)
from flagscale.tracking.place import Place, find_place
from flagscale.tracking.run import StepRun, truthful_status
from flagscale.tracking.server import make_client, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient

T = TypeVar("T")

logger = logging.getLogger(__name__)

_PAUSES_ON_A_CLUSTER = (5, 20)  # seconds


class _Process:
    """What this process is about: the first run that it makes, or that its ranks made for it."""

    run: StepRun | None = None
    run_of_ranks: str | None = None


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
        return short_digest([flatten(self.params), self.training, inputs])


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
        training: names work that goes on where it was interrupted, and that this process keeps
            others out of. Another attempt at it for the same parent, or in the same KFP run, goes
            on in the same run, whose curves it only completes; a run of another pipeline run
            becomes `StepRun.resumes`, and is ended if its KFP run left it open.
        parents: manifests of the inputs, by name. In a KFP run a later run of the same step,
            params, training and inputs is another attempt, and makes a failed one good.
    """
    work = _Work(name, params, training, parents or {})
    run = on_server(lambda client: _track(client, work), f"{name} is not tracked")
    run = run or StepRun(None, None)
    _Process.run = _Process.run or run
    with truthful_status(run):
        yield run


def run_of_process() -> StepRun | None:
    """The first run that this process made, None if it made none."""
    return _Process.run


def run_id_of_process() -> str | None:
    """Its id, or that of its ranks' run; None where nothing was tracked."""
    own = _Process.run.run_id if _Process.run is not None else None
    return own or _Process.run_of_ranks


def note_run_of_ranks(run_id: str | None) -> None:
    """Take the run that another process made, for this one, as this one's."""
    _Process.run_of_ranks = run_id


def on_server(do: Callable[[MlflowClient], T], otherwise: str) -> T | None:
    """Do something on the tracking server; on a cluster that may take some attempts.

    A server's pod may be starting anew: a training of days is worth the wait.

    Args:
        do: is given a client.
        otherwise: what it means that it failed, for the log.

    Returns:
        What `do` returned; None where there is no server, or it did not serve.
    """
    uri = tracking_uri()
    if not uri:
        return None
    server = f"MLflow at {hide_in_urls(uri)}"
    pauses = _PAUSES_ON_A_CLUSTER if own_kfp_run() else ()
    try:
        # Whatever it raises may pass: libraries and databases raise many kinds.
        return patiently(lambda: do(make_client(uri)), f"use {server}", lambda _: True, pauses)
    except Exception as error:  # training goes on
        logger.warning("%s: %s: %s", server, otherwise, first_line(error))
    return None


def _track(client: MlflowClient, work: _Work) -> StepRun:
    place = find_place(client, work.name)
    earlier = earlier_runs(client, place.experiment_id, work.training)
    end_lost(client, earlier)
    same = same_attempt(earlier, place)
    if same is not None:
        run = _hold(client, same.info.run_id, place, reopen(client, same, place))
        there = same.data.params
        params = flatten(work.params)
        run.log_params({k: v for k, v in params.items() if metric_name(k) not in there})
        return run
    run = _hold(client, _make(client, place, work), place)
    run.resumes = earlier[0].info.run_id if earlier else None
    run.log_params(work.params)
    return run


def _hold(
    client: MlflowClient,
    run_id: str,
    place: Place,
    known: Mapping[str, set[int]] | None = None,
) -> StepRun:
    if place.kfp_run is not None:
        return KfpStep(client, run_id, place.kfp_run, known)
    return StepRun(client, run_id, known)


def _make(client: MlflowClient, place: Place, work: _Work) -> str:
    tags = {PROCESS_TAG: here()}
    if place.parent is not None:
        tags[PARENT_TAG] = place.parent
    if work.training is not None:
        tags[TRAINING_TAG] = short_digest(work.training)
    kfp_run = own_kfp_run()
    if kfp_run is not None:
        tags[OF_KFP_RUN_TAG] = kfp_run
        tags[WORK_TAG] = work.tag
    made = client.create_run(place.experiment_id, run_name=work.name, tags=tags)
    return str(made.info.run_id)
