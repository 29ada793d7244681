"""MLflow: the only file that talks to it. Tracking may fail and training goes on.

A pipeline run is a parent run, each of its steps a child. The local runner makes the parent with
`pipeline_run` and hands its environment to the steps' processes; on a cluster KFP's own plugin
injects the same three variables (`MLFLOW_TRACKING_URI`, `MLFLOW_EXPERIMENT_ID`, `MLFLOW_RUN_ID`).
Either way the injected run belongs to somebody else: a step makes a child of it with `step_run`
and never finishes or renames it. Without `MLFLOW_TRACKING_URI` a step tracks nothing.

Everything goes through `MlflowClient` with explicit run ids: the fluent API would resume, and then
finish, the injected run.
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flagscale.errors import Interrupted, UserError
from flagscale.processes import is_alive, this_process

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from flagscale.recipe import Recipe

logger = logging.getLogger(__name__)

PARENT_TAG = "mlflow.parentRunId"
PROCESS_TAG = "flagscale.process"
CACHED_TAG = "flagscale.cached_from"
DEFAULT_EXPERIMENT = "flagscale-distillation"

_FLUSH_SECONDS = 1.0
_PAUSE_SECONDS = 60.0  # after a failure: leave a broken server alone, and do not stall the step
_MOST_BUFFERED = 100_000
_METRICS_A_BATCH = 500
_PARAMS_A_BATCH = 100
_LONGEST_PARAM = 500  # characters: what every MLflow server takes
_LONGEST_TAG = 5000
_HTTP_LIMITS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
}
_HTTP_LIMITS_AT_START = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
}
_UPLOAD_TIMEOUT = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "300"}


class StepRun:
    """One run in MLflow, or nothing at all when tracking is off. No method raises for MLflow.

    Attributes:
        run_id: MLflow's id; None when tracking is off.
    """

    def __init__(self, client: MlflowClient | None, run_id: str | None) -> None:
        self.run_id = run_id
        self._client = client
        self._buffer: list[tuple[str, float, int, int]] = []
        self._lock = threading.Lock()
        self._warned: set[str] = set()
        self._paused_until = 0.0
        self._closing = threading.Event()
        self._flusher: threading.Thread | None = None

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Record figures. Returns at once: they are sent about once a second.

        Args:
            metrics: name -> value; characters that MLflow refuses in names are replaced.
            step: optimiser step; None for figures that describe the whole run.
        """
        if self._client is None:
            return
        now = int(time.time() * 1000)
        with self._lock:
            for name, value in metrics.items():
                self._buffer.append((_metric_name(name), float(value), now, step or 0))
            del self._buffer[:-_MOST_BUFFERED]
        if self._flusher is None:
            self._flusher = threading.Thread(target=self._flush_often, daemon=True)
            self._flusher.start()

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Record parameters; nested ones are flattened to `a.b.c`, long values are cut."""
        flat = {_metric_name(name): _cut(value) for name, value in flatten(params).items()}
        self._call("parameters", lambda client: _log_params(client, self._id, flat))

    def log_artifact(self, path: str | Path, artifact_path: str | None = None) -> None:
        """Store a file, or a folder's content, with the run (below `artifact_path`)."""
        path = Path(path)

        def send(client: MlflowClient) -> None:
            with _environment(_UPLOAD_TIMEOUT):
                if path.is_dir():
                    client.log_artifacts(self._id, str(path), artifact_path)
                else:
                    client.log_artifact(self._id, str(path), artifact_path)

        self._call("artifacts", send)

    def log_text(self, text: str, artifact_file: str) -> None:
        """Store a text as the file `artifact_file` with the run."""
        self._call("artifacts", lambda client: client.log_text(self._id, text, artifact_file))

    def set_tag(self, key: str, value: object) -> None:
        """Set a tag."""
        text = str(value)[:_LONGEST_TAG]
        self._call("tags", lambda client: client.set_tag(self._id, key, text))

    def log_model(self, folder: str | Path, registered_model_name: str) -> str | None:
        """Store a Hugging Face folder as a model and register a new version of it.

        Args:
            folder: what `AutoModelForCausalLM.from_pretrained` loads.
            registered_model_name: name in the model registry.

        Returns:
            `models:/<name>/<version>`; `mlflow.artifacts.download_artifacts` of it gives the folder
            back. None when tracking is off or failed.
        """
        uris: list[str] = []

        def send(client: MlflowClient) -> None:
            with _environment(_UPLOAD_TIMEOUT):
                uris.append(_log_model(client, self._id, Path(folder), registered_model_name))

        self._call("the model", send)
        return uris[0] if uris else None

    def finish(self, status: str) -> None:
        """Send what is left and set the final status: FINISHED, FAILED or KILLED."""
        self._closing.set()
        if self._flusher is not None:
            self._flusher.join(timeout=60)
        self._paused_until = 0.0
        self._flush()
        self._call("the status", lambda client: client.set_terminated(self._id, status))

    @property
    def _id(self) -> str:
        assert self.run_id is not None
        return self.run_id

    def _flush_often(self) -> None:
        while not self._closing.wait(_FLUSH_SECONDS):
            self._flush()

    def _flush(self) -> None:
        while self._buffer and time.monotonic() >= self._paused_until:
            with self._lock:
                batch = self._buffer[:_METRICS_A_BATCH]
            if not self._call("metrics", partial(_log_metrics, run_id=self._id, batch=batch)):
                return  # kept, and sent again after the pause
            with self._lock:
                del self._buffer[: len(batch)]

    def _call(self, kind: str, send: Callable[[MlflowClient], object]) -> bool:
        """Talk to the server; on failure warn once a kind, then leave it alone for a while."""
        if self._client is None or time.monotonic() < self._paused_until:
            return False
        try:
            send(self._client)
        except Exception as error:  # whatever MLflow raises: training goes on
            self._paused_until = time.monotonic() + _PAUSE_SECONDS
            if kind not in self._warned:
                self._warned.add(kind)
                logger.warning("MLflow did not take %s, going on: %s", kind, _first_line(error))
            return False
        return True


@contextmanager
def step_run(name: str, params: Mapping[str, Any]) -> Iterator[StepRun]:
    """Track a step: a child of the run in `MLFLOW_RUN_ID`, or a run of its own without one.

    The status tells the truth: FINISHED, FAILED when the body raises, KILLED when it raises
    `Interrupted` or `KeyboardInterrupt`.

    Args:
        name: of the step, e.g. `distil-student`.
        params: what the step was given; nested mappings are flattened, names get no prefix but
            their own, so give sections by name: `{"training": training.model_dump()}`.
    """
    run = _start_step(name, params)
    with _truthful_status(run):
        yield run


@contextmanager
def pipeline_run(recipe: Recipe, runs: Path) -> Iterator[PipelineRun]:
    """Track a pipeline run: the parent of its steps' runs.

    Args:
        recipe: resolved; becomes the run's parameters and its artifact `recipe.yaml`.
        runs: folder of `mlflow.db` and `mlartifacts/`, used unless `MLFLOW_TRACKING_URI` is set.

    Raises:
        UserError: the tracking server does not answer, or refuses, within seconds.
    """
    run = _start_pipeline(recipe, runs)
    with _truthful_status(run):
        yield run


class PipelineRun(StepRun):
    """The parent run, with what only the pipeline's runner does.

    Attributes:
        uri: of the tracking server or database.
        experiment_id: MLflow's id of the experiment.
    """

    def __init__(self, client: MlflowClient, run_id: str, experiment_id: str, uri: str) -> None:
        super().__init__(client, run_id)
        self.uri = uri
        self.experiment_id = experiment_id

    @property
    def environment(self) -> dict[str, str]:
        """Variables that make a step's process attach to this run."""
        return {
            "MLFLOW_TRACKING_URI": self.uri,
            "MLFLOW_EXPERIMENT_ID": self.experiment_id,
            "MLFLOW_RUN_ID": self._id,
        }

    def newest_child(self, name: str) -> str | None:
        """Id of the step's run, None if it has none."""
        found: list[str] = []

        def search(client: MlflowClient) -> None:
            query = f"tags.`{PARENT_TAG}` = '{self._id}' and attributes.run_name = '{name}'"
            runs = client.search_runs([self.experiment_id], query, max_results=1)
            found.extend(run.info.run_id for run in runs)

        self._call("a search", search)
        return found[0] if found else None

    def reuse(self, name: str, original_run_id: str | None, metrics: Mapping[str, float]) -> None:
        """Add a child for a step whose result came from the cache, so that runs compare.

        Args:
            name: of the step.
            original_run_id: the run that did the work, if known: its parameters and last figures
                are repeated here.
            metrics: figures to show when that run is unknown or gone.
        """
        self._call("a reused step", lambda c: _copy_run(c, self, name, original_run_id, metrics))

    def finish(self, status: str) -> None:
        """Also end children that could not do so themselves (killed with -9, server away)."""

        def end_children(client: MlflowClient) -> None:
            query = f"tags.`{PARENT_TAG}` = '{self._id}' and attributes.status = 'RUNNING'"
            for run in client.search_runs([self.experiment_id], query):
                client.set_terminated(run.info.run_id, status)

        self._call("children's status", end_children)
        super().finish(status)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """`{"a": {"b": 1}}` -> `{"a.b": "1"}`; lists become JSON, None stays out."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        elif isinstance(value, list | tuple):
            flat[f"{prefix}{key}"] = json.dumps(value)
        elif value is not None:
            flat[f"{prefix}{key}"] = str(value)
    return flat


@contextmanager
def _truthful_status(run: StepRun) -> Iterator[None]:
    try:
        yield
    except (Interrupted, KeyboardInterrupt):
        run.finish("KILLED")
        raise
    except BaseException:
        run.finish("FAILED")
        raise
    run.finish("FINISHED")


def _start_step(name: str, params: Mapping[str, Any]) -> StepRun:
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        return StepRun(None, None)
    try:
        client = _client(uri)
        experiment_id = os.environ.get("MLFLOW_EXPERIMENT_ID") or _experiment(
            client, os.environ.get("MLFLOW_EXPERIMENT_NAME", DEFAULT_EXPERIMENT)
        )
        tags = {PROCESS_TAG: f"{socket.gethostname()}:{this_process()}"}
        parent = os.environ.get("MLFLOW_RUN_ID")
        if parent:
            tags[PARENT_TAG] = parent
        run_id = client.create_run(experiment_id, run_name=name, tags=tags).info.run_id
    except Exception as error:  # whatever MLflow raises: training goes on
        logger.warning("MLflow at %s: %s is not tracked: %s", uri, name, _first_line(error))
        return StepRun(None, None)
    run = StepRun(client, run_id)
    run.log_params(params)
    return run


def _start_pipeline(recipe: Recipe, runs: Path) -> PipelineRun:
    uri, client, experiment_id = connect(recipe, runs)
    try:
        _end_dead_runs(client, experiment_id)
        tags = {PROCESS_TAG: f"{socket.gethostname()}:{this_process()}"}
        run_id = client.create_run(experiment_id, run_name=recipe.name, tags=tags).info.run_id
    except Exception as error:  # MLflow and its databases raise many kinds
        raise _unusable(uri, error) from error
    run = PipelineRun(client, run_id, experiment_id, uri)
    run.log_params(recipe.model_dump(mode="json"))
    run.log_text(recipe_yaml(recipe), "recipe.yaml")
    return run


def connect(recipe: Recipe, runs: Path) -> tuple[str, MlflowClient, str]:
    """Reach the tracking server and the recipe's experiment.

    Returns:
        The server's URI, a client, and the experiment's id.

    Raises:
        UserError: the server does not answer, or refuses, within seconds.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{runs.absolute()}/mlflow.db"
    store = runs.absolute() / "mlartifacts" if uri.startswith("sqlite:") else None
    try:
        with _environment(_HTTP_LIMITS_AT_START):
            client = _client(uri)
            return uri, client, _experiment(client, recipe.tracking.experiment, store)
    except UserError:
        raise
    except Exception as error:  # MLflow and its databases raise many kinds
        raise _unusable(uri, error) from error


def _unusable(uri: str, error: Exception) -> UserError:
    return UserError(
        f"MLFLOW_TRACKING_URI={uri}: no usable tracking server there: {_first_line(error)}; "
        "start one, or unset the variable to track into a file"
    )


def recipe_yaml(recipe: Recipe) -> str:
    """The resolved recipe as YAML."""
    import yaml

    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _client(uri: str) -> MlflowClient:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    for name, value in _HTTP_LIMITS.items():
        os.environ.setdefault(name, value)
    import mlflow

    for noisy in ("mlflow.store.db.utils", "alembic"):  # a new database tells of its tables
        logging.getLogger(noisy).setLevel(logging.WARNING)
    mlflow.set_tracking_uri(uri)
    return mlflow.MlflowClient(tracking_uri=uri)


def _experiment(client: MlflowClient, name: str, store: Path | None = None) -> str:
    """Id of the experiment, which is made if there is none."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return client.create_experiment(
                name, artifact_location=store.as_uri() if store else None
            )
        except MlflowException:  # another run has just made it
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    if found.lifecycle_stage == "deleted":
        raise UserError(
            f"tracking.experiment={name!r} was deleted in MLflow: restore it there, or name another"
        )
    return found.experiment_id


def _end_dead_runs(client: MlflowClient, experiment_id: str) -> None:
    """Mark as KILLED the runs whose process, on this machine, ended without saying so."""
    for run in client.search_runs([experiment_id], "attributes.status = 'RUNNING'"):
        host, _, process = run.data.tags.get(PROCESS_TAG, "").partition(":")
        if host == socket.gethostname() and not is_alive(process):
            client.set_terminated(run.info.run_id, "KILLED")


def _metric_name(name: str) -> str:
    return re.sub(r"[^\w\-. /]", "_", name)[:250]


def _cut(value: str) -> str:
    return value if len(value) <= _LONGEST_PARAM else value[: _LONGEST_PARAM - 1] + "…"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _log_params(client: MlflowClient, run_id: str, flat: Mapping[str, str]) -> None:
    from mlflow.entities import Param

    params = [Param(name, value) for name, value in flat.items()]
    for start in range(0, len(params), _PARAMS_A_BATCH):
        client.log_batch(run_id, params=params[start : start + _PARAMS_A_BATCH])


def _log_metrics(
    client: MlflowClient, run_id: str, batch: list[tuple[str, float, int, int]]
) -> None:
    from mlflow.entities import Metric

    client.log_batch(run_id, metrics=[Metric(*point) for point in batch])


def _log_model(client: MlflowClient, run_id: str, folder: Path, name: str) -> str:
    from mlflow.exceptions import MlflowException

    client.log_artifacts(run_id, str(folder), "model")
    try:
        client.create_registered_model(name)
    except MlflowException:  # there is one: this becomes its next version
        client.get_registered_model(name)
    source = f"runs:/{run_id}/model"
    version = client.create_model_version(name, source, run_id, await_creation_for=0).version
    return f"models:/{name}/{version}"


def _copy_run(
    client: MlflowClient,
    parent: PipelineRun,
    name: str,
    original_run_id: str | None,
    metrics: Mapping[str, float],
) -> None:
    """A finished child with the parameters and the last figures of the run that did the work."""
    tags = {PARENT_TAG: parent._id, CACHED_TAG: original_run_id or "unknown"}
    copy = client.create_run(parent.experiment_id, run_name=name, tags=tags)
    child = StepRun(client, copy.info.run_id)
    original = _find_run(client, original_run_id)
    if original is not None:
        child.log_params(original.data.params)
    child.log_metrics(original.data.metrics if original is not None else metrics)
    child.finish("FINISHED")


def _find_run(client: MlflowClient, run_id: str | None) -> Any:  # noqa: ANN401 - mlflow's Run
    from mlflow.exceptions import MlflowException

    if run_id is None:
        return None
    try:
        return client.get_run(run_id)
    except MlflowException:  # another server, or deleted
        return None


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
