"""The tracking server: reaching it within seconds, its experiments, what is sent to it."""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from flagscale import variables
from flagscale.errors import UserError
from flagscale.imports import late, uncollected, without
from flagscale.secrets import hide_in_urls, split_credentials
from flagscale.tracking.names import ATTEMPT_TAG, KIND_TAG, first_line

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from flagscale.recipe import Recipe

DEFAULT_EXPERIMENT = "flagscale-distillation"

_KIND = {KIND_TAG: "custom_model_development"}  # "Machine learning"
_PARAMS_A_BATCH = 100
_LATE = {
    "fastapi": ("HTTPException",),  # of its gateway, for its judges
    "pyarrow.fs": ("FileSelector", "FileType", "HadoopFileSystem"),  # of artifacts on HDFS
}
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
UPLOAD_TIMEOUT = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "300"}


def connect(recipe: Recipe, runs: Path) -> tuple[str, MlflowClient, str]:
    """Reach the tracking server and the recipe's experiment.

    Returns:
        The server's URI, a client, and the experiment's id.

    Raises:
        UserError: the server does not answer, or refuses, within seconds.
    """
    uri = tracking_uri() or f"sqlite:///{runs.absolute()}/mlflow.db"
    store = runs.absolute() / "mlartifacts" if uri.startswith("sqlite:") else None
    try:
        with quick_to_give_up():
            client = make_client(uri)
            return uri, client, find_experiment(client, recipe.tracking.experiment, store)
    except UserError:
        raise
    except Exception as error:  # MLflow and its databases raise many kinds
        raise unusable(uri, error) from error


def tracking_uri() -> str | None:
    """`MLFLOW_TRACKING_URI`; a web server's credentials move out of it, into their own variables.

    MLflow puts the whole URI into its errors, and people into their notes. Where nobody has set it
    (the runner, KFP's plugin), the platform's server is taken.
    """
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        _take_platforms_server()
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if uri and uri.startswith(("http://", "https://")):
        uri, user, password = split_credentials(uri)
        if user is not None:
            os.environ["MLFLOW_TRACKING_URI"] = uri
            os.environ.setdefault("MLFLOW_TRACKING_USERNAME", user)
            os.environ.setdefault("MLFLOW_TRACKING_PASSWORD", password or "")
    return uri or None


def _take_platforms_server() -> None:
    """With its own credentials: KFP's plugin gives pods those of its server, injecting or not."""
    if not os.environ.get(variables.MLFLOW_URI):
        return
    for name, ours in (
        ("MLFLOW_TRACKING_URI", variables.MLFLOW_URI),
        ("MLFLOW_TRACKING_USERNAME", variables.MLFLOW_USERNAME),
        ("MLFLOW_TRACKING_PASSWORD", variables.MLFLOW_PASSWORD),
    ):
        os.environ.pop(name, None)
        if ours in os.environ:
            os.environ[name] = os.environ[ours]


def unusable(uri: str, error: Exception) -> UserError:
    """The error for a server that cannot be tracked to."""
    return UserError(
        f"MLFLOW_TRACKING_URI={hide_in_urls(uri)}: no usable tracking server there: "
        f"{first_line(error)}; start one, or unset the variable to track into a file"
    )


def make_client(uri: str) -> MlflowClient:
    """A client that gives up on a silent server within half a minute."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # see `page_of`
    for name, value in _HTTP_LIMITS.items():
        os.environ.setdefault(name, value)
    mlflow = import_mlflow()
    for noisy in ("mlflow.store.db.utils", "alembic"):  # a new database tells of its tables
        logging.getLogger(noisy).setLevel(logging.WARNING)
    mlflow.set_tracking_uri(uri)
    with uncollected():  # it imports what its kind of server needs
        return mlflow.MlflowClient(tracking_uri=uri)


def import_mlflow() -> ModuleType:
    """The library, without what it takes along where it is there."""
    if "mlflow" not in sys.modules:
        # pandas is for data sets that we do not log, chardet for answers in unknown encodings.
        with without("pandas", "chardet"), late(_LATE), uncollected():
            importlib.import_module("mlflow")
    return sys.modules["mlflow"]


def find_experiment(client: MlflowClient, name: str, store: Path | None = None) -> str:
    """Id of the experiment, which is made if there is none.

    It is marked as one of training: MLflow's pages show experiments of other kinds otherwise.

    Raises:
        UserError: it was deleted.
    """
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        location = store.as_uri() if store else None
        try:
            made = client.create_experiment(name, artifact_location=location, tags=_KIND)
            return str(made)
        except MlflowException:  # another run has just made it
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    if found.lifecycle_stage == "deleted":
        raise UserError(
            f"tracking.experiment={name!r} was deleted in MLflow: restore it there, or name another"
        )
    for key, value in _KIND.items():
        if key not in found.tags:
            client.set_experiment_tag(found.experiment_id, key, value)
    return str(found.experiment_id)


def page_of(experiment_id: str, run_id: str | None = None) -> str:
    """Of an experiment, or one of its runs, in MLflow's pages, below the server's address.

    MLflow 3.17 shows every experiment as one of GenAI, whatever its kind, unless the link asks for
    the other view; the links that its client prints do not.
    """
    run = f"/runs/{run_id}" if run_id else ""
    return f"/#/experiments/{experiment_id}{run}?workflowType=machine_learning"


def find_run(client: MlflowClient, run_id: str | None) -> Any:  # noqa: ANN401 - mlflow's Run
    """The run, None if this server has none of that id."""
    from mlflow.exceptions import MlflowException

    if run_id is None:
        return None
    try:
        return client.get_run(run_id)
    except MlflowException:  # another server, or deleted
        return None


def run_of_attempt(client: MlflowClient, experiment_id: str, attempt: str) -> str | None:
    """Id of the run that carries this mark: the server made it, and its answer got lost."""
    found = client.search_runs([experiment_id], f"tags.`{ATTEMPT_TAG}` = '{attempt}'")
    return str(found[0].info.run_id) if found else None


def children_of(client: MlflowClient, experiment_id: str, parent: str) -> list[Any]:
    """The runs of the steps below a pipeline's run."""
    query = f"tags.`mlflow.parentRunId` = '{parent}'"
    return list(client.search_runs([experiment_id], query))


def find_everywhere(client: MlflowClient, query: str) -> list[Any]:
    """The runs that a query finds in any experiment."""
    experiments: list[str] = []
    token: str | None = None
    while True:
        page = client.search_experiments(page_token=token)
        experiments += [experiment.experiment_id for experiment in page]
        token = page.token
        if not token:
            return list(client.search_runs(experiments, query))


def send_params(client: MlflowClient, run_id: str, flat: Mapping[str, str]) -> None:
    """In as many requests as the server asks for."""
    from mlflow.entities import Param

    params = [Param(name, value) for name, value in flat.items()]
    for start in range(0, len(params), _PARAMS_A_BATCH):
        client.log_batch(run_id, params=params[start : start + _PARAMS_A_BATCH])


def send_metrics(
    client: MlflowClient, run_id: str, batch: list[tuple[str, float, int, int]]
) -> None:
    """Points of curves: name, value, time (ms), step."""
    from mlflow.entities import Metric

    client.log_batch(run_id, metrics=[Metric(*point) for point in batch])


def quick_to_give_up() -> AbstractContextManager[None]:
    """Inside, a silent server costs seconds: somebody waits for the answer."""
    return environment(_HTTP_LIMITS_AT_START)


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Variables that hold inside."""
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
