"""The runs that KFP's own MLflow plugin makes, where an administrator has switched it on.

The API server makes a run for the KFP run, its driver one below it for each task, the cached ones
included, and the API server ends them all. What it has made stands in a variable of every pod,
whether or not the plugin injects MLflow's own variables as well.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

from flagscale.tracking.names import OF_KFP_RUN_TAG
from flagscale.tracking.server import children_of, find_run

if TYPE_CHECKING:
    from mlflow import MlflowClient

_CONFIG = "KFP_MLFLOW_CONFIG"  # KFP's: JSON


class PluginRun:
    """The plugin's run of this KFP run.

    Attributes:
        experiment_id: MLflow's id of the experiment.
        run_id: MLflow's id of the run.
    """

    def __init__(self, client: MlflowClient, experiment_id: str, run_id: str) -> None:
        self._client, self.experiment_id, self.run_id = client, experiment_id, run_id

    @classmethod
    def find(cls, client: MlflowClient) -> PluginRun | None:
        """The run, if this pod was told of one and the server has it; it may be another's."""
        try:
            run_id = json.loads(os.environ.get(_CONFIG) or "{}").get("parentRunId")
        except (ValueError, AttributeError):
            return None
        run = find_run(client, run_id or None)
        return None if run is None else cls(client, run.info.experiment_id, run_id)

    def below(self, step: str) -> str:
        """Where a step's run belongs: below the plugin's run of its task.

        Nothing tells a step which that is, so it must be the only one of the name; the steps of a
        sweep's variants go below the whole run.
        """
        below = children_of(self._client, self.experiment_id, self.run_id)
        found = [
            run.info.run_id
            for run in below
            if run.info.run_name == step and OF_KFP_RUN_TAG not in run.data.tags
        ]
        return str(found[0]) if len(found) == 1 else self.run_id
