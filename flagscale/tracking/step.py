"""The run of a step: a new one, or the one that an earlier attempt at the same work left."""

from __future__ import annotations

import logging
import uuid
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
    samples_of,
    short_digest,
)
from flagscale.tracking.delivery import Patience
from flagscale.tracking.letters import Begun
from flagscale.tracking.names import (
    ATTEMPT_TAG,
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
    parameter,
)
from flagscale.tracking.outbox import Outbox
from flagscale.tracking.place import Place, find_place
from flagscale.tracking.run import StepRun, truthful_status
from flagscale.tracking.server import (
    import_mlflow,
    make_client,
    page_of,
    run_of_attempt,
    send_params,
    tracking_uri,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient

T = TypeVar("T")

logger = logging.getLogger(__name__)

_START_SECONDS = 30.0  # for which a step waits for its run, if the server seems to serve
_PAUSES_ON_A_CLUSTER = (5, 20, 60, 120, 150)  # seconds


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
    `Interrupted` or `KeyboardInterrupt`. A server that is away is told when it is back.

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
    run = StepRun(_outbox(work))
    _Process.run = _Process.run or run
    with truthful_status(run):
        yield run


@contextmanager
def attached(run_id: str | None) -> Iterator[StepRun]:
    """Tell of another process's run what only this process knows; its status is not ours.

    Args:
        run_id: MLflow's; None: nobody is told.
    """
    uri = tracking_uri()
    if not uri or run_id is None:
        yield StepRun(None)
        return
    import_mlflow()
    outbox = Outbox(lambda: make_client(uri), lambda _: Begun(run_id, ""))
    yield StepRun(outbox)
    outbox.drain(Patience.left)


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


def _outbox(work: _Work) -> Outbox | None:
    """Of the step's run; a server that is away makes it when it is back."""
    uri = tracking_uri()
    if not uri:
        return None
    import_mlflow()  # not in a thread: it hides a library from everybody's imports
    attempt = uuid.uuid4().hex
    outbox = Outbox(lambda: make_client(uri), lambda client: _begin(client, work, attempt))
    if not outbox.begins_within(_START_SECONDS) and outbox.refused is None:
        logger.warning("%s is tracked once MLflow at %s serves", work.name, hide_in_urls(uri))
    return outbox


def _begin(client: MlflowClient, work: _Work, attempt: str) -> Begun:
    """Find or make the run; of several calls with the same `attempt` one makes it."""
    place = find_place(client, work.name)
    made = run_of_attempt(client, place.experiment_id, attempt)
    earlier = earlier_runs(client, place.experiment_id, work.training)
    earlier = [run for run in earlier if run.info.run_id != made]
    end_lost(client, earlier)
    same = None if made else same_attempt(earlier, place)
    params = {metric_name(k): parameter(v) for k, v in flatten(work.params).items()}
    known: Mapping[str, set[int]] = {}
    samples = 0
    if same is not None:
        run_id, resumes = same.info.run_id, None
        known, samples = reopen(client, same, place), samples_of(same)
        params = {name: v for name, v in params.items() if name not in same.data.params}
    else:
        run_id = made or _make(client, place, work, attempt)
        resumes = earlier[0].info.run_id if earlier else None
    send_params(client, run_id, params)
    if place.kfp_run is not None:
        place.kfp_run.show_children()
    uri = hide_in_urls(tracking_uri() or "")
    if uri.startswith(("http://", "https://")):
        page = page_of(place.experiment_id, run_id)
        logger.info("%s in MLflow: %s%s", work.name, uri.rstrip("/"), page)
    return Begun(run_id, place.experiment_id, known, resumes, place.kfp_run, samples)


def _make(client: MlflowClient, place: Place, work: _Work, attempt: str) -> str:
    tags = {PROCESS_TAG: here(), ATTEMPT_TAG: attempt}
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
