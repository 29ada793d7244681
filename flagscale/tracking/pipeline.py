"""The parent run that this machine's runner makes."""

from __future__ import annotations

import logging
import os
import socket
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from flagscale.processes import is_alive
from flagscale.secrets import hide_in_urls
from flagscale.tracking.copies import copy_run
from flagscale.tracking.letters import Begun
from flagscale.tracking.names import PARENT_TAG, PROCESS_TAG, here
from flagscale.tracking.outbox import outbox_of
from flagscale.tracking.run import StepRun, truthful_status
from flagscale.tracking.server import children_of, connect, page_of, unusable

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from flagscale.recipe import Recipe

logger = logging.getLogger(__name__)

# MLflow reads them where a program names nothing itself; here the recipe does.
_RECIPE_NAMES = ("MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID", "MLFLOW_RUN_ID")


@contextmanager
def pipeline_run(recipe: Recipe, runs: Path) -> Iterator[PipelineRun]:
    """Track a pipeline run: the parent of its steps' runs.

    Args:
        recipe: resolved; becomes the run's parameters and its artifact `recipe.yaml`.
        runs: folder of `mlflow.db` and `mlartifacts/`, used unless `MLFLOW_TRACKING_URI` is set.

    Raises:
        UserError: the tracking server does not answer, or refuses, within seconds.
    """
    run = _start(recipe, runs)
    with truthful_status(run):
        yield run


class PipelineRun(StepRun):
    """The parent run, with what only the pipeline's runner does.

    Attributes:
        uri: of the tracking server or database, without a password: to be shown.
        experiment_id: MLflow's id of the experiment.
    """

    def __init__(self, client: MlflowClient, begun: Begun, uri: str) -> None:
        super().__init__(outbox_of(client, begun))
        self.uri = hide_in_urls(uri)
        self.experiment_id = begun.experiment_id
        self._id, self._whole_uri = begun.run_id, uri

    @property
    def page(self) -> str:
        """Of the experiment in MLflow's pages, below the server's address."""
        return page_of(self.experiment_id)

    @property
    def environment(self) -> dict[str, str]:
        """Variables that make a step's process attach to this run."""
        return {
            "MLFLOW_TRACKING_URI": self._whole_uri,
            "MLFLOW_EXPERIMENT_ID": self.experiment_id,
            "MLFLOW_RUN_ID": self._id,
        }

    def newest_child(self, name: str) -> str | None:
        """Id of the step's run, None if it has none."""
        query = f"tags.`{PARENT_TAG}` = '{self._id}' and attributes.run_name = '{name}'"
        found = self._now(
            "a search",
            lambda client, _: client.search_runs([self.experiment_id], query, max_results=1),
        )
        return found[0].info.run_id if found else None

    def reuse(self, name: str, original_run_id: str | None, metrics: Mapping[str, float]) -> None:
        """Add a child for a step whose result came from the cache, so that runs compare.

        Args:
            name: of the step.
            original_run_id: the run that did the work, if known: its parameters and last figures
                are repeated here.
            metrics: figures to show when that run is unknown or gone.
        """
        attempt = uuid.uuid4().hex

        def copy(client: MlflowClient, begun: Begun) -> None:
            place = (begun.experiment_id, begun.run_id)
            copy_run(client, *place, name, original_run_id, metrics, attempt=attempt)

        self._tell("a reused step", copy)

    def finish(self, status: str) -> None:
        """Also end children that could not do so themselves (killed with -9, server away)."""

        def end_children(client: MlflowClient, begun: Begun) -> None:
            for run in children_of(client, begun.experiment_id, begun.run_id):
                if run.info.status == "RUNNING":
                    client.set_terminated(run.info.run_id, status)

        self._tell("children's status", end_children)
        super().finish(status)


def recipe_yaml(recipe: Recipe) -> str:
    """The resolved recipe as YAML."""
    import yaml

    from flagscale.recipe import strict_yaml

    values = recipe.model_dump(mode="json")
    return str(yaml.dump(values, Dumper=strict_yaml.Dumper, sort_keys=False, allow_unicode=True))


def _start(recipe: Recipe, runs: Path) -> PipelineRun:
    for name in _RECIPE_NAMES:
        if value := os.environ.get(name):
            logger.warning(
                "%s=%s is not followed: the run is tracked in the recipe's experiment, "
                "tracking.experiment=%s",
                name,
                value,
                recipe.tracking.experiment,
            )
    uri, client, experiment_id = connect(recipe, runs)
    try:
        _end_dead_runs(client, experiment_id)
        tags = {PROCESS_TAG: here()}
        run_id = client.create_run(experiment_id, run_name=recipe.name, tags=tags).info.run_id
    except Exception as error:  # MLflow and its databases raise many kinds
        raise unusable(uri, error) from error
    run = PipelineRun(client, Begun(run_id, experiment_id), uri)
    run.log_params(recipe.model_dump(mode="json"))
    run.log_text(recipe_yaml(recipe), "recipe.yaml")
    return run


def _end_dead_runs(client: MlflowClient, experiment_id: str) -> None:
    """Mark as KILLED the runs whose process, on this machine, ended without saying so."""
    for run in client.search_runs([experiment_id], "attributes.status = 'RUNNING'"):
        host, _, process = run.data.tags.get(PROCESS_TAG, "").partition(":")
        if host == socket.gethostname() and not is_alive(process):
            client.set_terminated(run.info.run_id, "KILLED")
