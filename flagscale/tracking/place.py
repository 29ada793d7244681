"""Where a step's run belongs in MLflow: below which run, in which experiment."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

from flagscale.tracking.kfp_run import KfpRun
from flagscale.tracking.names import own_kfp_run
from flagscale.tracking.plugin import PluginRun
from flagscale.tracking.server import DEFAULT_EXPERIMENT, find_experiment

if TYPE_CHECKING:
    from mlflow import MlflowClient


class Place(NamedTuple):
    """Where a step's run belongs.

    Attributes:
        experiment_id: MLflow's id of the experiment.
        parent: the run above it; None for a step on its own.
        kfp_run: the parent, if the steps look after it themselves.
    """

    experiment_id: str
    parent: str | None
    kfp_run: KfpRun | None


def find_place(client: MlflowClient, step: str, *, own: bool = True) -> Place:
    """Below the injected run, else the plugin's, else the one that the steps look after.

    Args:
        client: of the tracking server.
        step: its name.
        own: whether this process is that step: what is injected is for it alone.
    """
    injected = os.environ.get("MLFLOW_RUN_ID") or None
    plugin = None if injected and own else PluginRun.find(client)
    if plugin is not None:
        return Place(plugin.experiment_id, plugin.below(step), None)
    if injected or own_kfp_run() is None:
        return Place(_experiment(client), injected, None)
    kfp_run = KfpRun.find_or_make(client, _experiment(client))
    return Place(kfp_run.experiment_id, kfp_run.run_id, kfp_run)


def _experiment(client: MlflowClient) -> str:
    """Id of the experiment that the environment names."""
    return os.environ.get("MLFLOW_EXPERIMENT_ID") or find_experiment(
        client, os.environ.get("MLFLOW_EXPERIMENT_NAME", DEFAULT_EXPERIMENT)
    )
